import numpy as np
import pytest
from checks import check_lowering, onnx_model

from passes.onnx.pad_stem import PadStem

STEM = """
    g (uint8[1,{inputs},6,6] x) => (uint8[1,{outputs},3,3] y) {{
        v = DequantizeLinear (x, s, z)
        w = DequantizeLinear <axis = 0> (codes, ws)
        c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]{more}> (v, w)
        y = QuantizeLinear (c, s2, z2)
    }}
"""


def constants(inputs: int, outputs: int = 4, kind: type = np.uint8) -> dict[str, np.ndarray]:
    codes = np.random.default_rng(0).integers(-60, 60, (outputs, inputs, 3, 3), dtype=np.int8)
    scale = np.linspace(0.001, 0.002, outputs, dtype=np.float32)
    given = {"codes": codes, "ws": scale, "s": np.float32(1 / 255), "s2": np.float32(0.01)}
    return {**given, "z": np.array(7, kind), "z2": np.array(120, np.uint8)}


def test_gives_a_convolution_of_three_channels_a_fourth():
    model = onnx_model(STEM.format(inputs=3, outputs=4, more=""), **constants(3))
    check_lowering(
        PadStem(),
        model,
        after="""
            x: uint8[1, 3, 6, 6] = input
            w = DequantizeLinear[axis=0](int8[4x4x3x3], float32[0.001, 0.00133333, 0.00166667, 0.002])
            x.padded = Pad[mode=constant](x, int64[8], uint8(7))
            v.padded = DequantizeLinear(x.padded, float32(0.00392157), uint8(7))
            c = Conv[pads=[1, 1, 1, 1], strides=[2, 2]](v.padded, w)
            y = QuantizeLinear(c, float32(0.01), uint8(120))
            return y: uint8[1, 4, 3, 3]
        """,
        rewrites=1,
    )
    codes = model.graph.initializers["codes"].const_value.numpy()
    assert not codes[:, 3].any()


BYTES = STEM.replace("(uint8[1,{inputs},6,6] x)", "(uint8[{sides},3] pixels)").replace(
    "v =", "x = Transpose <perm = [0, 3, 1, 2]> (pixels)\n        v ="
)


def test_pads_pixels_whose_channels_come_last_as_rows():
    check_lowering(
        PadStem(),
        onnx_model(BYTES.format(sides="1,6,6", outputs=4, more=""), **constants(3)),
        after="""
            pixels: uint8[1, 6, 6, 3] = input
            w = DequantizeLinear[axis=0](int8[4x4x3x3], float32[0.001, 0.00133333, 0.00166667, 0.002])
            x.padded.flat = Reshape(pixels, int64[0, -1, 3])
            x.padded.planes = Transpose[perm=[0, 2, 1]](x.padded.flat)
            x.padded.rows = Pad[mode=constant](x.padded.planes, int64[0, 0, 0, 0, 1, 0], uint8(7))
            x.padded = Reshape(x.padded.rows, int64[0, 4, 6, 6])
            v.padded = DequantizeLinear(x.padded, float32(0.00392157), uint8(7))
            c = Conv[pads=[1, 1, 1, 1], strides=[2, 2]](v.padded, w)
            y = QuantizeLinear(c, float32(0.01), uint8(120))
            return y: uint8[1, 4, 3, 3]
        """,
        rewrites=1,
    )


def test_pads_pixels_of_any_size_as_rows():
    text = BYTES.format(sides="batch,height,width", outputs=4, more="").replace("1,4,3,3", "batch,4,h,w")
    check_lowering(
        PadStem(),
        onnx_model(text, **constants(3)),
        after="""
            pixels: uint8[batch, height, width, 3] = input
            w = DequantizeLinear[axis=0](int8[4x4x3x3], float32[0.001, 0.00133333, 0.00166667, 0.002])
            x.padded.flat = Reshape(pixels, int64[0, -1, 3])
            x.padded.planes = Transpose[perm=[0, 2, 1]](x.padded.flat)
            x.padded.rows = Pad[mode=constant](x.padded.planes, int64[0, 0, 0, 0, 1, 0], uint8(7))
            x.padded.size = Shape[end=3, start=1](pixels)
            x.padded.shape = Concat[axis=0](int64[0, 4], x.padded.size)
            x.padded = Reshape(x.padded.rows, x.padded.shape)
            v.padded = DequantizeLinear(x.padded, float32(0.00392157), uint8(7))
            c = Conv[pads=[1, 1, 1, 1], strides=[2, 2]](v.padded, w)
            y = QuantizeLinear(c, float32(0.01), uint8(120))
            return y: uint8[batch, 4, h, w]
        """,
        rewrites=1,
    )


def test_leaves_convolutions_of_four_channels():
    check_lowering(PadStem(), onnx_model(STEM.format(inputs=4, outputs=4, more=""), **constants(4)))


def test_leaves_convolutions_of_groups():
    given = constants(3, outputs=3)
    given["codes"] = given["codes"][:, :1]
    check_lowering(PadStem(), onnx_model(STEM.format(inputs=3, outputs=3, more=", group = 3"), **given))


@pytest.mark.parametrize("stays", ["w", "v"])
def test_leaves_convolutions_of_floats(stays: str):
    text = """
        g (uint8[1,3,6,6] x) => (float[1,4,6,6] y) {
            v = CAST (x)
            w = READ (codes, ws)
            y = Conv <pads = [1, 1, 1, 1]> (v, w)
        }
    """
    given = constants(3)
    if stays == "w":
        text = text.replace("CAST (x)", "DequantizeLinear (x, s, z)").replace("READ (codes, ws)", "Identity (floats)")
        given = {"floats": given["codes"].astype(np.float32), "s": given["s"], "z": given["z"]}
    else:
        text = text.replace("CAST (x)", "Cast <to = 1> (x)").replace("READ", "DequantizeLinear <axis = 0>")
        given = {key: given[key] for key in ("codes", "ws")}
    check_lowering(PadStem(), onnx_model(text, **given), atol=1e-2)
