"""Charts put every value where its axis says, whatever the values are."""

import itertools
import re

import pytest

from crqat_fx.charts import Axis, Band, Series, axis, folded_axis, lines, nice, rows, scatter, stacks


@pytest.mark.parametrize(("step", "wanted"), [(0.9, 1), (1, 1), (1.2, 2), (2.2, 2.5), (3, 5), (6, 10), (0.00012, 0.0002), (4e6, 5e6)])
def test_steps_are_ones_a_reader_counts_in(step, wanted):
    assert nice(step) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "values", [[], [0.0], [5.0], [5.0, 5.0], [-3.0, 7.0], [1e-9, 2e-9], [1e12, -1e12], [0.1, 0.2, float("nan")], [float("inf"), 1.0]]
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_an_axis_holds_its_values_and_has_ticks_within(values, from_zero):
    made = axis("x", values, from_zero=from_zero)
    assert made.low < made.high
    assert all(made.low <= value <= made.high for value in values if abs(value) < float("inf"))
    assert 1 <= len(made.ticks) <= 12
    assert all(made.low - 1e-9 * abs(made.low) <= tick <= made.high + 1e-9 * abs(made.high) for tick in made.ticks)
    assert not from_zero or made.low <= 0 <= made.high


@pytest.mark.parametrize("values", [[], [1.0], [0.003, 7.0], [-1.0, 0.0, 20.0], [1e-9, 1e9], [5e-324, 1.0]])
def test_a_logarithmic_axis_has_powers_of_ten(values):
    made = axis("x", values, logarithmic=True)
    assert 0 < made.low < made.high
    assert all(made.low <= value <= made.high for value in values if value > 1e-300)
    assert made.ticks
    assert made.share(made.low) == 0
    assert made.share(made.high) == 1


def test_a_folded_axis_keeps_order_and_sign():
    made = folded_axis("x", [-8.0, 0.01, 30.0])
    assert made.ticks == [-100, -10, -1, 0, 1, 10, 100]
    places = [made.share(value) for value in (-100, -8, -1, -0.01, 0, 0.05, 1, 30, 100)]
    assert places == sorted(places)
    assert (places[0], places[4], places[-1]) == (0, 0.5, 1)
    assert folded_axis("x", []).ticks == [-1, -0.1, -0.01, 0, 0.01, 0.1, 1]


def test_ticks_are_told_short():
    assert [Axis("x", 0, 0.2, percent=True).told(each) for each in (0, 0.05, 0.1)] == ["0%", "5%", "10%"]
    assert [Axis("x", 0, 1).told(each) for each in (0, 0.25, 12345.0, 0.00001)] == ["0", "0.25", "12,345", "1e-05"]


def points(drawn):
    (found,) = re.findall(r'points="([^"]*)"', drawn)
    return [tuple(map(float, each.split(","))) for each in found.split()]


def test_a_line_goes_up_where_its_values_do():
    x, y = Axis("step", 0, 10), Axis("loss", 0, 4)
    (x0, y0), (x1, y1), (x2, y2) = points(lines("t", [Series("a", 0, ((0, 0), (5, 2), (10, 4)))], x, y))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y2 < y1 < y0


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other():
    series = [Series(f"line {number}", number, ((0, 1.0), (1, 1.0 + number / 1000))) for number in range(6)]
    drawn = lines("t", series, Axis("x", 0, 1), Axis("y", 0, 2))
    ends = sorted(float(y) for y in re.findall(r'class="end"[^>]* y="([\d.]+)"', drawn))
    assert len(ends) == 6
    assert all(below - above >= 11.9 for above, below in itertools.pairwise(ends))


def test_every_series_has_a_shape_of_its_own_and_says_what_it_is():
    x = Axis("x", 0, 10)
    drawn = scatter("t", [Series(f"s{number}", number, ((1.0, 2.0), (3.0, 4.0))) for number in range(4)], x, x)
    assert (drawn.count("<circle"), drawn.count("<rect"), drawn.count("<path")) == (2, 2, 4)
    assert "<title>s3: x 1, x 2</title>" in drawn


def test_rows_show_marks_bars_gaps_and_groups():
    series = [("a", 0, [1.0, None, 3.0]), ("b", 1, [(0.5, 2.0), (1.0, 1.0), None])]
    drawn = rows("t", ["r1", "r2", "r3"], series, Axis("x", 0, 4), groups=["g", "g", "h"])
    assert re.findall(r"<title>(.*?)</title>", drawn) == ["a, r1: 1", "b, r1: 0.5 to 2", "b, r2: 1 to 1", "a, r3: 3"]
    assert re.findall(r'class="group"[^>]*>(.)<', drawn) == ["g", "h"]
    assert rows("t", [], [], Axis("x", 0, 1)).startswith("<svg")


def test_parts_of_a_bar_follow_each_other():
    drawn = stacks("t", ["m"], ["p", "q"], [[1.0, 3.0]], Axis("ms", 0, 4), "ms")
    (first, wide), (second, wider) = (
        (float(x), float(width)) for x, width in re.findall(r'class="part"[^>]* x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    )
    assert first + wide == pytest.approx(second - 1, abs=0.11)
    assert (wider + 1) / (wide + 1) == pytest.approx(3, abs=0.05)
    assert "4 ms" in drawn


def test_a_band_without_room_has_no_name():
    bands = [Band(0, 0.2, "short"), Band(0.2, 10, "long enough")]
    drawn = lines("t", [Series("a", 0, ((0, 1.0), (10, 2.0)))], Axis("x", 0, 10), Axis("y", 0, 2), bands)
    assert "long enough" in drawn
    assert "short" not in drawn
