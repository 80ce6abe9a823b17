"""BatchNorms whose statistics can be frozen so that they stay: `.train()` leaves a frozen one in evaluation mode."""

from typing import Self

from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _NormBase

from crqat_fx.errors import UserError
from passes.fx.graph import module_of


class BatchNorm1d(nn.BatchNorm1d):
    frozen = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class BatchNorm2d(nn.BatchNorm2d):
    frozen = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class BatchNorm3d(nn.BatchNorm3d):
    frozen = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


FREEZABLE: dict[type[nn.Module], type[BatchNorm1d] | type[BatchNorm2d] | type[BatchNorm3d]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def make_norms_freezable(graph: GraphModule) -> None:
    """Swaps every BatchNorm that is called by itself. Other modules that keep statistics are refused: nothing could hold them still."""
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if not isinstance(module, _NormBase) or type(module) in FREEZABLE.values():
            continue
        if type(module) in FREEZABLE:
            swapped = FREEZABLE[type(module)](module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            swapped.load_state_dict(module.state_dict(), assign=True)
            if module.affine:
                swapped.weight, swapped.bias = module.weight, module.bias
            graph.set_submodule(str(node.target), swapped.train(module.training))
        elif module.track_running_stats:
            raise UserError(
                f"is a {type(module).__name__}, whose statistics cannot be frozen", where=str(node.target), remedy="use a BatchNorm"
            )
