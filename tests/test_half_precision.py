import numpy as np
from checks import check_lowering, onnx_model

from passes.onnx.half_precision import HalfPrecision

NET = """
    g (float[1,2,4,4] x) => (float[1,3,8,8] y) {
        c = Conv (x, w)
        u = Resize <mode = "nearest"> (c, , scales)
        n = ReduceL2 (u, one)
        m = Max (n, eps)
        y = Div (u, m)
    }
"""


def test_computes_in_16_bits_between_inputs_and_outputs_of_32():
    weights = np.random.default_rng(0).standard_normal((3, 2, 1, 1)).astype(np.float32)
    given = {"w": weights, "scales": np.float32([1, 1, 2, 2]), "one": np.int64([1]), "eps": np.float32(1e-12)}
    model = check_lowering(
        HalfPrecision(),
        onnx_model(NET, **given),
        after="""
            x: float[1, 2, 4, 4] = input
            x.half = Cast[to=10](x)
            c = Conv(x.half, float16[{}])
            u = Resize[mode=nearest](c, _, float32[1, 1, 2, 2])
            n = ReduceL2(u, int64[1])
            m = Max(n, float16(5.96046e-08))
            y.half = Div(u, m)
            y = Cast[to=1](y.half)
            return y: float[1, 3, 8, 8]
        """.format(", ".join(f"{float(weight):.6g}" for weight in weights.astype(np.float16).ravel())),
        rewrites=2,
        atol=5e-3,
    )
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), weights.astype(np.float16))


def test_leaves_a_graph_without_floats():
    text = "g (int8[2,3] x) => (int8[2,3] y) { y = Clip (x, low, high) }"
    check_lowering(HalfPrecision(), onnx_model(text, low=np.int8(-3), high=np.int8(5)))
