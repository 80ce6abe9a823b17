"""Folds a product with a positive number into the scale that codes are read with.

    y = DequantizeLinear(codes, s) f   becomes   y = DequantizeLinear(codes, s f)

so that nothing stands between the codes and an integer kernel. Left alone: values that something else reads besides, and factors that are
not one positive number.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from passes.onnx.codes import read
from passes.onnx.model import OnnxPass, constant_of, drop_dead


class FoldFactor(OnnxPass):
    """Folds a product with a positive number into the scale that codes are read with."""

    name = "fold-factor"

    def rewrite(self, graph: ir.Model) -> int:
        # the matcher takes the factor on either side, and refuses values between that are read besides
        found = RewriteRuleSet([RewriteRule(_product, _folded, _foldable)], commute=True).apply_to_model(graph)
        drop_dead(graph)
        return found


def _product(op: Any, factor: Any) -> Any:
    return op.Mul(op.DequantizeLinear(_allow_other_inputs=True, _outputs=["x"]), factor, _outputs=["y"])


def _foldable(context: Any, x: ir.Value, factor: ir.Value, y: ir.Value) -> bool:
    codes, number = read(x), constant_of(factor)
    return codes is not None and codes.axis is None and number is not None and number.ndim == 0 and bool(number > 0)


def _folded(op: Any, x: ir.Value, factor: ir.Value, y: ir.Value) -> Any:
    codes, number = read(x), constant_of(factor)
    assert codes is not None
    assert number is not None
    scale = op.initializer(ir.Tensor((codes.scale * number).astype(np.float32)), f"{y.name}.scale")
    return op.DequantizeLinear(codes.codes, scale, *codes.node.inputs[2:], _name=f"{y.name}.values")
