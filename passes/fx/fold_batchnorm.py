"""Folds BatchNorm2d into the Conv2d it follows.

    y = BatchNorm2d(Conv2d(x))   becomes   y = Conv2d'(x)
    W' = W * gamma / sqrt(var + eps)       b' = (b - mean) * gamma / sqrt(var + eps) + beta

For float exports and for lowering, never before quantization-aware training. Left alone:
1. a convolution whose output has another reader (one that asks for its shape alone is none);
2. a convolution or a norm that is called more than once;
3. a norm that uses, or in training mode would use, the statistics of the batch;
4. a subclass of either, which may compute something else.
The model that the graph was traced from keeps its own convolution and norm.
"""

import logging
from collections import Counter

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from passes.fx.graph import FxPass, module_of, readers_of_values

logger = logging.getLogger(__name__)


class FoldBatchNorm(FxPass):
    """Folds BatchNorm2d into the Conv2d it follows."""

    name = "fold-batchnorm"

    def rewrite(self, graph: GraphModule) -> int:
        calls = Counter(id(module_of(graph, node)) for node in graph.graph.nodes if node.op == "call_module")
        rewrites = 0
        for norm_node in list(graph.graph.nodes):
            norm = module_of(graph, norm_node)
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            (source,) = norm_node.all_input_nodes
            convolution = module_of(graph, source)
            if not isinstance(convolution, nn.Conv2d):
                continue
            reason = _why_not(convolution, norm, source, calls)
            if reason:
                logger.debug("%s: left %s after %s: %s", self.name, norm_node.target, source.target, reason)
                continue
            graph.set_submodule(str(source.target), fuse_conv_bn_eval(convolution, norm))
            norm_node.replace_all_uses_with(source)
            graph.graph.erase_node(norm_node)
            rewrites += 1
        graph.delete_all_unused_submodules()
        return rewrites


def _why_not(convolution: nn.Conv2d, norm: nn.BatchNorm2d, source: Node, calls: Counter[int]) -> str:
    """Why a norm cannot be folded, empty where it can."""
    readers = len(readers_of_values(source))
    if readers > 1:
        return f"the convolution's output has {readers} readers"
    for module in (convolution, norm):
        if calls[id(module)] > 1:
            return f"the {type(module).__name__} is called {calls[id(module)]} times"
    if convolution.training or norm.training:
        return "training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "the norm uses the statistics of the batch"
    if type(convolution) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return f"{type(convolution).__name__} and {type(norm).__name__} may compute something else"
    return ""
