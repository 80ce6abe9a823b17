import numpy as np
import onnx_ir as ir
from checks import check_lowering, onnx_model, optimised_kinds

from passes.onnx.channels_last_match import ChannelsLastMatch

PLAIN = """
    g (uint8[2,4,3,5] x{input}) => (uint8[n,c,h,w] y) {{
        t = DequantizeLinear (texts, st)
        {regions}
        m_product = MatMul (t, r)
        m = Add (m_product, bias)
        codes = QuantizeLinear (m, so, zo)
        y = Reshape (codes, map)
    }}
"""
READ = "flat = Reshape (x, flattened) r = DequantizeLinear (flat, s, z)"
NORMED = "v = DequantizeLinear (x, s, z) l = ReduceL2 (v, one) e = Max (l, eps) d = Div (v, e) r = Reshape (d, flattened)"
TEXTS = np.random.default_rng(0).integers(-60, 60, (1, 6, 4), dtype=np.int8)
GIVEN = {
    "s": np.float32(0.02), "z": np.uint8(110), "st": np.float32(0.03), "bias": np.float32(-1), "so": np.float32(0.05), "zo": np.uint8(120),
    "flattened": np.int64([2, 4, 15]), "map": np.int64([2, 6, 3, 5]),
}  # fmt: skip
NORM = {"eps": np.float32(1e-12), "one": np.int64([1])}


def match(regions: str, **constants: np.ndarray) -> ir.Model:
    text = PLAIN.format(regions=regions, input="" if "texts" in constants else ", int8[1,6,4] texts")
    return onnx_model(text, **GIVEN, **constants)


def test_matches_a_constant_text_as_one_product(tmp_path):
    model = check_lowering(
        ChannelsLastMatch(),
        match(READ, texts=TEXTS),
        after="""
            x: uint8[2, 4, 3, 5] = input
            m_product.regions = Transpose[perm=[0, 2, 3, 1]](x)
            m_product.texts = Squeeze(int8[1x6x4], int64[0])
            m_product.text = Transpose[perm=[1, 0]](m_product.texts)
            m_product.regions.values = DequantizeLinear(m_product.regions, float32(0.02), uint8(110))
            m_product.text.values = DequantizeLinear(m_product.text, float32(0.03))
            m_product.matched = MatMul(m_product.regions.values, m_product.text.values)
            m_product.shifted = Add(m_product.matched, float32(-1))
            codes.nhwc = QuantizeLinear(m_product.shifted, float32(0.05), uint8(120))
            y = Transpose[perm=[0, 3, 1, 2]](codes.nhwc)
            return y: uint8[2, 6, 3, 5]
        """,
        rewrites=1,
    )
    assert optimised_kinds(model, tmp_path) == {"Transpose": 2, "MatMulIntegerToFloat": 1, "Add": 1, "QuantizeLinear": 1}


def test_divides_by_the_norm_after_the_product(tmp_path):
    model = check_lowering(
        ChannelsLastMatch(),
        match(NORMED, texts=TEXTS, **NORM),
        after="""
            x: uint8[2, 4, 3, 5] = input
            m_product.regions = Transpose[perm=[0, 2, 3, 1]](x)
            m_product.texts = Squeeze(int8[1x6x4], int64[0])
            m_product.text = Transpose[perm=[1, 0]](m_product.texts)
            m_product.regions.values = DequantizeLinear(m_product.regions, float32(0.02), uint8(110))
            m_product.text.values = DequantizeLinear(m_product.text, float32(0.03))
            m_product.matched = MatMul(m_product.regions.values, m_product.text.values)
            m_product.regions.normed = DequantizeLinear(m_product.regions, float32(0.02), uint8(110))
            m_product.norm = ReduceL2[keepdims=1](m_product.regions.normed, int64[3])
            m_product.divisor = Max(m_product.norm, float32(1e-12))
            m_product.normed = Div(m_product.matched, m_product.divisor)
            m_product.shifted = Add(m_product.normed, float32(-1))
            codes.nhwc = QuantizeLinear(m_product.shifted, float32(0.05), uint8(120))
            y = Transpose[perm=[0, 3, 1, 2]](codes.nhwc)
            return y: uint8[2, 6, 3, 5]
        """,
        rewrites=1,
    )
    assert optimised_kinds(model, tmp_path)["MatMulIntegerToFloat"] == 1


def test_turns_a_text_that_is_an_input(tmp_path):
    model = check_lowering(
        ChannelsLastMatch(),
        match(READ),
        after="""
            x: uint8[2, 4, 3, 5] = input
            texts: int8[1, 6, 4] = input
            m_product.regions = Transpose[perm=[0, 2, 3, 1]](x)
            m_product.flat = Reshape(m_product.regions, int64[0, -1, 4])
            m_product.text = Transpose[perm=[0, 2, 1]](texts)
            m_product.regions.values = DequantizeLinear(m_product.flat, float32(0.02), uint8(110))
            m_product.text.values = DequantizeLinear(m_product.text, float32(0.03))
            m_product.matched = MatMul(m_product.regions.values, m_product.text.values)
            m_product.shifted = Add(m_product.matched, float32(-1))
            codes.nhwc = QuantizeLinear(m_product.shifted, float32(0.05), uint8(120))
            codes = Transpose[perm=[0, 2, 1]](codes.nhwc)
            y = Reshape(codes, int64[2, 6, 3, 5])
            return y: uint8[2, 6, 3, 5]
        """,
        rewrites=1,
    )
    assert optimised_kinds(model, tmp_path)["MatMulIntegerToFloat"] == 1


def test_leaves_regions_with_a_scale_for_each_channel():
    per_channel = READ.replace("DequantizeLinear (flat, s, z)", "DequantizeLinear <axis = 1> (flat, s4, z4)")
    check_lowering(ChannelsLastMatch(), match(per_channel, texts=TEXTS, s4=np.float32([0.01, 0.02, 0.03, 0.04]), z4=np.uint8([1, 2, 3, 4])))


def test_leaves_a_norm_of_other_codes():
    other = NORMED.replace("ReduceL2 (v, one)", "ReduceL2 (u, one)").replace(
        "v = ", "x2 = MaxPool <kernel_shape = [1, 1]> (x) u = DequantizeLinear (x2, s, z) v = "
    )
    check_lowering(ChannelsLastMatch(), match(other, texts=TEXTS, **NORM))


def test_leaves_a_text_of_floats():
    text = PLAIN.format(regions=READ, input="").replace("t = DequantizeLinear (texts, st)", "t = Identity (texts)")
    given = {key: value for key, value in GIVEN.items() if key != "st"}
    check_lowering(ChannelsLastMatch(), onnx_model(text, texts=TEXTS.astype(np.float32) / 50, **given))
