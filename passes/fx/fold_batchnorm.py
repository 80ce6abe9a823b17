"""Folds BatchNorm2d into the Conv2d it follows.

    y = BatchNorm2d(Conv2d(x))   becomes   y = Conv2d'(x)
    W' = W * gamma / sqrt(var + eps)       b' = (b - mean) * gamma / sqrt(var + eps) + beta

For float exports and for lowering, never before quantization-aware training. Left alone:
1. a norm of anything else: another kind of layer, a function, a quantizer;
2. a convolution whose output has another reader (one that asks for its shape alone is none, nor is a dead one);
3. a convolution or a norm that is called more than once, or whose parameters are read elsewhere;
4. a norm that uses, or in training mode would use, the statistics of the batch (a convolution computes the same in either mode);
5. a subclass of either, or one with hooks or a parametrization, which may compute something else.
The model that the graph was traced from keeps its own convolution and norm.
"""

import copy
import logging
from collections import Counter
from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from passes.fx.graph import FxPass, living, module_of, node_paths, readers_of_values

logger = logging.getLogger(__name__)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FoldBatchNorm(FxPass):
    """Folds BatchNorm2d into the Conv2d it follows."""

    name = "fold-batchnorm"

    def rewrite(self, graph: GraphModule) -> int:
        calls = Counter(id(module_of(graph, node)) for node in graph.graph.nodes if node.op == "call_module")
        read = _modules_read(graph)
        alive = living(graph)
        paths = node_paths(graph)
        rewrites = 0
        for norm_node in list(graph.graph.nodes):
            norm = module_of(graph, norm_node)
            if not isinstance(norm, NORMS) and norm_node.target is not F.batch_norm:
                continue
            source = norm_node.all_input_nodes[0]
            convolution = module_of(graph, source)
            reason = _why_not(convolution, norm, source, calls, read, alive)
            if reason:
                logger.debug("%s: left %s after %s: %s", self.name, paths[norm_node], paths[source], reason)
                continue
            assert isinstance(convolution, nn.Conv2d)  # for the type checker: another one was a reason
            assert isinstance(norm, nn.BatchNorm2d)
            graph.set_submodule(str(source.target), _folded(convolution, norm))
            norm_node.replace_all_uses_with(source)
            graph.graph.erase_node(norm_node)
            graph.delete_submodule(str(norm_node.target))
            rewrites += 1
        return rewrites


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution of its own that computes both."""
    assert norm.running_mean is not None  # for the type checker: a norm without statistics was refused
    assert norm.running_var is not None
    folded = copy.deepcopy(convolution)
    folded.weight, folded.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return folded


def _why_not(
    convolution: nn.Module | None, norm: nn.Module | None, source: Node, calls: Counter[int], read: Collection[int], alive: Collection[Node]
) -> str:
    """Why a norm cannot be folded, empty where it can."""
    if norm is None:
        return "the norm is a function"
    if convolution is None:
        return "what it norms is made by no module"
    pair: tuple[tuple[nn.Module, type[nn.Module]], ...] = ((convolution, nn.Conv2d), (norm, nn.BatchNorm2d))
    for module, kind in pair:
        if type(module) is not kind:
            return f"{type(module).__name__} is no {kind.__name__}" + (
                ", and may compute something else" if isinstance(module, kind) else ""
            )
        if calls[id(module)] > 1:
            return f"the {kind.__name__} is called {calls[id(module)]} times"
        if id(module) in read:
            return f"the parameters of the {kind.__name__} are read elsewhere"
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            return f"the {kind.__name__} has hooks"
    readers = sum(reader in alive for reader in readers_of_values(source))
    if readers > 1:
        return f"the convolution's output has {readers} readers"
    if norm.training:
        return "the norm is in training mode"
    if not isinstance(norm.running_mean, Tensor):
        return "the norm uses the statistics of the batch"
    return ""


def _modules_read(graph: GraphModule) -> set[int]:
    """The modules, by identity, that a node takes an attribute of."""
    found: set[int] = set()
    for node in graph.graph.find_nodes(op="get_attr"):
        here: object = graph
        for part in str(node.target).split("."):
            here = getattr(here, part)
            found.add(id(here))
    return found
