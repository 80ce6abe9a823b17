"""mark-stages: the partition equals the module names' on every preset, and is told without them."""

import copy
import logging

import pytest
import torch
from checks import check_golden, check_pass
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from crqat_fx.models import yolo_world
from crqat_fx.models.yolo_world import SIZES, Concat, build
from crqat_fx.pipelines import mark_stages, passes_in_order, prepare_passes
from crqat_fx.trace import LEAVES, LeafTracer, trace_unproved
from passes.base import PassError
from passes.fx.graph import STAGE, format_graph, owners_of
from passes.fx.mark_stages import stages_of
from passes.fx.mark_whole import MarkWhole

PARTS = {"backbone": "backbone", "neck": "neck", "bbox_head": "head"}  # what the module names say
TWO = {"backbone": "backbone", "neck": "neck-head", "head": "neck-head"}


def traced_on_meta(size: str, version: int) -> GraphModule:
    with torch.device("meta"):
        return trace_unproved(build(size, version))


def truth(graph: GraphModule) -> dict[str, str]:
    """The stage of every node that stands in a module, by the first part of its path."""
    owned = {
        node.name: next(iter(owners_of(node)), str(node.target)) for node in graph.graph.nodes if node.op not in ("placeholder", "output")
    }
    return {name: PARTS[path.partition(".")[0]] for name, path in owned.items()}


def marks(graph: GraphModule) -> dict[str, str]:
    return {node.name: node.meta[STAGE] for node in graph.graph.nodes}


class Quantizer(nn.Module):
    is_quantizer = True

    def forward(self, x: Tensor) -> Tensor:
        return x


def renamed(graph: GraphModule) -> tuple[GraphModule, dict[str, str]]:
    """The same graph with every node, module and parameter called otherwise, and no record of the names that were."""
    other, names = torch.fx.Graph(), {}
    root = nn.Module()
    modules: dict[int, str] = {}
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for number, node in enumerate(graph.graph.nodes):
        copies[node] = other.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            copies[node].target = modules.setdefault(id(module), f"thing{number}")
            root.add_module(copies[node].target, module)
        if node.op == "get_attr":
            owner, _, last = node.target.rpartition(".")
            copies[node].target = f"value{number}"
            root.register_parameter(f"value{number}", getattr(graph.get_submodule(owner), last))
        if node.op == "placeholder":
            copies[node].target = f"given{number}"
        copies[node]._rename(f"node_{len(copies) * 7919 % 10007}")
        names[copies[node].name] = node.name
    return GraphModule(root, other), names


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_module_names(size, version):
    graph = traced_on_meta(size, version)
    expected = truth(graph)
    assert set(expected.values()) == {"backbone", "neck", "head"}
    assert prepare_passes(3)(graph).rewrites == len(graph.graph.nodes)
    assert {name: stage for name, stage in marks(graph).items() if name in expected} == expected
    assert marks(graph)["images"] == "backbone"
    assert marks(graph)["text"] == "neck"
    prepare_passes()(graph)
    assert {name: stage for name, stage in marks(graph).items() if name in expected} == {name: TWO[part] for name, part in expected.items()}


@pytest.mark.parametrize("version", [1, 2])
def test_the_partition_is_the_same_after_every_node_and_module_is_renamed(version):
    graph = traced_on_meta("s", version)
    other, names = renamed(graph)
    assert not {node.name for node in graph.graph.nodes} & {node.name for node in other.graph.nodes} - {"output"}
    assert not {name for name, _ in graph.named_modules() if name} & {name for name, _ in other.named_modules()}
    mark_stages(3)(graph)
    mark_stages(3)(other)
    assert {names[name]: stage for name, stage in marks(other).items()} == marks(graph)


@pytest.mark.parametrize("version", [1, 2])
def test_a_graph_without_regions_gives_the_same_partition(version):
    graph = traced_on_meta("s", version)
    bare = copy.deepcopy(graph)
    output = bare.graph.output_node()
    output.args = (output.args[0][:2],)
    bare.recompile()
    mark_stages(3)(graph)
    mark_stages(3)(bare)
    assert marks(bare) == marks(graph)


def test_what_only_the_regions_need_goes_with_what_it_reads():
    graph = traced_on_meta("s", 1)
    output = graph.graph.output_node()
    logits, bins, (first, *others) = output.args[0]
    with graph.graph.inserting_before(output):
        scale = graph.graph.get_attr("bbox_head.head_module.cls_contrasts.0.logit_scale")
        scaled = graph.graph.call_function(torch.mul, (first, scale))
    output.args = ((logits, bins, (scaled, *others)),)
    mark_stages(3)(graph)
    assert scaled.meta[STAGE] == "head"
    assert scale.meta[STAGE] == "head"


def test_a_graph_from_plain_symbolic_trace_is_told_too():
    with torch.device("meta"):
        graph = symbolic_trace(build("s", 1))
    assert not any(isinstance(module, Concat) for module in graph.modules())
    expected = truth(graph)
    mark_stages(3)(graph)
    assert {name: stage for name, stage in marks(graph).items() if name in expected} == expected


def test_a_quantizer_belongs_to_its_earliest_reader_and_changes_nothing_else():
    graph = traced_on_meta("s", 1)
    mark_stages(3)(graph)
    plain = marks(graph)
    graph.add_module("quantizer", Quantizer())
    added = {}
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            readers = list(node.users)
            with graph.graph.inserting_after(node):
                quantizer = graph.graph.call_module("quantizer", (node,))
            for reader in readers:
                reader.replace_input_with(node, quantizer)
            added[quantizer.name] = readers
    mark_stages(3)(graph)
    assert {name: stage for name, stage in marks(graph).items() if name not in added} == plain
    order = ["backbone", "neck", "head"]
    for name, readers in added.items():
        assert marks(graph)[name] == min((plain[reader.name] for reader in readers), key=order.index)
    ends = [name for name, readers in added.items() if {plain[reader.name] for reader in readers} == {"neck", "backbone"}]
    assert len(ends) == 2  # strides 8 and 16 run on in the backbone and into the neck; stride 32 into the neck alone


def test_the_stages_hold_every_node_once_and_in_the_order_of_the_data():
    graph = traced_on_meta("s", 2)
    mark_stages(3)(graph)
    stages = stages_of(graph)
    assert [stage.name for stage in stages] == ["backbone", "neck", "head"]
    assert sorted(node.name for stage in stages for node in stage.nodes) == sorted(node.name for node in graph.graph.nodes)
    seen = set()
    for stage in stages:
        seen |= set(stage.nodes)
        assert all(source in seen for node in stage.nodes for source in node.all_input_nodes)


def test_stages_of_a_graph_that_is_not_marked_are_refused():
    with pytest.raises(ValueError, match="run mark-stages first"):
        stages_of(traced_on_meta("pico", 2))


def test_marks_survive_a_copy():
    graph = traced_on_meta("pico", 2)
    mark_stages()(graph)
    assert marks(copy.deepcopy(graph)) == marks(graph)


@pytest.mark.parametrize("stages", [1, 4])
def test_other_numbers_of_stages_are_refused(stages):
    with pytest.raises(ValueError, match="stages is"):
        mark_stages(stages)


# --- a detector of four layers: what the pass writes, and where foreign graphs break it ---


class Tiny(nn.Module):
    """A backbone with a pyramid, a neck guided by the text, two levels of one head each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool, self.concat = nn.MaxPool2d(3, 1, 1), Concat()
        self.end = nn.Conv2d(16, 4, 1)
        self.guided = nn.Conv2d(4, 4, 1)
        self.logits, self.bins = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 6, 1)

    def pyramid(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        z = self.pool(y)
        return self.end(self.concat(x, y, z, self.pool(z)))

    def neck(self, x: Tensor, text: Tensor) -> Tensor:
        best = yolo_world.max_similarity(text.unsqueeze(1), x.flatten(2).unsqueeze(1))
        return self.guided(x) * best.unflatten(2, (4, 4))

    def forward(self, images: Tensor, text: Tensor):
        x = self.neck(self.pyramid(self.stem(images)), text)
        return (self.logits(x),), (self.bins(x),)


def tiny(kind: type[nn.Module] = Tiny) -> GraphModule:
    model = kind().eval()
    return GraphModule(model, LeafTracer(LEAVES).trace(model))


TINY = """
    images = input  # backbone
    text = input  # neck
    stem = Conv2d[3->4, k3, p1, bias](images)  # backbone
    pool = MaxPool2d[k3, s1, p1](stem)  # backbone
    pool@2 = MaxPool2d[k3, s1, p1](pool)  # backbone
    pool@3 = MaxPool2d[k3, s1, p1](pool@2)  # backbone
    concat = Concat(stem, pool, pool@2, pool@3)  # backbone
    end = Conv2d[16->4, k1, bias](concat)  # backbone
    unsqueeze = text.unsqueeze(1)  # neck
    flatten = end.flatten(2)  # neck
    unsqueeze@2 = flatten.unsqueeze(1)  # neck
    max_similarity = max_similarity(unsqueeze, unsqueeze@2)  # neck
    guided = Conv2d[4->4, k1, bias](end)  # neck
    unflatten = max_similarity.unflatten(2, (4, 4))  # neck
    mul = mul(guided, unflatten)  # neck
    logits = Conv2d[4->5, k1, bias](mul)  # head
    bins = Conv2d[4->6, k1, bias](mul)  # head
    return ((logits,), (bins,))  # head
"""


@pytest.mark.parametrize("stages", [2, 3])
def test_marks_and_changes_nothing_else(stages):
    after = TINY if stages == 3 else TINY.replace("# neck", "# neck-head").replace("# head", "# neck-head")
    unmarked = "\n".join(line.partition("  # ")[0] for line in TINY.splitlines())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, generator=generator)
    check_pass(mark_stages(stages), tiny(), *inputs, before=unmarked, after=after, rewrites=18)


class AsksForShapes(Tiny):
    """Shapes are asked for in the pyramid, at its end and behind it; some by those who are dead."""

    def pyramid(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        z = self.pool(y)
        batch = y.shape[0]
        joined = self.concat(x, y, z, self.pool(z)).reshape(batch, 16, z.size(2), 4)
        joined.size()
        end = self.end(joined)
        return end.view(end.shape)


@pytest.mark.parametrize("stages", [2, 3])
def test_who_asks_for_a_shape_neither_hides_the_pyramid_nor_ends_the_backbone(stages):
    plain, asking = tiny(), tiny(AsksForShapes)
    mark_stages(stages)(plain)
    mark_stages(stages)(asking)
    expected = {str(node.target): node.meta[STAGE] for node in plain.graph.find_nodes(op="call_module")}
    assert {str(node.target): node.meta[STAGE] for node in asking.graph.find_nodes(op="call_module")} == expected
    assert {node.meta[STAGE] for node in asking.graph.nodes if node.target in ("view", "reshape")} == {"backbone"}


@pytest.mark.parametrize("stages", [2, 3])
def test_a_parameter_that_two_heads_share_is_the_necks_and_one_that_the_uncounted_share_goes_with_its_earliest_reader(stages):
    class Shares(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.counted, self.uncounted = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor, text: Tensor):
            x = self.neck(self.pyramid(self.stem(images)), text)
            logits, bins, regions = self.logits(x), self.bins(x), x.neg()
            return (logits * self.counted,), (bins * self.counted,), (regions * self.uncounted, logits.neg() * self.uncounted)

    graph = tiny(Shares)
    mark_stages(stages)(graph)
    found = {str(node.target): node.meta[STAGE] for node in graph.graph.find_nodes(op="get_attr")}
    neck = "neck" if stages == 3 else "neck-head"
    assert found == {"counted": neck, "uncounted": neck}
    assert [node.meta[STAGE] for node in graph.graph.find_nodes(op="call_method", target="neg")] == [
        neck,
        TWO["head"] if stages == 2 else "head",
    ]


def test_what_nobody_needs_goes_with_the_latest_that_it_reads_and_an_unused_input_with_the_backbone():
    class Idle(Tiny):
        def forward(self, images: Tensor, text: Tensor, unused: Tensor):
            found = super().forward(images, text)
            stem = self.stem(images)
            torch.add(stem, found[0][0])
            torch.sub(stem, stem)
            return found

    graph = tiny(Idle)
    mark_stages(3)(graph)
    assert {name: marks(graph)[name] for name in ("unused", "add", "sub")} == {"unused": "backbone", "add": "head", "sub": "backbone"}


@pytest.mark.parametrize(
    ("name", "stage", "reason"),
    [
        ("stem", "head", "pool (backbone) reads head"),
        ("logits", "backbone", "logits (backbone) reads neck"),
        ("end", None, "end is marked None, not one of backbone, neck, head"),
        ("end", "whole", "end is marked whole"),
    ],
)
def test_marks_that_are_not_what_the_pass_promises_are_refused(name, stage, reason):
    graph, marking = tiny(), mark_stages(3)
    marking(graph)
    marking.ensures(graph)
    (node,) = graph.graph.find_nodes(op="call_module", target=name)
    node.meta[STAGE] = stage
    with pytest.raises(PassError) as caught:
        marking.ensures(graph)
    assert reason in str(caught.value)


def test_says_at_debug_where_the_backbone_ends_and_what_only_looks_like_its_end(caplog):
    class AlmostTwo(Tiny):
        def pyramid(self, x: Tensor) -> Tensor:
            return super().pyramid(self.concat(x, x, x, self.pool(x))[:, :4])

    with caplog.at_level(logging.DEBUG, logger="passes.fx"):
        mark_stages(3)(tiny(AlmostTwo))
    assert "mark-stages: the backbone ends with end, which flatten, guided read" in caplog.messages
    assert "no PoolingPyramid at concat: stem is not as pool is there" in caplog.messages


class NoPyramid(Tiny):
    def pyramid(self, x):
        return self.end(self.concat(x, x, x, x))


class TwoPyramids(Tiny):
    def neck(self, x, text):
        return super().neck(self.pyramid(x), text)


class NoGuide(Tiny):
    def neck(self, x, text):
        return self.guided(x) * x * text.sum()


class GuideInTheBackbone(Tiny):
    def forward(self, images, text):
        return super().forward(self.neck(self.guided(self.stem(images)), text)[:, :3], text)


class NoFanOut(Tiny):
    def neck(self, x, text):
        return self.guided(x)

    def forward(self, images, text):
        best = yolo_world.max_similarity(text.unsqueeze(1), text.unsqueeze(1).transpose(2, 3))
        return (self.neck(self.pyramid(self.stem(images)), text),), (best,)


class OneOutput(Tiny):
    def forward(self, images, text):
        logits, bins = super().forward(images, text)
        return torch.cat([*logits, *bins], 1)


class OneOutputInATuple(Tiny):
    def forward(self, images, text):
        logits, bins = super().forward(images, text)
        return torch.cat([*logits, *bins], 1), ()


class OutputFeedsAnother(Tiny):
    def forward(self, images, text):
        x = self.neck(self.pyramid(self.stem(images)), text)
        logits = self.logits(x)
        return (logits,), (self.bins(x) + logits.sum(),)


class OutputPastTheBackbone(Tiny):
    def forward(self, images, text):
        logits, bins = super().forward(images, text)
        return logits, (*bins, self.bins(self.stem(images)))


class NoNeck(Tiny):
    def forward(self, images, text):
        x = self.pyramid(self.stem(images))
        best = yolo_world.max_similarity(text.unsqueeze(1), x.flatten(2).unsqueeze(1))
        return (best,), (self.bins(x),)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (NoPyramid, "found 0 places of PoolingPyramid"),
        (TwoPyramids, "found 2 places of PoolingPyramid"),
        (NoGuide, "found no MaxSimilarity"),
        (GuideInTheBackbone, "max_similarity must lie outside the backbone"),
        (NoFanOut, "but guided has no two readers"),
        (OneOutput, "the graph returns 1"),
        (OneOutputInATuple, "returns 1 that count"),
        (OutputFeedsAnother, "counted output logits also feeds another one"),
        (OutputPastTheBackbone, "does not reach the output bins@2"),
        (NoNeck, "nothing is left for the neck"),
    ],
)
def test_a_foreign_graph_is_refused_with_the_reason_and_left_as_it_was(model, reason):
    graph = tiny(model)
    with pytest.raises(PassError, match="mark-stages: ") as caught:
        prepare_passes(3)(graph)
    assert reason in str(caught.value)
    assert not any(STAGE in node.meta for node in graph.graph.nodes)


def test_every_pass_says_what_it_does_in_one_line():
    lines = passes_in_order()
    assert {name for _, name, _ in lines} >= {"mark-stages", "fold-batchnorm", "half-precision", "pad-stem"}
    assert all(text.endswith(".") and "\n" not in text for _, _, text in lines)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", ["pico", "s"])
def test_the_whole_graph_is_the_golden_one(size, version):
    graph = traced_on_meta(size, version)
    prepare_passes(3)(graph)
    check_golden(f"{size}-v{version}", format_graph(graph))


def test_a_graph_without_parts_is_one_stage_and_is_not_changed():
    whole = "\n".join(line.partition("  # ")[0] + "  # whole" if line.strip() else line for line in TINY.splitlines())
    unmarked = "\n".join(line.partition("  # ")[0] for line in TINY.splitlines())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, generator=generator)
    check_pass(MarkWhole(), tiny(), *inputs, before=unmarked, after=whole, rewrites=18)
