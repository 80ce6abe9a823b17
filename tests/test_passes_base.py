"""The pass protocol, without any graph library: a list of numbers stands for a graph."""

import ast
import logging
import sys
from pathlib import Path

import pytest

from passes import base
from passes.base import Pass, PassError, Pipeline
from passes.spec import QuantSpec


class ListPass(Pass[list[int]]):
    def validate(self, graph: list[int]) -> None:
        if any(value < 0 for value in graph):
            raise PassError(self.name, "left a negative number")


class Halve(ListPass):
    name = "halve"

    def rewrite(self, graph: list[int]) -> int:
        even = [index for index, value in enumerate(graph) if value and value % 2 == 0]
        for index in even:
            graph[index] //= 2
        return len(even)


class Negate(ListPass):
    name = "negate"

    def rewrite(self, graph: list[int]) -> int:
        graph[:] = [-value for value in graph]
        return len(graph)


class Stumble(ListPass):
    name = "stumble"

    def rewrite(self, graph: list[int]) -> int:
        raise ZeroDivisionError("of its own")


class WantsOdd(Halve):
    name = "wants-odd"

    def requires(self, graph: list[int]) -> None:
        if any(value % 2 == 0 for value in graph):
            raise PassError(self.name, "an even number")


class PromisesOdd(Halve):
    name = "promises-odd"

    def ensures(self, graph: list[int]) -> None:
        if any(value % 2 == 0 for value in graph):
            raise PassError(self.name, "an even number is left")


def test_a_pass_rewrites_in_place_and_counts():
    graph = [4, 3, 2]
    result = Halve()(graph)
    assert result.graph is graph
    assert graph == [2, 3, 1]
    assert result.rewrites == 2
    assert [(step.name, step.rewrites) for step in result.steps] == [("halve", 2)]


def test_a_pass_checks_what_it_requires_before_it_rewrites():
    graph = [4]
    with pytest.raises(PassError, match="wants-odd: an even number"):
        WantsOdd()(graph)
    assert graph == [4]


def test_a_pass_checks_what_it_ensures_on_what_it_leaves():
    PromisesOdd()([2])
    with pytest.raises(PassError, match="is left"):
        PromisesOdd()([4])


def test_a_pipeline_runs_in_order_and_keeps_every_step():
    graph = [8]
    result = Pipeline(Halve(), Halve())(graph)
    assert graph == [2]
    assert result.rewrites == 2
    assert [step.name for step in result.steps] == ["halve", "halve"]


def test_a_refusal_names_the_pass_and_those_before_it():
    with pytest.raises(PassError) as caught:
        Pipeline(Halve(), WantsOdd(), Negate(), Halve())([2])
    assert str(caught.value) == "negate (after halve, wants-odd): left a negative number"
    assert caught.value.before == ("halve", "wants-odd")
    assert caught.value.__cause__ is not None


def test_a_bug_in_a_pass_stays_what_it_is_with_a_note_of_where_it_happened():
    with pytest.raises(ZeroDivisionError, match="of its own") as caught:
        Pipeline(Halve(), WantsOdd(), Stumble(), Halve())([2])
    assert caught.value.__notes__ == ["in the pass stumble, after halve, wants-odd"]


@pytest.mark.parametrize("name", ["Halve", "halve_it", "", "-halve", "halve-"])
def test_a_pass_without_a_kebab_case_name_cannot_be_written(name):
    with pytest.raises(TypeError, match="kebab-case"):
        type("Bad", (Halve,), {"name": name})


def test_an_abstract_pass_needs_no_name_and_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        ListPass()


def test_a_pass_logs_its_count(caplog):
    with caplog.at_level(logging.INFO, logger="passes.base"):
        Halve()([2, 2])
    assert "halve: 2 rewrites" in caplog.text


def test_the_base_needs_the_standard_library_alone():
    tree = ast.parse(Path(base.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("spec", "codes"),
    [
        (QuantSpec(4, symmetric=True), (-8, 7)),
        (QuantSpec(4), (0, 15)),
        (QuantSpec(8, symmetric=True), (-128, 127)),
        (QuantSpec(8), (0, 255)),
        (QuantSpec(2), (0, 3)),
    ],
)
def test_a_spec_knows_its_codes(spec, codes):
    assert (spec.lowest, spec.highest) == codes


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"bits": True}, {"bits": 4.0}, {"bits": 4, "channel_axis": -1}, {"bits": 4, "symmetric": 1}]
)
def test_a_spec_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        QuantSpec(**wrong)
