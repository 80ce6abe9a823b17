import numpy as np
import pytest
from checks import check_lowering, onnx_model

from passes.onnx.channels_last_patches import ChannelsLastPatches

# the patches of two maps, 1 x 2 of each, as tokens
PATCHES = """
    g (uint8[2,3,4,5] a, uint8[2,3,2,6] b) => (uint8[2,4,3] y) {{
        a_rows = Slice (a, zero, four, two)
        a_row = ReduceMax <keepdims = 1> (a_rows, two)
        a_high = Concat <axis = 2> (a_row)
        b_rows = Slice (b, zero, two, two)
        b_row = ReduceMax <keepdims = 1> (b_rows, two)
        b_high = Concat <axis = 2> (b_row)
        a_left = Slice (a_high, zero, three, {axis})
        a_right = Slice ({right}, two, five, three)
        a_1 = ReduceMax <keepdims = 1> (a_left, {axis})
        a_2 = ReduceMax <keepdims = 1> (a_right, three)
        a_pooled = Concat <axis = 3> (a_1, a_2)
        a_flat = Reshape (a_pooled, flat)
        b_left = Slice (b_high, zero, three, three)
        b_right = Slice (b_high, three, six, three)
        b_1 = ReduceMax <keepdims = 1> (b_left, three)
        b_2 = ReduceMax <keepdims = 1> (b_right, three)
        b_pooled = Concat <axis = 3> (b_1, b_2)
        b_flat = Reshape (b_pooled, flat)
        a_values = DequantizeLinear (a_flat, s_a, z)
        b_values = DequantizeLinear (b_flat, s_b, z)
        tokens = Concat <axis = {join}> (a_values, b_values)
        codes = QuantizeLinear (tokens, s, z)
        turned = Transpose <perm = {perm}> (codes)
        y = Identity (turned)
    }}
"""
NUMBERS = {name: np.int64([value]) for name, value in {"zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}.items()}


def patches(axis="three", join=2, perm="[0, 2, 1]", outputs="uint8[2,4,3]", flat=(2, 3, 2), right="a_high"):
    text = PATCHES.format(axis=axis, join=join, perm=perm, right=right).replace("uint8[2,4,3] y", f"{outputs} y")
    steps = {"s_a": np.float32(0.02), "s_b": np.float32(0.03), "s": np.float32(0.04), "z": np.uint8(9)}
    return onnx_model(text, **NUMBERS, **steps, flat=np.int64(flat))


def pooled(name, index, scale, rows, left, right):
    return f"""
        turned.{index}.last = Transpose[perm=[0, 2, 3, 1]]({name})
        turned.{index}.1.0.part = Slice(turned.{index}.last, {rows}, int64[1])
        turned.{index}.1.0 = ReduceMax[keepdims=1](turned.{index}.1.0.part, int64[1])
        turned.{index}.1 = Concat[axis=1](turned.{index}.1.0)
        turned.{index}.2.0.part = Slice(turned.{index}.1, {left}, int64[2])
        turned.{index}.2.0 = ReduceMax[keepdims=1](turned.{index}.2.0.part, int64[2])
        turned.{index}.2.1.part = Slice(turned.{index}.1, {right}, int64[2])
        turned.{index}.2.1 = ReduceMax[keepdims=1](turned.{index}.2.1.part, int64[2])
        turned.{index}.2 = Concat[axis=2](turned.{index}.2.0, turned.{index}.2.1)
        turned.{index}.patches = Reshape(turned.{index}.2, int64[0, -1, 3])
        turned.{index}.values = DequantizeLinear(turned.{index}.patches, float32({scale}), uint8(9))"""


def test_takes_patches_channels_last_as_tokens():
    after = "\n        a: uint8[2, 3, 4, 5] = input\n        b: uint8[2, 3, 2, 6] = input"
    after += pooled("a", 0, 0.02, "int64[0], int64[4]", "int64[0], int64[3]", "int64[2], int64[5]")
    after += pooled("b", 1, 0.03, "int64[0], int64[2]", "int64[0], int64[3]", "int64[3], int64[6]")
    after += """
        turned.joined = Concat[axis=1](turned.0.values, turned.1.values)
        codes.nhwc = QuantizeLinear(turned.joined, float32(0.04), uint8(9))
        y = Identity(codes.nhwc)
        return y: uint8[2, 4, 3]"""
    check_lowering(ChannelsLastPatches(), patches(), after=after, rewrites=1)


@pytest.mark.parametrize(
    "given",
    [
        {"axis": "two", "flat": (2, 3, -1), "outputs": "uint8[2,8,3]"},
        {"perm": "[2, 0, 1]", "outputs": "uint8[4,2,3]"},
        {"join": 1, "outputs": "uint8[2,2,6]"},
        {"flat": (2, 2, 3), "outputs": "uint8[2,6,2]"},
        {"right": "b_high"},
    ],
    ids=["windows of rows", "another turn", "joined channels", "channels not kept", "windows of two maps"],
)
def test_leaves_other_tokens(given):
    check_lowering(ChannelsLastPatches(), patches(**given))
