import numpy as np
import pytest
from checks import check_lowering, onnx_model

from passes.onnx.tile_upsample import TileUpsample

ROUNDED = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
TWICE = np.array([1, 1, 2, 2], np.float32)


def upsample(shape: str, attributes: str = ROUNDED, kind: str = "uint8") -> str:
    return f"g ({kind}[{shape}] x) => ({kind}[n,c,h,w] y) {{ y = Resize <{attributes}> (x, , scales) }}"


def test_writes_the_upsampling_of_codes_as_a_tile():
    check_lowering(
        TileUpsample(),
        onnx_model(upsample("2,3,4,5"), scales=np.array([1, 1, 2, 3], np.float32)),
        after="""
            x: uint8[2, 3, 4, 5] = input
            y.last = Transpose[perm=[0, 2, 3, 1]](x)
            y.apart = Reshape(y.last, int64[8, 1, 5, 1, 3])
            y.tiled = Tile(y.apart, int64[1, 2, 1, 3, 1])
            y.together = Reshape(y.tiled, int64[2, 8, 15, 3])
            y = Transpose[perm=[0, 3, 1, 2]](y.together)
            return y: uint8[2, 3, 8, 15]
        """,
        rewrites=1,
    )


def test_takes_any_size_where_the_size_is_open():
    check_lowering(
        TileUpsample(),
        onnx_model(upsample("n,3,h,w", kind="int8"), scales=TWICE),
        after="""
            x: int8[n, 3, h, w] = input
            y.last = Transpose[perm=[0, 2, 3, 1]](x)
            y.apart = Unsqueeze(y.last, int64[2, 4])
            y.sides = Shape[end=3, start=1](y.last)
            y.grown = Mul(y.sides, int64[2, 2])
            y.shape = Concat[axis=0](int64[0], y.grown, int64[3])
            y.tiled = Tile(y.apart, int64[1, 1, 2, 1, 2, 1])
            y.together = Reshape(y.tiled, y.shape)
            y = Transpose[perm=[0, 3, 1, 2]](y.together)
            return y: int8[n, 3, h, w]
        """,
        rewrites=1,
    )


@pytest.mark.parametrize(
    ("attributes", "kind", "scales"),
    [
        (ROUNDED, "float", TWICE),
        (ROUNDED, "uint8", np.array([1, 1, 1.5, 2], np.float32)),
        (ROUNDED, "uint8", np.array([1, 2, 2, 2], np.float32)),
        ('mode="nearest", coordinate_transformation_mode="half_pixel", nearest_mode="floor"', "uint8", TWICE),
        ('mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="ceil"', "uint8", TWICE),
        ('mode="linear"', "float", TWICE),
    ],
    ids=["floats", "a scale that is not whole", "channels", "half a pixel", "the pixel behind", "linear"],
)
def test_leaves_other_resizes(attributes: str, kind: str, scales: np.ndarray):
    check_lowering(TileUpsample(), onnx_model(upsample("1,2,4,4", attributes, kind), scales=scales), atol=1e-6)
