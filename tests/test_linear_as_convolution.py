import numpy as np
import pytest
from checks import check_lowering, onnx_model, optimised_kinds

from passes.onnx.linear_as_convolution import LinearAsConvolution

LINEAR = """
    g (uint8[2,5,4] x) => ({kind}[2,5,3] y) {{
        v = DequantizeLinear (x, s, z)
        w = DequantizeLinear <axis = 0> (codes, ws)
        t = Transpose <perm = [1, 0]> (w)
        p = MatMul (v, t)
        b = DequantizeLinear <axis = 0> (bias, bs)
        {end}
    }}
"""
S, WS = np.float32(0.02), np.float32([0.01, 0.02, 0.03])
WEIGHT = {"codes": np.random.default_rng(1).integers(-60, 60, (3, 4), dtype=np.int8), "ws": WS, "s": S, "z": np.uint8(30)}
GIVEN = {**WEIGHT, "bias": np.int32([100, -200, 3000]), "bs": S * WS}
TO_CODES = "a = Add (p, b) y = QuantizeLinear (a, s2, z2)"
AFTER = """
    x: uint8[2, 5, 4] = input
    {bias}p.map.last = Reshape(x, int64[0, 0, 1, 4])
    p.map = Transpose[perm=[0, 3, 1, 2]](p.map.last)
    p.map.values = DequantizeLinear(p.map, float32(0.02), uint8(30))
    codes.kernel = Unsqueeze(int8[3x4], int64[2, 3])
    w.kernel = DequantizeLinear[axis=0](codes.kernel, float32[0.01, 0.02, 0.03])
    p.convolved = Conv(p.map.values, w.kernel{read})
    y.map = QuantizeLinear(p.convolved, float32(0.2), uint8(99))
    y.map.last = Transpose[perm=[0, 2, 3, 1]](y.map)
    y = Reshape(y.map.last, int64[0, 0, 3])
    return y: uint8[2, 5, 3]
"""


def test_writes_a_linear_layer_as_a_convolution(tmp_path):
    model = check_lowering(
        LinearAsConvolution(),
        onnx_model(LINEAR.format(kind="uint8", end=TO_CODES), **GIVEN, s2=np.float32(0.2), z2=np.uint8(99)),
        after=AFTER.format(bias="b = DequantizeLinear[axis=0](int32[100, -200, 3000], float32[0.0002, 0.0004, 0.0006])\n    ", read=", b"),
        rewrites=1,
    )
    kinds = optimised_kinds(model, tmp_path)
    assert kinds["QLinearConv"] == 1
    assert not {"MatMul", "Conv", "DequantizeLinear", "QuantizeLinear", "Transpose"} & kinds.keys()


def test_writes_a_layer_without_a_bias_as_well():
    text = LINEAR.format(kind="uint8", end="y = QuantizeLinear (p, s2, z2)").replace("b = DequantizeLinear <axis = 0> (bias, bs)", "")
    model = onnx_model(text, **WEIGHT, s2=np.float32(0.2), z2=np.uint8(99))
    check_lowering(LinearAsConvolution(), model, after=AFTER.format(bias="", read=""), rewrites=1)


def test_turns_the_codes_of_a_weight_whose_product_stays_float(tmp_path):
    model = check_lowering(
        LinearAsConvolution(),
        onnx_model(LINEAR.format(kind="float", end="y = Add (p, b)"), **GIVEN),
        after="""
            x: uint8[2, 5, 4] = input
            v = DequantizeLinear(x, float32(0.02), uint8(30))
            codes.transposed = Transpose[perm=[1, 0]](int8[3x4])
            w.transposed#2 = DequantizeLinear[axis=1](codes.transposed, float32[0.01, 0.02, 0.03])
            p = MatMul(v, w.transposed#2)
            bias.lifted = Reshape(int32[100, -200, 3000], int64[1, 1, 3])
            b.lifted = DequantizeLinear[axis=2](bias.lifted, float32[0.0002, 0.0004, 0.0006])
            y = Add(p, b.lifted)
            return y: float[2, 5, 3]
        """,
        rewrites=1,
        atol=1e-5,
    )
    assert optimised_kinds(model, tmp_path)["MatMulIntegerToFloat"] == 1


HEADS = """
    h = Reshape ({end}, apart)
    t2 = Transpose <perm = [0, 2, 1, 3]> (h)
    wide = QuantizeLinear <axis = 1> (t2, s2, z2)
    y = Clip (wide, low, high)
"""
SCALES = {"s2": np.float32([0.05, 0.3]), "z2": np.int8([0, 0]), "apart": np.int64([2, 5, 2, 3]), "low": np.int8(-64), "high": np.int8(63)}
WIDER = {"codes": np.random.default_rng(1).integers(-60, 60, (6, 4), dtype=np.int8), "s": S, "z": np.uint8(30)}
SIX = np.float32([0.01, 0.02, 0.03, 0.02, 0.04, 0.01])


def test_takes_the_scales_of_heads_into_the_weights_of_a_convolution(tmp_path):
    text = LINEAR.format(kind="int8", end="a = Add (p, b)" + HEADS.format(end="a")).replace("int8[2,5,3]", "int8[2,2,5,3]")
    bias = {"bias": np.int32([100, -200, 3000, 50, -900, 7]), "bs": S * SIX}
    model = check_lowering(
        LinearAsConvolution(),
        onnx_model(text, **WIDER, ws=SIX, **bias, **SCALES),
        after="""
            x: uint8[2, 5, 4] = input
            y.head_scales = Unsqueeze(float32[0.05, 0.3], int64[1])
            y.spread = Expand(y.head_scales, int64[2, 3])
            y.channel_scales = Reshape(y.spread, int64[-1])
            p.weight_scale.heads = Div(float32[0.01, 0.02, 0.03, 0.02, 0.04, 0.01], y.channel_scales)
            p.bias_scale.heads = Mul(float32(0.02), p.weight_scale.heads)
            b.heads = DequantizeLinear[axis=0](int32[100, -200, 3000, 50, -900, 7], p.bias_scale.heads)
            p.map.last = Reshape(x, int64[0, 0, 1, 4])
            p.map = Transpose[perm=[0, 3, 1, 2]](p.map.last)
            p.map.values = DequantizeLinear(p.map, float32(0.02), uint8(30))
            codes.kernel = Unsqueeze(int8[6x4], int64[2, 3])
            w.kernel = DequantizeLinear[axis=0](codes.kernel, p.weight_scale.heads)
            p.convolved = Conv(p.map.values, w.kernel, b.heads)
            y.unsigned.map = QuantizeLinear(p.convolved, float32(1), uint8(128))
            y.unsigned.map.last = Transpose[perm=[0, 2, 3, 1]](y.unsigned.map)
            y.unsigned.tokens = Reshape(y.unsigned.map.last, int64[0, 0, 6])
            y.wide = Cast[to=6](y.unsigned.tokens)
            y.less_middle = Sub(y.wide, int32(128))
            y.signed = Cast[to=3](y.less_middle)
            y.clipped = Clip(y.signed, int8(-64), int8(63))
            y.apart = Reshape(y.clipped, int64[2, 5, 2, 3])
            y = Transpose[perm=[0, 2, 1, 3]](y.apart)
            return y: int8[2, 2, 5, 3]
        """,
        rewrites=1,
    )
    kinds = optimised_kinds(model, tmp_path)
    assert kinds["QLinearConv"] == 1
    assert not {"MatMul", "MatMulIntegerToFloat", "Conv", "Add", "Div", "DequantizeLinear", "QuantizeLinear"} & kinds.keys()


@pytest.mark.parametrize(
    "given",
    [{"z2": np.int8([0, 5])}, {"ws": SIX[:4], "axis": 1}, {"s2": np.float32([0.05] * 3), "z2": np.int8([0] * 3), "axis2": 3}],
    ids=["zero points", "a weight with a scale for each input", "scales along another axis"],
)
def test_leaves_the_product_of_heads_that_no_convolution_gives_in_floats(given):
    text = LINEAR.format(kind="int8", end=HEADS.format(end="p")).replace("int8[2,5,3]", "int8[2,2,5,3]")
    text = text.replace("b = DequantizeLinear <axis = 0> (bias, bs)", "").replace("<axis = 0>", f"<axis = {given.pop('axis', 0)}>")
    text = text.replace("QuantizeLinear <axis = 1>", f"QuantizeLinear <axis = {given.pop('axis2', 1)}>")
    model = onnx_model(text, **{**WIDER, "ws": SIX, **SCALES, **given})
    LinearAsConvolution()(model)
    assert "Conv" not in [node.op_type for node in model.graph]


def test_turns_the_codes_where_the_product_becomes_codes_of_another_type():
    text = LINEAR.format(kind="int8", end=TO_CODES)
    model = onnx_model(text, **GIVEN, s2=np.float32(0.2), z2=np.int8(0))
    LinearAsConvolution()(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["DequantizeLinear", "Transpose", "DequantizeLinear", "MatMul", "Reshape", "DequantizeLinear", "Add", "QuantizeLinear"]


def test_leaves_a_weight_of_floats():
    text = """
        g (uint8[2,5,4] x) => (float[2,5,3] y) {
            v = DequantizeLinear (x, s, z)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (v, t)
        }
    """
    check_lowering(LinearAsConvolution(), onnx_model(text, w=np.float32(WEIGHT["codes"]), s=S, z=np.uint8(3)), atol=1e-4)
