"""Writes a linear layer on codes as a 1x1 convolution of its tokens: the integer product that takes a bias.

    codes = Q(MatMul(x, W^T) + b)    becomes   codes = Q(Conv(x', W [O,I,1,1], b)),   x [B,N,I] as a map x' [B,I,N,1]
    codes = Q_h(Transpose(Reshape(MatMul(x, W^T) + b)))     heads [B,m,N,c], signed, with a scale s_h each
    becomes   codes = Transpose(Reshape(Q(Conv(x', W / s_h, b / s_h), scale 1, zero point 128) - 128))
    y = MatMul(x, W^T) of floats     becomes   y = MatMul(x, DequantizeLinear(Transpose(codes of W)))

The second is an integer product as well: what its sums are divided by has a scale a channel, and so takes in those of heads; it writes
unsigned codes, of which 128 is taken in integers. The third is for what is not written to codes, so that the weight is turned when the file
is loaded and not in each run, and so that the product, whatever is added to it, is one of integers.
Left alone: a weight that is not stored as codes, and tokens that are not in three axes.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.onnx.codes import CHANNELS_FIRST, CHANNELS_LAST, Read, Written, dequantize, dims, read, written
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by, only_reader, replace

FLOAT, UINT8, INT8, INT32 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32
HEADS_FIRST = [0, 2, 1, 3]  # of [B,N,m,c]
TOKEN_AXES = 3
MIDDLE = 128  # what 0 of a signed code is of an unsigned one


@dataclass(frozen=True)
class _Heads:
    """Signed codes [B,m,N,c], made of a value [B,N,C] by a reshape and a transpose, with a scale for each of m heads."""

    reshape: ir.Node
    codes: Written
    scales: ir.Value
    count: int
    width: int


class LinearAsConvolution(OnnxPass):
    """Writes a linear layer on codes as a 1x1 convolution of its tokens."""

    name = "linear-as-convolution"

    def rewrite(self, graph: ir.Model) -> int:
        found = sum(_rewritten(graph.graph, node) for node in list(graph.graph) if node.op_type == "MatMul")
        drop_dead(graph)
        return found


def _rewritten(graph: ir.Graph, product: ir.Node) -> bool:
    turned = made_by(product.inputs[1], "Transpose")
    weight = None if turned is None else read(turned.inputs[0])
    if weight is None or constant_of(weight.codes) is None or len(weight.codes.shape or ()) != 2:
        return False
    x = read(product.inputs[0])
    added = only_reader(product.outputs[0])
    bias = None
    if added is not None and added.op_type == "Add":
        bias = next((each for value in added.inputs if (each := read(value)) is not None and each.codes.dtype == INT32), None)
    end = product.outputs[0] if bias is None or added is None else added.outputs[0]
    codes, heads = written(end), _heads(end)
    shape = None if x is None else dims(x.codes)
    if x is not None and x.axis is None and shape is not None and len(shape) == TOKEN_AXES:
        if codes is not None and codes.scalar and codes.codes.dtype == x.codes.dtype:
            _convolve(graph, product, x, weight, bias, codes)
            return True
        if heads is not None and x.codes.dtype == UINT8 and weight.axis in (None, 0):
            _convolve_heads(graph, product, x, weight, bias, heads)
            return True
    _turn_codes(graph, product, weight)
    if bias is not None and added is not None:
        _lift_bias(graph, added, bias, len(dims(product.outputs[0]) or ()))
    return True


def _heads(end: ir.Value) -> _Heads | None:
    """How a value [B,N,C] is written to codes of heads."""
    reshape = only_reader(end)
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is not end:
        return None
    turned, shape = only_reader(reshape.outputs[0]), dims(reshape.outputs[0])
    if turned is None or turned.op_type != "Transpose" or list(turned.attributes.get_ints("perm", [])) != HEADS_FIRST or shape is None:
        return None
    codes, (_, _, count, width) = written(turned.outputs[0]), shape
    if codes is None or codes.codes.dtype != INT8 or count is None or width is None:
        return None
    _, scales, *zeros = codes.quantize.inputs
    known, axis = constant_of(scales), codes.quantize.attributes.get_int("axis", 1)
    whole = [constant_of(each) for each in zeros]
    if scales is None or known is None or known.shape != (count,) or axis != 1 or any(each is None or each.any() for each in whole):
        return None
    return _Heads(reshape, codes, scales, count, width)


def _turn_codes(graph: ir.Graph, product: ir.Node, weight: Read) -> None:
    write, name = Writer(graph, product), str(weight.codes.name)
    shape = list(reversed(dims(weight.codes) or ()))
    codes = write.op("Transpose", [weight.codes], f"{name}.transposed", dtype=weight.codes.dtype, shape=shape, perm=[1, 0])
    attributes = {} if weight.axis is None else {"axis": 1 - weight.axis}
    read_again = write.op(
        "DequantizeLinear",
        [codes, *weight.node.inputs[1:]],
        f"{weight.name}.transposed#2",
        dtype=FLOAT,
        shape=shape,
        **attributes,
    )
    product.replace_input_with(1, read_again)


def _lift_bias(graph: ir.Graph, added: ir.Node, bias: Read, axes: int) -> None:
    """A bias of as many axes as the product: one of a single axis would make onnxruntime join both into a Gemm of floats."""
    if bias.axis != 0 or axes < TOKEN_AXES:
        return
    write, name, shape = Writer(graph, added), str(bias.codes.name), [1] * (axes - 1) + [len(bias.scale)]
    codes = write.op("Reshape", [bias.codes, write.numbers(f"{name}.shape", *shape)], f"{name}.lifted", dtype=bias.codes.dtype, shape=shape)
    values = write.op("DequantizeLinear", [codes, *bias.node.inputs[1:]], f"{bias.name}.lifted", dtype=FLOAT, shape=shape, axis=axes - 1)
    added.replace_input_with(next(index for index, value in enumerate(added.inputs) if value is bias.node.outputs[0]), values)


def _convolve(graph: ir.Graph, product: ir.Node, x: Read, weight: Read, bias: Read | None, codes: Written) -> None:
    made = codes.codes
    write, name = _writer(graph, made, product)
    convolved = _convolution(write, name, x, weight, weight.node.inputs[1], None if bias is None else bias.node.outputs[0])
    first = codes.again(write, convolved, f"{made.name}.map", convolved.shape)
    replace(made, _tokens(write, name, first, str(made.name)))


def _convolve_heads(graph: ir.Graph, product: ir.Node, x: Read, weight: Read, bias: Read | None, heads: _Heads) -> None:
    made, channels = heads.codes.codes, heads.count * heads.width
    write, name = _writer(graph, made, product)
    path = str(made.name)
    column = write.op("Unsqueeze", [heads.scales, write.numbers(f"{path}.width_axis", 1)], f"{path}.head_scales", dtype=FLOAT)
    spread = write.op("Expand", [column, write.numbers(f"{path}.heads", heads.count, heads.width)], f"{path}.spread", dtype=FLOAT)
    flat = write.op("Reshape", [spread, write.numbers(f"{path}.flat", -1)], f"{path}.channel_scales", dtype=FLOAT, shape=[channels])
    scale = write.op("Div", [weight.node.inputs[1], flat], f"{name}.weight_scale.heads", dtype=FLOAT, shape=[channels])
    shift = None
    if bias is not None:
        step = write.op("Mul", [x.node.inputs[1], scale], f"{name}.bias_scale.heads", dtype=FLOAT, shape=[channels])
        shift = write.op("DequantizeLinear", [bias.codes, step], f"{bias.name}.heads", dtype=FLOAT, shape=[channels], axis=0)
    convolved = _convolution(write, name, x, weight, scale, shift)
    one, middle = write.scalar(f"{path}.one", 1), write.constant(f"{path}.middle", np.array(MIDDLE, np.uint8))
    first = write.op("QuantizeLinear", [convolved, one, middle], f"{path}.unsigned.map", dtype=UINT8, shape=convolved.shape)
    tokens = _tokens(write, name, first, f"{path}.unsigned")
    shape = tokens.shape
    wide = write.op("Cast", [tokens], f"{path}.wide", dtype=INT32, shape=shape, to=INT32.value)
    less = write.op(
        "Sub", [wide, write.constant(f"{path}.less", np.array(MIDDLE, np.int32))], f"{path}.less_middle", dtype=INT32, shape=shape
    )
    signed = write.op("Cast", [less], f"{path}.signed", dtype=INT8, shape=shape, to=INT8.value)
    if heads.codes.clip is not None:
        signed = write.op("Clip", [signed, *heads.codes.clip.inputs[1:]], f"{path}.clipped", dtype=INT8, shape=shape)
    apart = write.op("Reshape", [signed, heads.reshape.inputs[1]], f"{path}.apart", dtype=INT8, shape=heads.reshape.outputs[0].shape)
    replace(made, write.op("Transpose", [apart], f"{path}.turned", dtype=INT8, shape=made.shape, perm=HEADS_FIRST))


def _writer(graph: ir.Graph, made: ir.Value, product: ir.Node) -> tuple[Writer, str]:
    before = made.producer()
    assert before is not None
    return Writer(graph, before), str(product.outputs[0].name).removesuffix(".product")


def _convolution(write: Writer, name: str, x: Read, weight: Read, scale: ir.Value | None, bias: ir.Value | None) -> ir.Value:
    """The product [B,O,N,1] of tokens as a map; `scale` is that of the weight's codes."""
    batch, tokens, inputs = dims(x.codes) or ()
    outputs = (dims(weight.codes) or ())[0]
    apart = write.numbers(f"{name}.map.shape", 0, 0, 1, int(inputs or 0))  # a reshape: through an Unsqueeze onnxruntime moves transposes
    unit = write.op("Reshape", [x.codes, apart], f"{name}.map.last", dtype=x.codes.dtype, shape=[batch, tokens, 1, inputs])
    as_map = write.op("Transpose", [unit], f"{name}.map", dtype=x.codes.dtype, shape=[batch, inputs, tokens, 1], perm=CHANNELS_FIRST)
    floats = dequantize(write, as_map, x, f"{name}.map.values", [batch, inputs, tokens, 1])
    shape, kernel_axes = [outputs, inputs, 1, 1], write.numbers(f"{name}.kernel_axes", 2, 3)
    kernel = write.op("Unsqueeze", [weight.codes, kernel_axes], f"{weight.codes.name}.kernel", dtype=weight.codes.dtype, shape=shape)
    attributes = {} if scale is None or scale.shape is None or not len(scale.shape) else {"axis": 0}
    kernels = write.op("DequantizeLinear", [kernel, scale], f"{weight.name}.kernel", dtype=FLOAT, shape=shape, **attributes)
    given = [floats, kernels] if bias is None else [floats, kernels, bias]
    return write.op("Conv", given, f"{name}.convolved", dtype=FLOAT, shape=[batch, outputs, tokens, 1])


def _tokens(write: Writer, name: str, codes: ir.Value, path: str) -> ir.Value:
    """Codes [B,O,N,1] of a map as those of tokens [B,N,O]."""
    batch, outputs, tokens, _ = dims(codes) or ()
    last = write.op("Transpose", [codes], f"{path}.map.last", dtype=codes.dtype, shape=[batch, tokens, 1, outputs], perm=CHANNELS_LAST)
    together = write.numbers(f"{name}.tokens.shape", 0, 0, int(outputs or 0))
    return write.op("Reshape", [last, together], f"{path}.tokens", dtype=codes.dtype, shape=[batch, tokens, outputs])
