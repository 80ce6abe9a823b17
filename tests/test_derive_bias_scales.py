import numpy as np
from checks import check_lowering, onnx_model

from passes.onnx.derive_bias_scales import DeriveBiasScales

LAYER = """
    g (uint8[1,2,5,5] x) => (uint8[1,3,5,5] y) {
        v = DequantizeLinear (x, s, z)
        w = DequantizeLinear <axis = 0> (codes, ws)
        b = DequantizeLinear <axis = 0> (bias, bs)
        c = Conv (v, w, b)
        y = QuantizeLinear (c, s2, z2)
    }
"""
S, WS = np.float32(0.02), np.float32([0.01, 0.02, 0.03])
GIVEN = {
    "codes": np.random.default_rng(1).integers(-60, 60, (3, 2, 1, 1), dtype=np.int8), "bias": np.int32([100, -200, 3000]), "s": S,
    "z": np.uint8(3), "ws": WS, "s2": np.float32(0.5), "z2": np.uint8(99),
}  # fmt: skip


def test_stores_of_a_bias_its_codes_alone():
    check_lowering(
        DeriveBiasScales(),
        onnx_model(LAYER, bs=S * WS, **GIVEN),
        after="""
            x: uint8[1, 2, 5, 5] = input
            v = DequantizeLinear(x, float32(0.02), uint8(3))
            w = DequantizeLinear[axis=0](int8[{}], float32[0.01, 0.02, 0.03])
            bs = Mul(float32(0.02), float32[0.01, 0.02, 0.03])
            b = DequantizeLinear[axis=0](int32[100, -200, 3000], bs)
            c = Conv(v, w, b)
            y = QuantizeLinear(c, float32(0.5), uint8(99))
            return y: uint8[1, 3, 5, 5]
        """.format(", ".join(map(str, GIVEN["codes"].ravel().tolist()))),
        rewrites=1,
    )


def test_leaves_a_scale_that_is_off_by_a_bit():
    check_lowering(DeriveBiasScales(), onnx_model(LAYER, bs=np.nextafter(S * WS, np.float32(1)), **GIVEN))


def test_leaves_a_bias_that_is_read_twice():
    text = LAYER.replace("y = QuantizeLinear (c,", "t = Unsqueeze (b, axes) a = Add (c, t) y = QuantizeLinear (a,")
    check_lowering(DeriveBiasScales(), onnx_model(text, bs=S * WS, axes=np.int64([0, 2, 3]), **GIVEN))
