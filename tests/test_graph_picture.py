"""The picture of a graph: every block and stage in it, nothing on top of anything else, and text that cannot break the SVG."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from crqat_fx.errors import UserError
from crqat_fx.graph_picture import BORDERS, COLOURS, HEIGHT, UNMARKED, WIDTH, draw_graph, save_picture
from crqat_fx.models.yolo_world import build
from crqat_fx.pipelines import prepare_passes
from crqat_fx.trace import trace_unproved
from passes.fx.graph import STAGE, blocks_of

SVG = "{http://www.w3.org/2000/svg}"


def detector(size: str, version: int, stages: int | None) -> GraphModule:
    with torch.device("meta"):
        graph = trace_unproved(build(size, version))
    if stages is not None:
        prepare_passes(stages)(graph)
    return graph


def boxes(svg: ET.Element) -> list[dict[str, str]]:
    """Of each box its rectangle's attributes, its label and its second line."""
    found = []
    for group in svg.iter(f"{SVG}g"):
        rectangle, label, contents = group.find(f"{SVG}rect"), *group.findall(f"{SVG}text")
        found.append(rectangle.attrib | {"label": label.text, "contents": contents.text, "title": group.find(f"{SVG}title").text})
    return found


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("version", [1, 2])
def test_every_block_is_a_box_in_the_colour_of_its_stage(version, stages):
    graph = detector("s", version, stages)
    found = boxes(ET.fromstring(draw_graph(graph, "title")))
    expected = sorted({(block, node.meta[STAGE]) for node, block in blocks_of(graph).items()})
    assert len(found) == len(expected)
    assert sorted(box["fill"] for box in found) == sorted(COLOURS[stage] for _, stage in expected)
    assert sum(box["title"].count("\n") + 1 for box in found) == len(graph.graph.nodes)
    labels = {box["label"] for box in found}
    assert {"images", "text", "stem", "stage4", "top_down_layers.0", "cls_preds.2", "output"} <= labels


@pytest.mark.parametrize("name", ["pico-1", "s-1", "s-2", "x-1"])
def test_no_box_covers_another_and_all_lie_in_the_picture(name):
    size, _, version = name.partition("-")
    svg = ET.fromstring(draw_graph(detector(size, int(version), 3), "title"))
    width, height = float(svg.get("width")), float(svg.get("height"))
    places = [(float(box["x"]), float(box["y"])) for box in boxes(svg)]
    assert len(places) > 20
    for x, y in places:
        assert 0 <= x <= width - WIDTH
        assert 0 <= y <= height - HEIGHT
    for (x, y), (other_x, other_y) in itertools.combinations(places, 2):
        assert abs(x - other_x) >= WIDTH or abs(y - other_y) >= HEIGHT


def test_no_line_runs_through_a_box():
    svg = ET.fromstring(draw_graph(detector("s", 1, 3), "title"))
    places = [(float(box["x"]), float(box["y"])) for box in boxes(svg)]
    passing = [re.fullmatch(r"M.* C.* (\S+) (\S+) V(\S+)", path.get("d")) for path in svg.iter(f"{SVG}path")]
    passing = [(float(found[1]), float(found[2])) for found in passing if found]
    assert len(passing) > 10
    for (line, top), (x, y) in itertools.product(passing, places):
        assert top != y or not x <= line <= x + WIDTH


def test_data_flows_down():
    svg = ET.fromstring(draw_graph(detector("s", 1, 3), "title"))
    row = {box["label"]: float(box["y"]) for box in boxes(svg)}
    chain = ["images", "stem", "stage1", "stage2", "stage3", "stage4", "top_down_layers.0", "top_down_layers.1", "text_enhancer"]
    chain += ["bottom_up_layers.0", "bottom_up_layers.1", "cls_preds.2", "cls_contrasts.2", "output"]
    assert all(row[above] < row[below] for above, below in itertools.pairwise(chain))
    assert row["text"] < row["top_down_layers.0"]


def test_a_box_says_what_is_in_it():
    found = {box["label"]: box["contents"] for box in boxes(ET.fromstring(draw_graph(detector("s", 2, 3), "title")))}
    assert found["stem"] == "1 conv, 0.9 k"
    assert found["stage4"] == "7 convs, 3.68 M"
    assert found["text"] == "input"
    assert found["top_down_concats.0"] == "Concat"
    assert found["output"] == "9 tensors"


def test_a_block_that_a_stage_cuts_is_two_boxes():
    graph = detector("pico", 2, 3)
    cut = [node for node, block in blocks_of(graph).items() if block == "backbone.image_model.stage4"]
    cut[-1].meta[STAGE] = "neck"
    found = [box for box in boxes(ET.fromstring(draw_graph(graph, "title"))) if box["label"] == "stage4"]
    assert {box["stroke"] for box in found} == {BORDERS["backbone"], BORDERS["neck"]}


def test_a_graph_without_stages_is_grey():
    assert {box["fill"] for box in boxes(ET.fromstring(draw_graph(detector("pico", 2, None), "title")))} == {UNMARKED}


def test_blocks_that_read_each_other_are_drawn():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(self.one(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.last = Part(), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.part(x))

    found = {box["label"]: float(box["y"]) for box in boxes(ET.fromstring(draw_graph(symbolic_trace(Model()), "title")))}
    assert set(found) == {"x", "one", "two", "last", "output"}
    assert found["x"] < found["one"] < found["two"]
    assert found["one"] < found["last"] < found["output"]


def test_the_same_graph_gives_the_same_picture():
    assert draw_graph(detector("pico", 1, 3), "title") == draw_graph(detector("pico", 1, 3), "title")


def test_text_from_outside_is_escaped_and_a_picture_is_written_whole(tmp_path):
    path = tmp_path / "out.svg"
    save_picture(detector("pico", 2, 2), path, 'a <b> & "c"')
    assert 'a <b> & "c"' in [text.text for text in ET.parse(path).iter(f"{SVG}text")]
    with pytest.raises(UserError):
        save_picture(detector("pico", 2, 2), tmp_path, "title")
