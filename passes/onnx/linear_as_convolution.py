"""Writes a linear layer on codes as a 1x1 convolution of its tokens: the integer product that takes a bias.

    codes = Q(MatMul(x, W^T) + b)    becomes   codes = Q(Conv(x', W [O,I,1,1], b)),   x [B,N,I] as a map x' [B,I,N,1]
    y = MatMul(x, W^T) of floats     becomes   y = MatMul(x, DequantizeLinear(Transpose(codes of W)))

The second is for what is not written to codes of the type of x, so that the weight is turned when the file is loaded and not in each run,
and so that the product, whatever is added to it, is one of integers.
Left alone: a weight that is not stored as codes, and tokens that are not in three axes.
"""

import onnx_ir as ir

from passes.onnx.codes import CHANNELS_FIRST, CHANNELS_LAST, Read, Written, dequantize, dims, read, written
from passes.onnx.model import OnnxPass, Writer, constant_of, drop_dead, made_by, only_reader, replace

TOKEN_AXES = 3


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
        bias = next((each for value in added.inputs if (each := read(value)) is not None and each.codes.dtype == ir.DataType.INT32), None)
    end = product.outputs[0] if bias is None or added is None else added.outputs[0]
    codes = written(end)
    shape = None if x is None else dims(x.codes)
    if (
        x is None
        or codes is None
        or shape is None
        or len(shape) != TOKEN_AXES
        or x.axis is not None
        or not codes.scalar
        or codes.codes.dtype != x.codes.dtype
    ):
        _turn_codes(graph, product, weight)
        if bias is not None and added is not None:
            _lift_bias(graph, added, bias, len(dims(product.outputs[0]) or ()))
    else:
        _convolve(graph, product, x, weight, bias, codes)
    return True


def _turn_codes(graph: ir.Graph, product: ir.Node, weight: Read) -> None:
    write, name = Writer(graph, product), str(weight.codes.name)
    shape = list(reversed(dims(weight.codes) or ()))
    codes = write.op("Transpose", [weight.codes], f"{name}.transposed", dtype=weight.codes.dtype, shape=shape, perm=[1, 0])
    attributes = {} if weight.axis is None else {"axis": 1 - weight.axis}
    read_again = write.op(
        "DequantizeLinear",
        [codes, *weight.node.inputs[1:]],
        f"{weight.name}.transposed#2",
        dtype=ir.DataType.FLOAT,
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
    values = write.op(
        "DequantizeLinear", [codes, *bias.node.inputs[1:]], f"{bias.name}.lifted", dtype=ir.DataType.FLOAT, shape=shape, axis=axes - 1
    )
    added.replace_input_with(next(index for index, value in enumerate(added.inputs) if value is bias.node.outputs[0]), values)


def _convolve(graph: ir.Graph, product: ir.Node, x: Read, weight: Read, bias: Read | None, codes: Written) -> None:
    made = codes.codes
    made_node = made.producer()
    assert made_node is not None
    write, name = Writer(graph, made_node), str(product.outputs[0].name).removesuffix(".product")
    batch, tokens, inputs = dims(x.codes) or ()
    outputs = (dims(weight.codes) or ())[0]
    axis = write.numbers(f"{name}.token_axis", 2)
    unit = write.op("Unsqueeze", [x.codes, axis], f"{name}.map.last", dtype=x.codes.dtype, shape=[batch, tokens, 1, inputs])
    as_map = write.op("Transpose", [unit], f"{name}.map", dtype=x.codes.dtype, shape=[batch, inputs, tokens, 1], perm=CHANNELS_FIRST)
    floats = dequantize(write, as_map, x, f"{name}.map.values", [batch, inputs, tokens, 1])
    kernel = write.op(
        "Unsqueeze",
        [weight.codes, write.numbers(f"{name}.kernel_axes", 2, 3)],
        f"{weight.codes.name}.kernel",
        dtype=weight.codes.dtype,
        shape=[outputs, inputs, 1, 1],
    )
    attributes = {} if weight.axis is None else {"axis": weight.axis}
    kernels = write.op(
        "DequantizeLinear",
        [kernel, *weight.node.inputs[1:]],
        f"{weight.name}.kernel",
        dtype=ir.DataType.FLOAT,
        shape=[outputs, inputs, 1, 1],
        **attributes,
    )
    given = [floats, kernels] if bias is None else [floats, kernels, bias.node.outputs[0]]
    convolved = write.op("Conv", given, f"{name}.convolved", dtype=ir.DataType.FLOAT, shape=[batch, outputs, tokens, 1])
    first = codes.again(write, convolved, f"{made.name}.map", [batch, outputs, tokens, 1])
    last = write.op("Transpose", [first], f"{made.name}.map.last", dtype=made.dtype, shape=[batch, tokens, 1, outputs], perm=CHANNELS_LAST)
    flat = write.op("Squeeze", [last, axis], f"{made.name}.tokens", dtype=made.dtype, shape=[batch, tokens, outputs])
    replace(made, flat)
