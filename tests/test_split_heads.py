import numpy as np
from checks import check_lowering, onnx_model

from passes.onnx.split_heads import SplitHeads

PRODUCT = """
    g (uint8[2,2,3,4] a, int8[1,2,4,5] b) => (float[2,2,3,5] y) {
        u = DequantizeLinear <axis = 1> (a, s, z)
        v = DequantizeLinear <axis = 1> (b, t)
        y = MatMul (u, v)
    }
"""
PER_HEAD = {"s": np.float32([0.5, 0.25]), "z": np.uint8([100, 200])}


def test_writes_a_product_of_two_scales_as_two():
    check_lowering(
        SplitHeads(),
        onnx_model(PRODUCT, **PER_HEAD, t=np.float32([1, 2])),
        after="""
            a: uint8[2, 2, 3, 4] = input
            b: int8[1, 2, 4, 5] = input
            y.first.0.codes, y.first.1.codes = Split[axis=1](a, int64[1, 1])
            y.first.0 = DequantizeLinear(y.first.0.codes, float32(0.5), uint8(100))
            y.first.1 = DequantizeLinear(y.first.1.codes, float32(0.25), uint8(200))
            y.second.0.codes, y.second.1.codes = Split[axis=1](b, int64[1, 1])
            y.second.0 = DequantizeLinear(y.second.0.codes, float32(1))
            y.second.1 = DequantizeLinear(y.second.1.codes, float32(2))
            y.0 = MatMul(y.first.0, y.second.0)
            y.1 = MatMul(y.first.1, y.second.1)
            y = Concat[axis=1](y.0, y.1)
            return y: float[2, 2, 3, 5]
        """,
        rewrites=1,
    )


def test_splits_the_operand_of_one_scale_too():
    check_lowering(
        SplitHeads(),
        onnx_model(PRODUCT, **PER_HEAD, t=np.float32(2)),
        after="""
            a: uint8[2, 2, 3, 4] = input
            b: int8[1, 2, 4, 5] = input
            y.first.0.codes, y.first.1.codes = Split[axis=1](a, int64[1, 1])
            y.first.0 = DequantizeLinear(y.first.0.codes, float32(0.5), uint8(100))
            y.first.1 = DequantizeLinear(y.first.1.codes, float32(0.25), uint8(200))
            y.second.0.codes, y.second.1.codes = Split[axis=1](b, int64[1, 1])
            y.second.0 = DequantizeLinear(y.second.0.codes, float32(2))
            y.second.1 = DequantizeLinear(y.second.1.codes, float32(2))
            y.0 = MatMul(y.first.0, y.second.0)
            y.1 = MatMul(y.first.1, y.second.1)
            y = Concat[axis=1](y.0, y.1)
            return y: float[2, 2, 3, 5]
        """,
        rewrites=1,
    )


def test_leaves_products_of_one_scale():
    check_lowering(SplitHeads(), onnx_model(PRODUCT, s=np.float32(0.5), z=np.uint8(3), t=np.float32(2)), atol=1e-3)


def test_leaves_a_scale_along_the_product():
    text = PRODUCT.replace("<axis = 1> (b, t)", "<axis = 3> (b, t)")
    check_lowering(SplitHeads(), onnx_model(text, s=np.float32(0.5), z=np.uint8(3), t=np.float32([1, 2, 3, 4, 5])), atol=1e9)
