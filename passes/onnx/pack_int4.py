"""Stores weights whose codes fit 4 bits two to a byte.

    w = DequantizeLinear(codes int8)   becomes   w = DequantizeLinear(Cast(codes int4, int8))

onnxruntime computes the Cast once, when it loads the file, and then has the same int8 weights and the same kernels. (DequantizeLinear of
int4 itself would run in floats.) Left alone: codes that are not constants, or beyond -8 to 7.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from passes.onnx.model import OnnxPass, Writer, constant_of

LOWEST, HIGHEST = -8, 7


class PackInt4(OnnxPass):
    """Stores weights whose codes fit 4 bits two to a byte."""

    name = "pack-int4"

    def rewrite(self, graph: ir.Model) -> int:
        found = [value for value in graph.graph.initializers.values() if _fits(value)]
        for value in found:
            _pack(graph.graph, value)
        return len(found)


def _fits(value: ir.Value) -> bool:
    codes = constant_of(value)
    if codes is None or value.dtype != ir.DataType.INT8 or codes.ndim < 2 or not codes.size:
        return False  # zero points and ends of codes are no weights
    return bool(codes.min() >= LOWEST and codes.max() <= HIGHEST)


def _pack(graph: ir.Graph, value: ir.Value) -> None:
    codes = constant_of(value)
    assert codes is not None
    uses = tuple(value.uses())
    name = str(value.name)
    value.const_value = ir.Tensor(codes.astype(np.int8).astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=name)
    value.type = ir.TensorType(ir.DataType.INT4)
    order = {node: index for index, node in enumerate(graph)}
    first = min((use.node for use in uses), key=order.__getitem__)
    cast = Writer(graph, first).op("Cast", [value], f"{name}.int8", dtype=ir.DataType.INT8, shape=list(codes.shape), to=ir.DataType.INT8)
    for node, index in uses:
        node.replace_input_with(index, cast)
