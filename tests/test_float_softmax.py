import numpy as np
from checks import check_lowering, onnx_model

from passes.onnx.float_softmax import FloatSoftmax

STEPS = {"s": np.float32(0.25), "z": np.uint8(128), "s2": np.float32(1 / 255), "z2": np.uint8(0)}
TEXT = """
    g (uint8[64,27] x) => (uint8[64,27] y) {
        v = DequantizeLinear (x, s, z)
        p = Softmax <axis = -1> (v)
        y = QuantizeLinear (p, s2, z2)
    }
"""


def test_a_softmax_between_codes_is_written_as_an_exponential():
    check_lowering(
        FloatSoftmax(),
        onnx_model(TEXT, **STEPS),
        after="""
            x: uint8[64, 27] = input
            v = DequantizeLinear(x, float32(0.25), uint8(128))
            p.logarithm = LogSoftmax[axis=-1](v)
            p = Exp(p.logarithm)
            y = QuantizeLinear(p, float32(0.00392157), uint8(0))
            return y: uint8[64, 27]
        """,
        rewrites=1,
    )


def test_leaves_a_softmax_that_is_read_in_floating_point():
    text = TEXT.replace("y = QuantizeLinear (p, s2, z2)", "q = Add (p, p) y = QuantizeLinear (q, s2, z2)")
    check_lowering(FloatSoftmax(), onnx_model(text, **STEPS))
