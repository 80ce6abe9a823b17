import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_assign import literal_ciou
from torch import Tensor, nn
from truths import truth_of
from weights_from_names import reference_inputs, weights_from_names

from crqat_fx.assign import Assignment, ciou
from crqat_fx.losses import Losses, box_losses, detection_loss
from crqat_fx.models.yolo_world import STRIDES, build

REFERENCE = Path(__file__).parent / "data" / "loss_v1_s.npz"
LEVELS = tuple(64 // stride for stride in STRIDES)


@dataclass(frozen=True)
class Parity:
    expected: dict[str, np.ndarray]
    losses: Losses
    assignment: Assignment
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def parity() -> Parity:
    with np.load(REFERENCE) as archive:
        expected = {name: archive[name] for name in archive.files}
    model = build("s", 1).eval()
    model.load_state_dict(weights_from_names(model.state_dict()))
    images, text = reference_inputs(2, 320, 256, 80, seed=321)
    rows: tuple[list, list] = ([], [])
    for image, label, *box in expected["gts_image_label_xyxy"].tolist():
        rows[int(image)].append((int(label), *box))
    logits, bins, _ = model(images, text)
    losses, assignment = detection_loss(logits, bins, truth_of(*rows))
    losses.total.backward()
    return Parity(expected, losses, assignment, {name: parameter.grad for name, parameter in model.named_parameters()})


def outputs(batch: int = 2, texts: int = 3, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, texts, side, side, generator=generator).requires_grad_() for side in LEVELS]
    bins = [torch.randn(batch, 64, side, side, generator=generator).requires_grad_() for side in LEVELS]
    return logits, bins


TRUTH = truth_of([(0, 4, 4, 30, 30), (2, 20, 10, 60, 50)], [(1, 0, 0, 64, 64)])


@pytest.mark.parametrize(("term", "name"), [("cls", "loss_cls"), ("box", "loss_bbox"), ("dfl", "loss_dfl")])
def test_losses_equal_the_published_ones(parity: Parity, term: str, name: str) -> None:
    assert parity.losses.terms[term].item() == pytest.approx(float(parity.expected[f"loss/{name}"]), rel=1e-4)


def test_the_assignment_equals_the_published_one(parity: Parity) -> None:
    positive = parity.assignment.positive.numpy()
    assert positive.sum() == 60
    np.testing.assert_array_equal(positive, parity.expected["assign/positive"])
    np.testing.assert_array_equal(parity.assignment.labels.numpy()[positive], parity.expected["assign/labels_of_positives"])
    np.testing.assert_array_equal(parity.assignment.boxes.numpy()[positive], parity.expected["assign/boxes_of_positives"])
    np.testing.assert_allclose(parity.assignment.scores.numpy()[positive], parity.expected["assign/scores_of_positives"], rtol=1e-4)


def test_gradients_equal_the_published_ones(parity: Parity) -> None:
    names = [name.removeprefix("grad/") for name in parity.expected if name.startswith("grad/")]
    assert len(names) == 8
    for name in names:
        expected = torch.from_numpy(parity.expected[f"grad/{name}"])
        assert (parity.gradients[name] - expected).abs().max() <= 1e-3 * expected.abs().max(), name


def test_without_boxes_only_the_negatives_cost() -> None:
    logits, bins = outputs()
    losses, assignment = detection_loss(logits, bins, truth_of([], []))
    losses.total.backward()
    expected = 2 * 0.5 * sum(F.binary_cross_entropy_with_logits(level, torch.zeros_like(level), reduction="sum") for level in logits)
    assert not assignment.positive.any()
    assert losses.cls.item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.box.item() == losses.dfl.item() == 0
    assert all((level.grad == 0).all() for level in bins)


def test_a_box_smaller_than_a_cell_that_holds_a_centre_trains() -> None:
    logits, bins = outputs(batch=1)
    bins[0].data[0, ::16, 0, 0] = 6.0  # about bin 0 on every side: a tiny box around the centre (4, 4)
    losses, assignment = detection_loss(logits, bins, truth_of([(1, 3, 3, 5, 5)]))
    losses.total.backward()
    assert assignment.positive.sum() == 1
    assert all(torch.isfinite(level.grad).all() for level in (*logits, *bins))


def test_the_classification_loss_is_bce_against_the_assigned_scores() -> None:
    logits, bins = outputs()
    losses, assignment = detection_loss(logits, bins, TRUTH)
    scores = torch.cat([level.flatten(2) for level in logits], 2).transpose(1, 2)
    targets = F.one_hot(assignment.labels, 3) * assignment.scores.unsqueeze(2)
    expected = 2 * 0.5 * F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / max(assignment.scores.sum().item(), 1)
    assert assignment.scores.sum() > 0
    assert losses.cls.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_text_that_only_pads_costs_as_one_more_negative() -> None:
    logits, bins = outputs()
    whole, assignment = detection_loss(logits, bins, TRUTH)
    padded, _ = detection_loss([torch.cat([level, torch.full_like(level[:, :1], 3.0)], 1) for level in logits], bins, TRUTH)
    padding = torch.full((2, sum(side * side for side in LEVELS)), 3.0)
    cost = 2 * 0.5 * F.softplus(padding).sum() / max(assignment.scores.sum().item(), 1)
    assert padded.cls.item() - whole.cls.item() == pytest.approx(cost.item(), rel=1e-4)
    assert (padded.box.item(), padded.dfl.item()) == (whole.box.item(), whole.dfl.item())


def test_the_losses_are_float32_under_autocast_and_as_exact_as_without() -> None:
    logits, bins = outputs()
    half_logits, half_bins = [level.bfloat16() for level in logits], [level.bfloat16() for level in bins]
    plain, _ = detection_loss([level.float() for level in half_logits], [level.float() for level in half_bins], TRUTH)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = detection_loss(half_logits, half_bins, TRUTH)
    for name, term in cast.terms.items():
        assert term.dtype == torch.float32
        assert term.item() == plain.terms[name].item()


def test_dfl_of_a_hand_computed_box() -> None:
    """Distances 2, 2.25, 15 (beyond the last bin: 14.99) and 0 under the uniform distribution and under one that is right."""
    centre, box = torch.tensor([[10.0, 10.0]]), torch.tensor([[8.0, 7.75, 26.0, 10.0]])
    uniform = torch.zeros(1, 4, 16)
    assert box_losses(uniform, centre, box)[1].item() == pytest.approx(4 * math.log(16), rel=1e-6)
    right = torch.full((1, 4, 16), -50.0)
    right[0, 0, 2] = right[0, 3, 0] = 0
    right[0, 1, 2], right[0, 1, 3] = math.log(0.75), math.log(0.25)
    right[0, 2, 14], right[0, 2, 15] = math.log(0.01), math.log(0.99)
    entropies = sum(-p * math.log(p) for p in (0.75, 0.25, 0.01, 0.99))
    assert box_losses(right, centre, box)[1].item() == pytest.approx(entropies, rel=1e-4)


def test_the_box_loss_is_the_ciou_of_the_expected_distances() -> None:
    centre, box = torch.tensor([[10.0, 10.0]]), torch.tensor([[6.0, 7.0, 12.0, 13.0]])
    predicted = torch.zeros(1, 4, 16)  # uniform: distance 7.5 on every side
    assert box_losses(predicted, centre, box)[0].item() == pytest.approx(1 - literal_ciou([2.5, 2.5, 17.5, 17.5], [6, 7, 12, 13]), rel=1e-5)


def test_dfl_passes_gradcheck() -> None:
    sides = torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    centres = torch.tensor([[5.0, 5], [7, 9], [3, 3]], dtype=torch.float64)
    boxes = torch.tensor([[1.3, 2, 8, 7.7], [0, 0, 20, 20], [2.5, 2.5, 3.5, 3.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: box_losses(x, centres, boxes)[1], (sides,))


def test_ciou_has_the_gradient_of_its_formula_with_alpha_constant() -> None:
    first = torch.tensor([1.0, 2.0, 7.5, 6.0], dtype=torch.float64)
    second = torch.tensor([2.0, 1.0, 6.0, 8.0], dtype=torch.float64)

    def aspect(a: Tensor) -> Tensor:
        return 4 / math.pi**2 * (math.atan(4 / 7) - torch.atan((a[2] - a[0]) / (a[3] - a[1]))) ** 2

    def plain(a: Tensor) -> Tensor:
        """CIoU without its last term."""
        w, h = (
            torch.minimum(a[2], second[2]) - torch.maximum(a[0], second[0]),
            torch.minimum(a[3], second[3]) - torch.maximum(a[1], second[1]),
        )
        iou = w * h / ((a[2] - a[0]) * (a[3] - a[1]) + 28 - w * h)
        enclosing = (torch.maximum(a[2], second[2]) - torch.minimum(a[0], second[0])) ** 2
        enclosing = enclosing + (torch.maximum(a[3], second[3]) - torch.minimum(a[1], second[1])) ** 2
        return iou - (((a[0] + a[2]) / 2 - 4) ** 2 + ((a[1] + a[3]) / 2 - 4.5) ** 2) / enclosing

    v, iou = aspect(first), 4 * 4 / (6.5 * 4 + 28 - 16)
    alpha = (v / (v - iou + 1)).item()
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    numeric = [((plain(first + d) - alpha * aspect(first + d)) - (plain(first - d) - alpha * aspect(first - d))) / 2e-6 for d in step]
    leaf = nn.Parameter(first.clone())
    ciou(leaf, second).backward()
    assert leaf.grad.tolist() == pytest.approx([n.item() for n in numeric], rel=1e-4)
