"""Each loss against a slow, literal transcription of its formula, its gradients, and what it must not depend on."""

import math

import pytest
import torch
from torch import Tensor

from crqat_fx.assign import Assignment
from crqat_fx.distill import feature_loss, relation_loss

LEVELS = ((6, 8), (3, 4), (2, 2))
CELLS = sum(height * width for height, width in LEVELS)
WIDTH, TEXTS = 7, 5
VARIANTS = ("full", "region-text", "region-region")


def maps(batch: int, seed: int, channels: int = WIDTH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *level, generator=generator, dtype=dtype) for level in LEVELS]


def texts(batch: int, seed: int = 9) -> Tensor:
    return torch.randn(batch, TEXTS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assignment(labels: Tensor) -> Assignment:
    """Of text slots [B, A]; -1 is no positive."""
    zeros = torch.zeros(labels.shape)
    return Assignment(labels >= 0, labels.clamp(min=0), zeros.unsqueeze(2).expand(-1, -1, 4), zeros, labels.clamp(max=0))


def groups_of_sizes(*pictures: dict[int, int], seed: int = 0) -> Tensor:
    """Labels with so many positives for each text, at random positions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((len(pictures), CELLS), -1)
    for row, sizes in enumerate(pictures):
        places = torch.randperm(CELLS, generator=generator).tolist()
        for label, size in sizes.items():
            for _ in range(size):
                labels[row, places.pop()] = label
    return labels


UNEVEN = groups_of_sizes({0: 1, 1: 2, 2: 3, 4: 17}, {}, {3: 33, 0: 9, 1: 8})


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def literal_relations(student: list[Tensor], teacher: list[Tensor], text: Tensor, labels: Tensor, variant: str) -> float:
    """The formula, a number at a time."""
    rows = [torch.cat([level.flatten(2) for level in levels], 2) for levels in (student, teacher)]
    losses = []
    for picture in range(len(labels)):
        for slot in sorted({int(label) for label in labels[picture] if label >= 0}):
            similarities = []
            for regions in rows:
                listed = [text[picture, slot]] + [regions[picture, :, place] for place in range(CELLS) if labels[picture, place] == slot]
                listed = [row / row.norm() for row in listed]
                similarities.append([[float(one @ other) for other in listed] for one in listed])
            of_student, of_teacher = similarities
            count = len(of_student)
            wanted = [
                (i, j) for i in range(count) for j in range(count) if variant == "full" or (variant == "region-text") == (i == 0 or j == 0)
            ]
            losses.append(sum(smooth_l1(of_student[i][j] - of_teacher[i][j]) for i, j in wanted) / len(wanted))
    return sum(losses) / len(losses)


def literal_features(student: list[Tensor], teacher: list[Tensor]) -> float:
    total = 0.0
    for of_student, of_teacher in zip(student, teacher, strict=True):
        batch, channels, height, width = of_student.shape
        squares = 0.0
        for channel in range(channels):
            scaled = []
            for levels in (of_student, of_teacher):
                values = levels[:, channel].flatten().tolist()
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
                scaled.append([(value - mean) / (deviation + 1e-6) for value in values])
            squares += sum((one - other) ** 2 for one, other in zip(*scaled, strict=True))
        total += 0.5 * squares / (batch * channels * height * width)
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_relations_equal_the_formula(variant: str) -> None:
    student, teacher, text = maps(3, 0), maps(3, 1), texts(3)
    found = relation_loss(student, teacher, text, assignment(UNEVEN), variant)
    assert found.item() == pytest.approx(literal_relations(student, teacher, text, UNEVEN, variant), rel=1e-12)


def test_features_equal_the_formula() -> None:
    student, teacher = maps(2, 0), maps(2, 1)
    assert feature_loss(student, teacher).item() == pytest.approx(literal_features(student, teacher), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_relations(variant: str) -> None:
    labels = groups_of_sizes({0: 1, 1: 3, 2: 4}, {2: 5})
    teacher, text = maps(2, 1), texts(2)
    student = [level.requires_grad_() for level in maps(2, 0)]
    assert torch.autograd.gradcheck(lambda *levels: relation_loss(levels, teacher, text, assignment(labels), variant), student)


def test_gradients_of_features() -> None:
    teacher = maps(2, 1, channels=2)
    assert torch.autograd.gradcheck(lambda *levels: feature_loss(levels, teacher), [level.requires_grad_() for level in maps(2, 0, 2)])


def test_a_student_like_its_teacher_costs_nothing() -> None:
    student, text = maps(3, 0), texts(3)
    assert feature_loss(student, student).item() == 0
    assert relation_loss(student, student, text, assignment(UNEVEN)).item() == 0


def test_without_a_positive_relations_cost_nothing_and_pull_at_nothing() -> None:
    student = [level.requires_grad_() for level in maps(2, 0)]
    loss = relation_loss(student, maps(2, 1), texts(2), assignment(torch.full((2, CELLS), -1)))
    loss.backward()
    assert loss.item() == 0
    assert all(level.grad is not None and not level.grad.any() for level in student)


def test_every_text_of_a_picture_weighs_the_same_whatever_the_number_of_its_regions() -> None:
    student, teacher, text = maps(3, 0), maps(3, 1), texts(3)
    parts = []
    for picture in range(3):
        for slot in UNEVEN[picture].unique().tolist():
            if slot >= 0:
                alone = torch.full_like(UNEVEN, -1)
                alone[picture] = torch.where(UNEVEN[picture] == slot, slot, -1)
                parts.append(relation_loss(student, teacher, text, assignment(alone)))
    assert len(parts) == 7
    assert relation_loss(student, teacher, text, assignment(UNEVEN)).item() == pytest.approx(torch.stack(parts).mean().item())


def test_the_same_pictures_twice_cost_the_same() -> None:
    student, teacher, text = maps(3, 0), maps(3, 1), texts(3)

    def twice(levels: list[Tensor]) -> list[Tensor]:
        return [torch.cat([level, level]) for level in levels]

    once = relation_loss(student, teacher, text, assignment(UNEVEN))
    doubled = relation_loss(twice(student), twice(teacher), *twice([text]), assignment(torch.cat([UNEVEN, UNEVEN])))
    assert doubled.item() == pytest.approx(once.item(), rel=1e-12)


def test_features_are_compared_whatever_a_channels_place_and_size() -> None:
    student, teacher = maps(2, 0), maps(2, 1)
    moved = [level * torch.rand(1, WIDTH, 1, 1, dtype=level.dtype).add(0.5) * 3 - 7 for level in student]
    assert feature_loss(moved, teacher).item() == pytest.approx(feature_loss(student, teacher).item(), rel=1e-5)


def test_lengths_of_regions_and_texts_do_not_count() -> None:
    student, teacher, text = maps(3, 0), maps(3, 1), texts(3)
    scaled = [level * 5 for level in student]
    once, again = (relation_loss(levels, teacher, t, assignment(UNEVEN)) for levels, t in ((student, text), (scaled, 2 * text)))
    assert again.item() == pytest.approx(once.item(), rel=1e-12)


def test_a_channel_that_is_one_number_has_a_finite_gradient() -> None:
    student = maps(2, 0)
    student[0][:, 1] = 3.0
    for level in student:
        level.requires_grad_()
    feature_loss(student, maps(2, 1)).backward()
    assert all(torch.isfinite(level.grad).all() for level in student)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_to_float32_whatever_autocast_says(half: torch.dtype) -> None:
    student, teacher = maps(3, 0, dtype=torch.float32), maps(3, 1, dtype=torch.float32)
    lowered = [[level.to(half) for level in levels] for levels in (student, teacher)]
    text = texts(3).float()
    raised = [[level.float() for level in levels] for levels in lowered]
    with torch.autocast("cpu", torch.bfloat16):
        cast = feature_loss(*lowered), relation_loss(*lowered, text, assignment(UNEVEN))
    plain = feature_loss(*raised), relation_loss(*raised, text, assignment(UNEVEN))
    for one, other in zip(cast, plain, strict=True):
        assert one.dtype == torch.float32
        assert one.item() == other.item()
