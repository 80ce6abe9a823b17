import numpy as np
import onnx_ir as ir
import pytest
from checks import check_lowering, onnx_model

from passes.onnx.pack_int4 import PackInt4

PRODUCT = """
    g (uint8[1,2,5,5] x) => (uint8[1,3,5,5] y) {
        v = DequantizeLinear (x, s, z)
        w = DequantizeLinear <axis = 0> (codes, ws)
        c = Conv (v, w)
        y = QuantizeLinear (c, s2, z2)
    }
"""
STEPS = {"ws": np.float32([0.01, 0.02, 0.03]), "s": np.float32(0.02), "z": np.uint8(3), "s2": np.float32(0.01), "z2": np.uint8(99)}


def codes(lowest: int, highest: int) -> np.ndarray:
    values = np.random.default_rng(1).integers(lowest, highest, (3, 2, 1, 1), dtype=np.int8, endpoint=True)
    values.flat[0], values.flat[1] = lowest, highest
    return values


def test_stores_codes_of_4_bits_two_to_a_byte():
    stored = codes(-8, 7)
    model = check_lowering(
        PackInt4(),
        onnx_model(PRODUCT, codes=stored, **STEPS),
        after="""
            x: uint8[1, 2, 5, 5] = input
            v = DequantizeLinear(x, float32(0.02), uint8(3))
            codes.int8 = Cast[to=3](int4[{}])
            w = DequantizeLinear[axis=0](codes.int8, float32[0.01, 0.02, 0.03])
            c = Conv(v, w)
            y = QuantizeLinear(c, float32(0.01), uint8(99))
            return y: uint8[1, 3, 5, 5]
        """.format(", ".join(map(str, stored.ravel().tolist()))),
        rewrites=1,
    )
    assert ir.to_proto(model).graph.initializer[0].raw_data == packed(stored)


def packed(values: np.ndarray) -> bytes:
    """Two codes to a byte, the first in its lower half."""
    low, high = values.ravel()[::2] & 15, values.ravel()[1::2] & 15
    return (low | high << 4).astype(np.uint8).tobytes()


@pytest.mark.parametrize(("lowest", "highest"), [(-9, 7), (-8, 8)])
def test_leaves_codes_that_are_wider(lowest: int, highest: int):
    check_lowering(PackInt4(), onnx_model(PRODUCT, codes=codes(lowest, highest), **STEPS))


def test_leaves_zero_points_and_codes_that_are_no_constants():
    text = """
        g (int8[4,4] x) => (float[4,4] y) {
            y = DequantizeLinear <axis = 0> (x, ws, z)
        }
    """
    check_lowering(PackInt4(), onnx_model(text, ws=np.float32([1, 2, 3, 4]), z=np.int8([0, 1, 2, 3])), atol=0)
