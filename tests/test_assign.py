import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from truths import truth_of

from crqat_fx.assign import ALPHA, BETA, EPS, TOP, assign, ciou
from crqat_fx.data.batch import Truth
from crqat_fx.models.yolo_world import anchor_points

POINTS = torch.tensor([[4.0, 4.0], [12.0, 4.0], [4.0, 12.0], [12.0, 12.0]])  # stride 8, 16 px


def predictions(boxes: list[list[float]], scores: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([scores]), torch.tensor([boxes])


def literal_ciou(a: list[float], b: list[float]) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    iou = w * h / (union + 1e-7)
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    distance = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    v = 4 / math.pi**2 * (math.atan((b[2] - b[0]) / (b[3] - b[1])) - math.atan((a[2] - a[0]) / (a[3] - a[1]))) ** 2
    return iou - distance / (diagonal + 1e-7) - v * v / (v - iou + 1 + 1e-7)


def literal_assign(scores: torch.Tensor, boxes: torch.Tensor, points: torch.Tensor, truth: Truth) -> list[dict[int, tuple[int, float]]]:
    """Truth and target of each positive, picture by picture: the rule read aloud."""
    results = []
    for picture in range(len(scores)):
        rows = [row for row in range(truth.boxes.shape[1]) if truth.valid[picture, row]]
        overlap, aligned, claims = {}, {}, {}
        for row in rows:
            box = truth.boxes[picture, row].tolist()
            for spot in range(len(points)):
                overlap[row, spot] = max(0.0, literal_ciou(boxes[picture, spot].tolist(), box))
                score = scores[picture, spot, truth.labels[picture, row]].item()
                aligned[row, spot] = score**ALPHA * overlap[row, spot] ** BETA
            x1, y1, x2, y2 = box
            inside = [spot for spot, (x, y) in enumerate(points.tolist()) if x1 < x < x2 and y1 < y < y2]
            for spot in sorted(inside, key=lambda spot: -aligned[row, spot])[:TOP]:
                assume(aligned[row, spot] > 0)  # among centres of alignment 0 the choice is arbitrary
                claims.setdefault(spot, []).append(row)
        owner = {spot: who[0] if len(who) == 1 else max(rows, key=lambda row: overlap[row, spot]) for spot, who in claims.items()}
        result = {}
        for spot, row in owner.items():
            own = [other for other, who in owner.items() if who == row]
            best_aligned, best_overlap = max(aligned[row, s] for s in own), max(overlap[row, s] for s in own)
            result[spot] = (row, aligned[row, spot] * best_overlap / (best_aligned + EPS))
        results.append(result)
    return results


def test_the_constants_are_the_published_ones() -> None:
    assert (TOP, ALPHA, BETA) == (10, 0.5, 6.0)


def test_ciou_of_hand_computed_pairs() -> None:
    first = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 2, 2]])
    second = torch.tensor([[0.0, 0, 4, 4], [2, 2, 4, 4], [0, 0, 4, 2], [10, 0, 12, 2]])
    aspect = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    expected = [
        1.0,  # the same box
        0 - 8 / 32,  # touching corners: centres (1,1), (3,3), enclosing diagonal 4 x 4
        0.5 - 1 / 32 - aspect**2 / (aspect - 0.5 + 1),  # half of it: centres one apart, aspect 2 against 1
        0 - 100 / 148,  # far apart
    ]
    assert ciou(first, second).tolist() == pytest.approx(expected, abs=1e-6)


def test_ciou_of_an_empty_box_is_finite_with_a_finite_gradient() -> None:
    empty = torch.tensor([[3.0, 3, 3, 3]], requires_grad=True)
    value = ciou(empty, torch.tensor([[0.0, 0, 8, 8]]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(empty.grad).all()


def test_no_box_in_any_picture_gives_no_positive() -> None:
    scores, boxes = predictions([[0, 0, 8, 8]] * 4, [[0.9, 0.1]] * 4)
    result = assign(scores, boxes, POINTS, truth_of([]))
    assert not result.positive.any()
    assert result.scores.sum() == 0
    assert (result.truth == -1).all()


def test_a_picture_without_boxes_beside_one_with_boxes_has_no_positive() -> None:
    scores = torch.full((2, 4, 2), 0.5)
    boxes = torch.tensor([[[0.0, 0, 8, 8]] * 4] * 2)
    result = assign(scores, boxes, POINTS, truth_of([], [(1, 0, 0, 8, 8)]))
    assert result.positive.tolist() == [[False] * 4, [True, False, False, False]]


def test_a_box_between_the_centres_has_no_positive() -> None:
    scores, boxes = predictions([[0, 0, 8, 8]] * 4, [[0.9]] * 4)
    assert not assign(scores, boxes, POINTS, truth_of([(0, 5.0, 5.0, 7.0, 7.0)])).positive.any()


def test_a_centre_on_the_boxs_edge_is_outside() -> None:
    scores, boxes = predictions([[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]], [[0.9]] * 4)
    result = assign(scores, boxes, POINTS, truth_of([(0, 0.0, 0.0, 12.0, 8.0)]))
    assert result.positive.tolist() == [[True, False, False, False]]


def test_one_truth_takes_two_positions_and_scales_their_targets_by_its_best_overlap() -> None:
    half = [0.0, 0, 16, 4]  # overlaps the truth by half
    scores, boxes = predictions([[0, 0, 16, 8], half, [0, 8, 8, 16], [8, 8, 16, 16]], [[0.0, 0.25], [0.0, 0.81], [0.0, 1.0], [0.0, 1.0]])
    result = assign(scores, boxes, POINTS, truth_of([(1, 0, 0, 16, 8)]))
    second = literal_ciou(half, [0, 0, 16, 8])
    assert result.positive.tolist() == [[True, True, False, False]]
    assert result.labels.tolist() == [[1, 1, 0, 0]]
    assert result.truth.tolist() == [[0, 0, -1, -1]]
    assert result.boxes[0, 1].tolist() == [0, 0, 16, 8]
    assert result.scores[0].tolist() == pytest.approx([1.0, 0.9 * second**6 / 0.5, 0, 0], rel=1e-5)


def test_a_position_wanted_by_two_truths_goes_to_the_one_it_overlaps_most() -> None:
    """The second truth is better aligned, its score being higher, yet overlap decides."""
    scores, boxes = predictions([[0, 0, 9, 9], [90, 90, 99, 99], [90, 90, 99, 99], [90, 90, 99, 99]], [[0.1, 1.0]] * 4)
    truth = truth_of([(1, 0, 0, 11, 11), (0, 0, 0, 9, 8)])
    result = assign(scores, boxes, POINTS, truth)
    assert result.truth[0].tolist() == [1, -1, -1, -1]
    assert result.labels[0].tolist() == [0, 0, 0, 0]


def test_a_truth_that_lost_its_positions_leaves_no_trace_in_the_targets() -> None:
    scores, boxes = predictions([[0, 0, 8, 8], [90, 90, 99, 99], [90, 90, 99, 99], [90, 90, 99, 99]], [[0.5, 0.5]] * 4)
    alone = assign(scores, boxes, POINTS, truth_of([(0, 0, 0, 8, 8)]))
    beaten = assign(scores, boxes, POINTS, truth_of([(0, 0, 0, 8, 8), (1, 0, 0, 8, 9)]))
    assert beaten.truth.tolist() == alone.truth.tolist()
    assert beaten.scores.tolist() == alone.scores.tolist()


def test_two_equal_truths_leave_a_tie_to_the_first() -> None:
    scores, boxes = predictions([[0, 0, 8, 8]] * 4, [[0.5, 0.5]] * 4)
    result = assign(scores, boxes, POINTS, truth_of([(1, 0, 0, 8, 8), (0, 0, 0, 8, 8)]))
    assert result.truth[0, 0] == 0
    assert result.labels[0, 0] == 1


def test_equally_aligned_positions_are_taken_up_to_ten() -> None:
    points, _ = anchor_points([torch.empty(1, 1, 8, 8), torch.empty(1, 1, 4, 4), torch.empty(1, 1, 2, 2)])
    boxes = torch.tensor([0.0, 0, 64, 64]).expand(1, len(points), 4)
    result = assign(torch.full((1, len(points), 1), 0.5), boxes, points, truth_of([(0, 0, 0, 64, 64)]))
    assert result.positive.sum() == TOP
    assert result.scores[result.positive].tolist() == pytest.approx([1.0] * TOP)


def test_a_truth_that_no_prediction_overlaps_asks_nothing_of_the_positions_it_takes() -> None:
    scores, boxes = predictions([[90, 90, 99, 99]] * 4, [[0.5]] * 4)
    result = assign(scores, boxes, POINTS, truth_of([(0, 0, 0, 16, 16)]))
    assert result.positive.all()
    assert result.scores.sum() == 0


def test_padding_rows_change_nothing() -> None:
    scores, boxes = predictions([[0, 0, 8, 8], [7, 0, 16, 8], [0, 8, 9, 16], [8, 8, 16, 16]], [[0.3, 0.6]] * 4)
    rows = [(1, 0.0, 0.0, 16.0, 9.0)]
    bare = assign(scores, boxes, POINTS, truth_of(rows))
    padded = truth_of(rows, [(0, 1, 1, 2, 2)] * 3)
    padded.boxes[0, 1:] = torch.tensor([0.0, 0, 16, 16])  # whatever stands there
    other = assign(scores.repeat(2, 1, 1), boxes.repeat(2, 1, 1), POINTS, padded)
    assert other.truth[0].tolist() == bare.truth[0].tolist()
    assert other.scores[0].tolist() == bare.scores[0].tolist()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_equals_the_rule_read_aloud_on_random_pictures(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, _ = anchor_points([torch.empty(1, 1, 6, 8), torch.empty(1, 1, 3, 4), torch.empty(1, 1, 2, 2)])
    corner = torch.rand(2, 4, 2, generator=generator) * 40 - 4
    truth = Truth(
        torch.cat([corner, corner + 4 + torch.rand(2, 4, 2, generator=generator) * 30], 2),
        torch.randint(0, 3, (2, 4), generator=generator),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    reach = 14 + torch.rand(2, len(points), 4, generator=generator) * 24
    boxes = torch.cat([points - reach[..., :2], points + reach[..., 2:]], 2)
    scores = torch.rand(2, len(points), 3, generator=generator)
    result = assign(scores, boxes, points, truth)
    for picture, expected in enumerate(literal_assign(scores, boxes, points, truth)):
        found = {
            spot: (result.truth[picture, spot].item(), result.scores[picture, spot].item())
            for spot in result.positive[picture].nonzero().flatten().tolist()
        }
        assert {spot: row for spot, (row, _) in found.items()} == {spot: row for spot, (row, _) in expected.items()}
        for spot, (_, target) in expected.items():
            assert found[spot][1] == pytest.approx(target, rel=1e-3, abs=1e-7)
