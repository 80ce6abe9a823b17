import numpy as np
import pytest
from checks import check_lowering, onnx_model

from passes.onnx.fold_factor import FoldFactor

STEPS = {"s": np.float32(0.25), "z": np.uint8(3), "f": np.float32(0.5), "s2": np.float32(1 / 255), "z2": np.uint8(0)}


def softmax(product: str) -> str:
    return f"""
        g (uint8[2,5] x) => (uint8[2,5] y) {{
            v = DequantizeLinear (x, s, z)
            {product}
            p = Softmax (m)
            y = QuantizeLinear (p, s2, z2)
        }}
    """


@pytest.mark.parametrize("product", ["m = Mul (v, f)", "m = Mul (f, v)"])
def test_folds_a_factor_into_the_scale(product: str):
    check_lowering(
        FoldFactor(),
        onnx_model(softmax(product), **STEPS),
        after="""
            x: uint8[2, 5] = input
            m = DequantizeLinear(x, float32(0.125), uint8(3))
            p = Softmax(m)
            y = QuantizeLinear(p, float32(0.00392157), uint8(0))
            return y: uint8[2, 5]
        """,
        rewrites=1,
    )


@pytest.mark.parametrize("factor", [np.float32(-0.5), np.float32(0), np.float32([0.5, 1, 2, 3, 4])], ids=["negative", "zero", "several"])
def test_leaves_factors_that_are_no_positive_number(factor: np.ndarray):
    text = softmax("m = Mul (v, f)").replace("p = Softmax (m)", "a = Add (m, v) p = Softmax (a)")
    check_lowering(FoldFactor(), onnx_model(text, **{**STEPS, "f": factor}))


def test_leaves_values_that_are_read_besides():
    text = softmax("m = Mul (v, f)").replace("p = Softmax (m)", "a = Add (m, v) p = Softmax (a)")
    check_lowering(FoldFactor(), onnx_model(text, **STEPS))
