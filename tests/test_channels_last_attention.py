import numpy as np
from checks import check_lowering, onnx_model, optimised_kinds

from passes.onnx.channels_last_attention import ChannelsLastAttention

HEADS, TEXTS, WIDTH = 2, 5, 4
# the scores of two heads, what they weigh, and the product with another map
ATTENTION = """
    g (uint8[{batch},8,3,4] x, uint8[{batch},8,3,4] p{input}) => (uint8[n,8,h,w] y) {{
        xh = Reshape (x, by_head)
        v = DequantizeLinear (xh, s, z)
        guide = DequantizeLinear <axis = 1> (texts, st{zt})
        scores = MatMul (guide, v)
        best = ReduceMax <keepdims = 0> (scores, two)
        scaled = Mul (best, factor)
        b = DequantizeLinear <axis = 0> (bias, bs)
        added = Add (scaled, b)
        codes = QuantizeLinear (added, sa, za)
        w1 = DequantizeLinear (codes, sa, za)
        w2 = Sigmoid (w1)
        weights = QuantizeLinear (w2, sg, zg)
        wh = Reshape (weights, apart)
        w3 = DequantizeLinear (wh, sg, zg)
        ph = Reshape (p, by_head)
        p1 = DequantizeLinear (ph, s, z)
        gate = Mul (p1, w3)
        gated = QuantizeLinear (gate, so, zo)
        y = Reshape (gated, whole)
    }}
"""
S, FACTOR, ST = np.float32(0.02), np.float32(0.5), np.float32([0.01, 0.03])
GUIDE = np.random.default_rng(0).integers(-60, 60, (1, HEADS, TEXTS, WIDTH), dtype=np.int8)
GIVEN = {
    "s": S, "z": np.uint8(110), "st": ST, "factor": FACTOR, "bias": np.int32([[300], [-500]]), "bs": S * ST * FACTOR, "two": np.int64([2]),
    "sa": np.float32(0.05), "za": np.uint8(120), "sg": np.float32(1 / 255), "zg": np.uint8(0), "so": np.float32(0.02), "zo": np.uint8(110),
}  # fmt: skip


def attention(batch: int, guides: int = 1, **constants: np.ndarray):
    shapes = {"by_head": np.int64([batch, HEADS, WIDTH, 12]), "apart": np.int64([batch, HEADS, 1, 12]), "whole": np.int64([batch, 8, 3, 4])}
    runtime = "texts" not in constants
    text = ATTENTION.format(batch=batch, input=f", int8[{guides},2,5,4] texts" if runtime else "", zt="")
    return onnx_model(text, **{**GIVEN, **shapes, **constants})


GATE = """w2.maps = DequantizeLinear(codes.nhwc, float32(0.05), uint8(120))
            w2.last = Sigmoid(w2.maps)
            weights.nhwc = QuantizeLinear(w2.last, float32(0.00392157), uint8(0))
            gate.maps.last = Transpose[perm=[0, 2, 3, 1]](p)
            gate.heads.codes = Reshape(gate.maps.last, int64[0, 0, 0, 2, 4])
            gate.weights.codes = Unsqueeze(weights.nhwc, int64[4])
            gate.heads.values = DequantizeLinear(gate.heads.codes, float32(0.02), uint8(110))
            gate.weights = DequantizeLinear(gate.weights.codes, float32(0.00392157), uint8(0))
            gate.last = Mul(gate.heads.values, gate.weights)
            gate.last.codes = QuantizeLinear(gate.last, float32(0.02), uint8(110))
            gated.nhwc = Reshape(gate.last.codes, int64[0, 0, 0, 8])
            y = Transpose[perm=[0, 3, 1, 2]](gated.nhwc)
            return y: uint8[{batch}, 8, 3, 4]"""


CONVOLVED = """
            x: uint8[{batch}, 8, 3, 4] = input
            p: uint8[{batch}, 8, 3, 4] = input{text_input}
            texts.kernels = Reshape({texts}, int64[10, 4, 1, 1])
            best.weight = DequantizeLinear[axis=0](texts.kernels, float32[10])
            best.maps = DequantizeLinear(x, float32(0.02), uint8(110))
            bias.texts = Expand(int32[300, -500], int64[2, 5])
            bias.row = Reshape(bias.texts, int64[-1])
            best.bias = DequantizeLinear[axis=0](bias.row, float32[10])
            best.scores = Conv[group=2](best.maps, best.weight, best.bias)
            best.scores.codes = QuantizeLinear(best.scores, float32(0.05), uint8(120))
            best.scores.last = Transpose[perm=[0, 2, 3, 1]](best.scores.codes)
            best.scores.texts = Reshape(best.scores.last, int64[0, 0, 0, 2, 5])
            codes.nhwc = ReduceMax[keepdims=0](best.scores.texts, int64[4])
            """


def test_writes_a_constant_guide_as_a_convolution(tmp_path):
    after = CONVOLVED.format(batch=2, texts="int8[1x2x5x4]", text_input="") + GATE.format(batch=2)
    model = check_lowering(ChannelsLastAttention(), attention(2, texts=GUIDE), after=after, rewrites=3)
    kinds = optimised_kinds(model, tmp_path)
    assert (kinds["QLinearConv"], kinds["QLinearSigmoid"], kinds["QLinearMul"]) == (1, 1, 1)
    assert not {"Conv", "MatMul", "Sigmoid", "Mul", "QuantizeLinear", "DequantizeLinear"} & kinds.keys()


def test_writes_a_guide_that_is_computed_as_a_convolution_where_there_is_one_for_the_batch(tmp_path):
    for batch in (1, 2):
        after = CONVOLVED.format(batch=batch, texts="texts", text_input="\n            texts: int8[1, 2, 5, 4] = input") + GATE.format(
            batch=batch
        )
        model = check_lowering(ChannelsLastAttention(), attention(batch), after=after, rewrites=3)
        kinds = optimised_kinds(model, tmp_path)
        assert kinds["QLinearConv"] == 1
        assert not {"Conv", "MatMul", "MatMulIntegerToFloat", "Add", "Mul", "QuantizeLinear", "DequantizeLinear"} & kinds.keys()


def test_multiplies_guides_of_their_own_head_by_head(tmp_path):
    model = attention(2, guides=2)
    kinds = [node.op_type for node in ChannelsLastAttention()(model).graph.graph]
    assert kinds.count("MatMul") == HEADS
    model = check_lowering(ChannelsLastAttention(), attention(2, guides=2), after=RUNTIME + GATE.format(batch=2), rewrites=3)
    found = optimised_kinds(model, tmp_path)
    assert found["MatMulIntegerToFloat"] == HEADS
    assert "MatMul" not in found


RUNTIME = """
            x: uint8[2, 8, 3, 4] = input
            p: uint8[2, 8, 3, 4] = input
            texts: int8[2, 2, 5, 4] = input
            best.maps.last = Transpose[perm=[0, 2, 3, 1]](x)
            best.places.codes = Reshape(best.maps.last, int64[0, -1, 8])
            best.0.codes, best.1.codes = Split[axis=2](best.places.codes, int64[4, 4])
            guide.0.split, guide.1.split = Split[axis=1](texts, int64[1, 1])
            best.0.guide = Squeeze(guide.0.split, int64[1])
            best.0.guide.turned = Transpose[perm=[0, 2, 1]](best.0.guide)
            best.0.guide.values = DequantizeLinear(best.0.guide.turned, float32(0.01), int8(0))
            best.0.values = DequantizeLinear(best.0.codes, float32(0.02), uint8(110))
            best.0.scores = MatMul(best.0.values, best.0.guide.values)
            best.0.best = ReduceMax[keepdims=1](best.0.scores, int64[2])
            best.1.guide = Squeeze(guide.1.split, int64[1])
            best.1.guide.turned = Transpose[perm=[0, 2, 1]](best.1.guide)
            best.1.guide.values = DequantizeLinear(best.1.guide.turned, float32(0.03), int8(0))
            best.1.values = DequantizeLinear(best.1.codes, float32(0.02), uint8(110))
            best.1.scores = MatMul(best.1.values, best.1.guide.values)
            best.1.best = ReduceMax[keepdims=1](best.1.scores, int64[2])
            best.best = Concat[axis=2](best.0.best, best.1.best)
            best.scaled = Mul(best.best, float32(0.5))
            bias.row = Reshape(int32[300, -500], int64[2])
            best.bias = DequantizeLinear[axis=0](bias.row, float32[0.0001, 0.0003])
            best.shifted = Add(best.scaled, best.bias)
            best.places_codes = QuantizeLinear(best.shifted, float32(0.05), uint8(120))
            codes.nhwc = Reshape(best.places_codes, int64[0, 3, 4, 2])
            """


def test_leaves_a_guide_of_floats():
    text = ATTENTION.format(batch=2, input=", float[1,2,5,4] texts", zt="").replace(
        "guide = DequantizeLinear <axis = 1> (texts, st)", "guide = Identity (texts)"
    )
    shapes = {"by_head": np.int64([2, HEADS, WIDTH, 12]), "apart": np.int64([2, HEADS, 1, 12]), "whole": np.int64([2, 8, 3, 4])}
    check_lowering(ChannelsLastAttention(), onnx_model(text, **{key: value for key, value in GIVEN.items() if key != "st"}, **shapes))


def test_leaves_a_bias_of_floats():
    text = ATTENTION.format(batch=2, input="", zt="").replace("b = DequantizeLinear <axis = 0> (bias, bs)", "b = Identity (bias)")
    shapes = {"by_head": np.int64([2, HEADS, WIDTH, 12]), "apart": np.int64([2, HEADS, 1, 12]), "whole": np.int64([2, 8, 3, 4])}
    given = {**GIVEN, "bias": np.float32([[0.1], [-0.2]])}
    check_lowering(
        ChannelsLastAttention(), onnx_model(text, **{key: value for key, value in given.items() if key != "bs"}, **shapes, texts=GUIDE)
    )


def test_gives_readers_that_are_not_moved_the_layout_they_had():
    text = """
        g (uint8[2,8,3,4] x) => (uint8[2,2,12] codes) {
            xh = Reshape (x, by_head)
            v = DequantizeLinear (xh, s, z)
            guide = DequantizeLinear <axis = 1> (texts, st)
            scores = MatMul (guide, v)
            best = ReduceMax <keepdims = 0> (scores, two)
            codes = QuantizeLinear (best, sa, za)
        }
    """
    needed = ("s", "z", "st", "two", "sa", "za")
    model = onnx_model(text, texts=GUIDE, by_head=np.int64([2, HEADS, WIDTH, 12]), **{key: GIVEN[key] for key in needed})
    check_lowering(
        ChannelsLastAttention(),
        model,
        after="""
            x: uint8[2, 8, 3, 4] = input
            texts.kernels = Reshape(int8[1x2x5x4], int64[10, 4, 1, 1])
            best.weight = DequantizeLinear[axis=0](texts.kernels, float32[10])
            best.maps = DequantizeLinear(x, float32(0.02), uint8(110))
            best.scores = Conv[group=2](best.maps, best.weight)
            best.scores.codes = QuantizeLinear(best.scores, float32(0.05), uint8(120))
            best.scores.last = Transpose[perm=[0, 2, 3, 1]](best.scores.codes)
            best.scores.texts = Reshape(best.scores.last, int64[0, 0, 0, 2, 5])
            codes.nhwc = ReduceMax[keepdims=0](best.scores.texts, int64[4])
            codes.first = Transpose[perm=[0, 3, 1, 2]](codes.nhwc)
            codes = Reshape(codes.first, int64[2, 2, -1])
            return codes: uint8[2, 2, 12]
        """,
        rewrites=1,
    )
