import numpy as np
import pytest
from checks import check_lowering, onnx_model, optimised_kinds

from passes.onnx.requantize_by_concat import RequantizeByConcat

PAIR = """
    g ({kind}[2,3,4,4] x) => (uint8[2,3,4,4] y) {{
        v = DequantizeLinear <axis = 1> (x, s, z)
        y = QuantizeLinear (v, s2, z2)
    }}
"""
STEPS = {"s": np.float32(0.03), "z": np.uint8(100), "s2": np.float32(0.11), "z2": np.uint8(7)}


def test_writes_codes_again_by_a_concat_of_one(tmp_path):
    model = check_lowering(
        RequantizeByConcat(),
        onnx_model(PAIR.format(kind="uint8"), **STEPS),
        after="""
            x: uint8[2, 3, 4, 4] = input
            v = DequantizeLinear[axis=1](x, float32(0.03), uint8(100))
            y.source = Concat[axis=1](v)
            y = QuantizeLinear(y.source, float32(0.11), uint8(7))
            return y: uint8[2, 3, 4, 4]
        """,
        rewrites=1,
    )
    assert optimised_kinds(model, tmp_path) == {"QLinearConcat": 1}


def test_leaves_codes_of_another_type():
    check_lowering(RequantizeByConcat(), onnx_model(PAIR.format(kind="int8"), **{**STEPS, "z": np.int8(-3)}))


@pytest.mark.parametrize("side", ["s", "s2"])
def test_leaves_codes_with_a_scale_for_each_channel(side: str):
    three = {side: np.float32([0.03, 0.04, 0.05]), side.replace("s", "z"): np.uint8([100, 90, 80])}
    check_lowering(RequantizeByConcat(), onnx_model(PAIR.format(kind="uint8"), **{**STEPS, **three}))
