"""Computes in 16-bit floats between the inputs and the outputs, which keep 32.

    y = f(x, w)   becomes   y = Cast(f'(Cast(x, float16), w'), float)

Numbers too small for 16 bits, such as what keeps a divisor from 0, become the smallest there is. Left alone: integers, and the factors that
a Resize takes, which are 32-bit floats in any model.
"""

import numpy as np
import onnx_ir as ir

from passes.onnx.model import OnnxPass, Writer

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
SMALLEST, LARGEST = float(np.finfo(np.float16).smallest_subnormal), float(np.finfo(np.float16).max)
RESIZE_FACTORS = 2  # the input of Resize that they are


class HalfPrecision(OnnxPass):
    """Computes in 16-bit floats between the inputs and the outputs."""

    name = "half-precision"

    def rewrite(self, graph: ir.Model) -> int:
        body = graph.graph
        stored = [value for value in body.initializers.values() if value.dtype == FLOAT and not _is_resize_factor(value)]
        if not stored:
            return 0
        nodes = list(body)
        for value in stored:
            _halve(value)
        for node in nodes:
            for made in node.outputs:
                if made.dtype == FLOAT:
                    made.type = ir.TensorType(HALF)
        for given in [value for value in body.inputs if value.dtype == FLOAT]:
            uses = tuple(given.uses())
            cast = Writer(body, nodes[0]).op("Cast", [given], f"{given.name}.half", dtype=HALF, shape=list(given.shape or ()), to=HALF)
            for node, index in uses:
                node.replace_input_with(index, cast)
        for index, end in enumerate(body.outputs):
            if end.dtype == HALF:
                name, end.name = str(end.name), f"{end.name}.half"
                body.outputs[index] = Writer(body).op("Cast", [end], name, dtype=FLOAT, shape=list(end.shape or ()), to=FLOAT)
        return len(stored)


def _is_resize_factor(value: ir.Value) -> bool:
    return any(use.node.op_type == "Resize" and use.idx == RESIZE_FACTORS for use in value.uses())


def _halve(value: ir.Value) -> None:
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    kept = np.where((numbers != 0) & (np.abs(numbers) < SMALLEST), np.copysign(SMALLEST, numbers), np.clip(numbers, -LARGEST, LARGEST))
    value.const_value = ir.Tensor(kept.astype(np.float16), name=value.name)
    value.type = ir.TensorType(HALF)
