"""Phases as data: what each method's are, and what is refused."""

import pytest

from crqat_fx.curriculum import Phase, borders, curriculum, newly_quantized, read_phases
from crqat_fx.errors import UserError

TWO, THREE = ("backbone", "neck-head"), ("backbone", "neck", "head")


def described(phases: tuple[Phase, ...]) -> list[tuple[int, str, float]]:
    return [(len(phase.quantized), " ".join(phase.losses), round(phase.share, 3)) for phase in phases]


@pytest.mark.parametrize(
    ("method", "stages", "neck_features", "expected"),
    [
        ("qat", TWO, False, [(2, "task", 1)]),
        ("kd", TWO, False, [(2, "task pkd trkd", 1)]),
        ("cqat", TWO, False, [(1, "task", 0.333), (2, "task", 0.667)]),
        ("cr-qat", TWO, False, [(1, "task pkd", 0.333), (2, "task pkd trkd", 0.667)]),
        ("cr-qat-plus", TWO, False, [(1, "task pkd", 0.333), (2, "task pkd trkd", 0.667)]),
        ("cr-qat", THREE, False, [(1, "task pkd", 0.333), (2, "task pkd", 0.333), (3, "task pkd trkd", 0.333)]),
        ("cr-qat", THREE, True, [(1, "task pkd", 0.333), (2, "task pkd neck-pkd", 0.333), (3, "task pkd neck-pkd trkd", 0.333)]),
        ("cqat", THREE, False, [(1, "task", 0.333), (2, "task", 0.333), (3, "task", 0.333)]),
        ("kd", THREE, True, [(3, "task pkd neck-pkd trkd", 1)]),
        ("cr-qat", ("whole",), False, [(1, "task trkd", 1)]),
    ],
)
def test_the_phases_of_a_method(method, stages, neck_features, expected):
    phases = curriculum(method, stages, neck_features=neck_features)
    assert described(phases) == expected
    for phase in phases:
        assert phase.quantized == phase.trained == stages[: len(phase.quantized)]


def test_settings_reach_every_phase():
    phases = curriculum("cr-qat", TWO, norm="frozen", recalibrate=False, ema=0.3, shares=(0.15, 0.85))
    assert {(phase.norm, phase.recalibrate, phase.ema) for phase in phases} == {("frozen", False, 0.3)}
    assert [phase.share for phase in phases] == [0.15, 0.85]


def test_borders_are_at_the_shares_of_the_steps_and_the_last_is_the_end():
    assert borders(curriculum("cr-qat", TWO), 300) == (0, 100, 300)
    assert borders(curriculum("cr-qat", THREE), 100) == (0, 33, 67, 100)
    assert borders(curriculum("qat", TWO), 7) == (0, 7)
    assert borders(curriculum("cr-qat", TWO), 0) == (0, 0, 0)


def test_newly_quantized_are_the_stages_that_the_phase_before_left_float():
    phases = curriculum("cr-qat", THREE)
    assert [newly_quantized(phases, index) for index in range(3)] == [("backbone",), ("neck",), ("head",)]


def test_phases_are_read_from_plain_data():
    given = [
        {"quantized": ["backbone"], "trained": ["backbone", "neck-head"], "norm": "frozen", "losses": ["task", "trkd"], "share": 0.25},
        {"quantized": [], "trained": ["neck-head"], "share": 0.75, "recalibrate": False, "ema": 0},
    ]
    assert read_phases(given) == (
        Phase(("backbone",), ("backbone", "neck-head"), "frozen", ("task", "trkd"), 0.25),
        Phase((), ("neck-head",), share=0.75, recalibrate=False, ema=0),
    )


WHOLE = {"quantized": ["whole"], "trained": ["whole"]}


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("whole", "phase 1 is 'whole'"),
        (WHOLE | {"shares": 1}, "unknown key 'shares'"),
        ({"quantized": ["whole"]}, "has no 'trained'"),
        (WHOLE | {"quantized": "whole"}, "quantized is 'whole'; give a list of names"),
        (WHOLE | {"trained": [1]}, "trained is"),
        (WHOLE | {"share": True}, "share is True; give a number"),
        (WHOLE | {"share": float("nan")}, "share is nan"),
        (WHOLE | {"share": 0}, "share is 0"),
        (WHOLE | {"recalibrate": 1}, "recalibrate is 1; give true or false"),
        (WHOLE | {"norm": "live"}, "norm is 'live'"),
        (WHOLE | {"ema": 2.0}, "ema is 2.0"),
        (WHOLE | {"losses": ["task", "kd"]}, "unknown loss 'kd'"),
        (WHOLE | {"losses": ["pkd"]}, "lack 'task'"),
    ],
)
def test_a_phase_that_makes_no_sense_is_refused(entry, what):
    with pytest.raises(UserError, match=what):
        read_phases([entry])


@pytest.mark.parametrize(
    ("phases", "steps", "what"),
    [
        ((), 10, "there is no phase"),
        ((Phase(("a",), ("a",), share=0.5),), 10, "add up to 0.5"),
        (curriculum("cr-qat", THREE), 1, "1 steps leave a phase without one"),
    ],
)
def test_phases_that_do_not_fill_the_steps_are_refused(phases, steps, what):
    with pytest.raises(UserError, match=what):
        borders(phases, steps)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"method": "crqat", "stages": TWO}, "unknown method 'crqat'"),
        ({"method": "cr-qat", "stages": TWO, "shares": (1.0,)}, "1 shares for 2 phases"),
        ({"method": "cr-qat", "stages": TWO, "neck_features": True}, "three stages"),
        ({"method": "qat", "stages": TWO, "correct_norms": True}, "whose statistics train, and correct themselves"),
        ({"method": "cqat", "stages": THREE, "neck_features": True}, "a teacher"),
    ],
)
def test_a_curriculum_that_makes_no_sense_is_refused(arguments, what):
    with pytest.raises(UserError, match=what):
        curriculum(**arguments)
