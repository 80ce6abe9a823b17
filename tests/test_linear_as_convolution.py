import numpy as np
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
    {bias}p.map.last = Unsqueeze(x, int64[2])
    p.map = Transpose[perm=[0, 3, 1, 2]](p.map.last)
    p.map.values = DequantizeLinear(p.map, float32(0.02), uint8(30))
    codes.kernel = Unsqueeze(int8[3x4], int64[2, 3])
    w.kernel = DequantizeLinear[axis=0](codes.kernel, float32[0.01, 0.02, 0.03])
    p.convolved = Conv(p.map.values, w.kernel{read})
    y.map = QuantizeLinear(p.convolved, float32(0.2), uint8(99))
    y.map.last = Transpose[perm=[0, 2, 3, 1]](y.map)
    y = Squeeze(y.map.last, int64[2])
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
