import numpy as np
from checks import check_lowering, onnx_model

from passes.onnx.saturate_codes import SaturateCodes

SILU = """
    g (uint8[1,4,6,6] x) => (uint8[1,4,6,6] end) {{
        v = DequantizeLinear (x, s, z)
        g1 = Sigmoid (v)
        gates = QuantizeLinear (g1, sg, zg)
        g2 = DequantizeLinear (gates, sg, zg)
        u = DequantizeLinear (x, s, z)
        p = Mul ({order})
        wide = QuantizeLinear (p, s4, z4)
        {tail}
    }}
"""
CLIP = """y = Clip (wide, lowest, highest)
        {on}
        r = DequantizeLinear ({read}, s4, z4)
        end = QuantizeLinear (r, s8, z8)"""
STEPS = {
    "s": np.float32(0.05),
    "z": np.uint8(100),
    "sg": np.float32(1 / 255),
    "zg": np.uint8(0),
    "s8": np.float32(0.03),
    "z8": np.uint8(20),
}
ENDS = {"lowest": np.uint8(0), "highest": np.uint8(15)}


def silu(order: str = "u, g2", on: str = "", read: str = "y") -> str:
    return SILU.format(order=order, tail=CLIP.format(on=on, read=read))


def body(zero: int, clip: str, scale: str, on: str = "") -> str:
    return f"""
        x: uint8[1, 4, 6, 6] = input
        v = DequantizeLinear(x, float32(0.05), uint8(100))
        g1 = Sigmoid(v)
        gates = QuantizeLinear(g1, float32(0.00392157), uint8(0))
        g2 = DequantizeLinear(gates, float32(0.00392157), uint8(0))
        u = DequantizeLinear(x, float32(0.05), uint8(100))
        p = Mul(u, g2)
        {clip} = QuantizeLinear(p, float32({scale}), uint8({zero})){on}
        r = DequantizeLinear({"halves" if on else clip}, float32({scale}), uint8({zero}))
        end = QuantizeLinear(r, float32(0.03), uint8(20))
        return end: uint8[1, 4, 6, 6]
    """


def test_moves_codes_to_the_end_of_the_byte():
    model = onnx_model(silu(), **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(1))
    check_lowering(SaturateCodes(), model, after=body(241, "y.shifted", "0.3"), rewrites=1)


def test_takes_the_factors_either_way():
    model = onnx_model(silu("g2, u"), **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(1))
    check_lowering(SaturateCodes(), model, after=body(241, "y.shifted", "0.3").replace("Mul(u, g2)", "Mul(g2, u)"), rewrites=1)


def test_follows_the_codes_through_pools_and_layouts():
    pool = "pooled = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (y) halves = Identity (pooled)"
    model = onnx_model(silu(on=pool, read="halves"), **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(1))
    on = "\n        pooled = MaxPool[kernel_shape=[3, 3], pads=[1, 1, 1, 1]](y.shifted)\n        halves = Identity(pooled)"
    check_lowering(SaturateCodes(), model, after=body(241, "y.shifted", "0.3", on), rewrites=1)


def test_drops_a_clip_that_nothing_reaches():
    model = onnx_model(silu(), **STEPS, **ENDS, s4=np.float32(0.6), z4=np.uint8(1))  # SiLU ends at 7.75: the code 14
    check_lowering(SaturateCodes(), model, after=body(1, "y", "0.6"), rewrites=1)


def test_leaves_codes_that_both_ends_would_cut():
    check_lowering(SaturateCodes(), onnx_model(silu(), **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(0)))


def test_leaves_codes_that_a_concat_joins_with_others():
    joined = "two = Concat <axis = 1> (y, y) halves, rest = Split <axis = 1, num_outputs = 2> (two)"
    check_lowering(SaturateCodes(), onnx_model(silu(on=joined, read="halves"), **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(1)))


def test_leaves_codes_that_the_graph_returns():
    text = SILU.format(order="u, g2", tail="end = Clip (wide, lowest, highest)")
    given = {key: value for key, value in STEPS.items() if key not in ("s8", "z8")}
    check_lowering(SaturateCodes(), onnx_model(text, **given, **ENDS, s4=np.float32(0.3), z4=np.uint8(1)))


def test_leaves_another_gate():
    text = silu().replace("Sigmoid (v)", "Tanh (v)")
    check_lowering(SaturateCodes(), onnx_model(text, **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(1)))


def test_leaves_a_product_of_other_codes():
    text = silu().replace("u = DequantizeLinear (x, s, z)", "x2 = MaxPool <kernel_shape = [1, 1]> (x) u = DequantizeLinear (x2, s, z)")
    check_lowering(SaturateCodes(), onnx_model(text, **STEPS, **ENDS, s4=np.float32(0.3), z4=np.uint8(1)))
