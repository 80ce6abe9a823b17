"""The drawn task: what is drawn, what is promised about it, and the two ways it leaves (batches, a written set)."""

import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from crqat_fx.data.coco import CocoSet
from crqat_fx.data.config import open_set, open_validation, open_vocabularies, read_data, texts_needed
from crqat_fx.data.samples import EvaluationSet
from crqat_fx.data.shapes import (
    BASE_COUNT,
    COLOURS,
    FILLS,
    NOVEL_COUNT,
    SHAPES,
    Piece,
    ShapesSet,
    ShapesTask,
    paint,
    write_coco,
)
from crqat_fx.data.shapes_batches import ShapesBatches
from crqat_fx.errors import UserError
from crqat_fx.vocabulary import Vocabulary

TASK = ShapesTask(seed=0, size=160)


def drawn_elsewhere(task: ShapesTask, split: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sample = task.draw(split, index)
    return sample.image, sample.boxes, sample.labels


def alone(piece: Piece, backdrop: int) -> np.ndarray:
    canvas = np.full((TASK.size, TASK.size, 3), backdrop, np.uint8)
    paint(canvas, piece)
    return canvas


def visible(piece: Piece) -> np.ndarray:
    """Pixels that the object changes on one of two grounds: none of it has the colour of both."""
    return (alone(piece, 64) != 64).any(axis=2) | (alone(piece, 192) != 192).any(axis=2)


def every_piece(side: float) -> list[Piece]:
    """Each shape in each fill, turned, at a place between pixels."""
    pieces = []
    for number, (shape, fill) in enumerate(itertools.product(SHAPES, FILLS)):
        angle = np.radians(number * 7 % 41 - 20)
        outline = SHAPES[shape] @ np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        outline = outline * side / np.ptp(outline, axis=0).max()
        outline = outline - outline.min(axis=0) + 30 + np.array([number * 0.37 % 1, number * 0.61 % 1])
        pieces.append(Piece(number, fill, list(COLOURS.values())[number % len(COLOURS)], outline, number * 0.3, (0.2, -0.3)))
    return pieces


# --- the vocabulary ---


def test_has_180_base_and_60_novel_compositions_none_alike():
    assert len(SHAPES) * len(COLOURS) * len(FILLS) == 432
    assert (len(TASK.base), len(TASK.novel)) == (BASE_COUNT, NOVEL_COUNT) == (180, 60)
    assert len(set(TASK.names)) == 240
    assert TASK.names == TASK.base + TASK.novel
    for name in TASK.names:
        fill, colour, shape = name.split(" ")
        assert fill in FILLS
        assert colour in COLOURS
        assert shape in SHAPES


@pytest.mark.parametrize("seed", range(5))
def test_every_part_of_a_novel_name_is_seen_in_a_base_name(seed):
    task = ShapesTask(seed)
    seen = {word for name in task.base for word in name.split()}
    assert {word for name in task.novel for word in name.split()} <= seen
    assert not set(task.novel) & set(task.base)


def test_another_seed_gives_another_task():
    assert ShapesTask(1).names != TASK.names
    assert not np.array_equal(ShapesTask(1).draw("train", 0).image, TASK.draw("train", 0).image)


def test_embeddings_are_of_length_one_and_near_where_names_share_parts():
    vocabulary = TASK.vocabulary
    assert isinstance(vocabulary, Vocabulary)
    assert vocabulary.names == TASK.names
    assert vocabulary.embeddings.shape == (240, 512)
    assert vocabulary.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vocabulary.embeddings, axis=1), 1, atol=1e-6)

    cosines = vocabulary.embeddings @ vocabulary.embeddings.T
    parts = np.array([name.split() for name in TASK.names])
    fill, colour, shape = (parts[:, None, k] == parts[None, :, k] for k in range(3))
    # Squared weights of the parts over that of the sum: 1, .7225, .49, .36 for what all share, .1225 for the phrase.
    for mask, expected in (
        (~shape & ~colour & ~fill, 0.36 / 2.695),
        (shape & ~colour & ~fill, 1.36 / 2.695),
        (~shape & colour & ~fill, 1.0825 / 2.695),
        (~shape & ~colour & fill, 0.85 / 2.695),
        (shape & colour & ~fill, 2.0825 / 2.695),
    ):
        assert cosines[mask].mean() == pytest.approx(expected, abs=0.03)
    assert cosines[~np.eye(240, dtype=bool)].max() < 0.95  # no two names are one


# --- pictures ---


def test_a_picture_is_the_same_in_another_process_and_in_any_order():
    here = [TASK.draw(split, index) for split, index in (("val", 7), ("train", 3), ("train", 2))]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        there = [executor.submit(drawn_elsewhere, ShapesTask(), split, index) for split, index in (("train", 2), ("train", 3), ("val", 7))]
        for sample, future in zip(reversed(here), there, strict=True):
            image, boxes, labels = future.result()
            np.testing.assert_array_equal(sample.image, image)
            np.testing.assert_array_equal(sample.boxes, boxes)
            np.testing.assert_array_equal(sample.labels, labels)
    assert not np.array_equal(here[1].image, here[2].image)
    assert not np.array_equal(TASK.draw("val", 3).image, here[1].image)


def test_a_sample_holds_what_its_contract_says():
    sample = TASK.draw("train", 0)
    assert sample.image.shape == (160, 160, 3)
    assert sample.image.dtype == np.uint8
    assert sample.boxes.dtype == np.float32
    assert sample.labels.dtype == np.int64
    assert sample.boxes.shape == (len(sample.labels), 4)
    assert sample.texts == TASK.names


def test_one_to_eight_objects_a_picture_within_it_and_never_mostly_hidden():
    counts = []
    for index in range(300):
        boxes = TASK.draw("train", index).boxes if index < 20 else np.array([piece.box for piece in TASK.layout("train", index)])
        counts.append(len(boxes))
        assert boxes.min() >= 0
        assert boxes.max() <= 160
        sizes = boxes[:, 2:] - boxes[:, :2]
        longest = sizes.max(axis=1)
        assert longest.min() > 19.99
        assert longest.max() < 80.01
        low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        common = np.triu(np.clip(high - low, 0, None).prod(axis=2), k=1)  # later boxes over earlier ones
        areas = sizes.prod(axis=1)
        assert (common <= 0.2501 * np.minimum(areas[:, None], areas[None])).all()
        assert (common.sum(axis=1) <= 0.4001 * areas).all()
    assert set(counts) == set(range(1, 9))
    assert 4.2 < np.mean(counts) < 4.7


def test_sizes_are_log_uniform():
    longest = np.concatenate(
        [[piece.side for piece in pieces] for pieces in (TASK.layout("train", index) for index in range(400)) if len(pieces) < 4]
    )
    # A quarter of the logarithm of 20..80 px is a factor of sqrt(2).
    shares = np.histogram(longest, 20 * np.sqrt(2) ** np.arange(5))[0] / len(longest)
    np.testing.assert_allclose(shares, 0.25, atol=0.08)


def test_another_size_draws_the_same_task():
    small, large = TASK.layout("val", 4), ShapesTask(size=320).layout("val", 4)
    assert [piece.label for piece in small] == [piece.label for piece in large]
    for first, second in zip(small, large, strict=True):
        np.testing.assert_allclose(first.box * 2, second.box, atol=1e-9)
    assert ShapesTask(size=320).draw("val", 4).image.shape == (320, 320, 3)


def test_the_long_tail_is_in_thirds_and_novel_names_are_never_drawn_for_training():
    drawn = {split: np.zeros(240, int) for split in ("train", "calibration", "val")}
    for split, counts in drawn.items():
        for index in range(1500):
            for piece in TASK.layout(split, index):
                counts[piece.label] += 1
    assert not drawn["train"][BASE_COUNT:].any()
    assert not drawn["calibration"][BASE_COUNT:].any()
    expected = TASK.probabilities("train") * drawn["train"].sum()
    assert expected.max() / expected.min() == pytest.approx((187 / 8) ** 1.3)
    assert (np.abs(drawn["train"][:BASE_COUNT] - expected) < 5 * np.sqrt(expected) + 5).all()
    thirds = drawn["train"][:BASE_COUNT].reshape(3, 60).sum(axis=1) / drawn["train"].sum()
    assert thirds[0] > 0.65
    assert thirds[0] > 3 * thirds[1] > 3 * 1.4 * thirds[2]
    assert [TASK.frequency(label) for label in (0, 59, 60, 119, 120, 179, 180, 239)] == [*"ffccrr", None, None]
    uniform = drawn["val"].sum() / 240
    assert (np.abs(drawn["val"] - uniform) < 5 * np.sqrt(uniform)).all()


@pytest.mark.parametrize("side", [20, 33.3, 80])
def test_boxes_are_tight_around_what_is_drawn(side):
    for piece in every_piece(side):
        rows, columns = (np.flatnonzero(visible(piece).any(axis=axis)) for axis in (1, 0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(seen - piece.box).max() <= 1, (piece.label, seen, piece.box)


@pytest.mark.parametrize("side", [20, 33.3, 80])
def test_a_shape_covers_the_area_of_its_outline_with_soft_edges(side):
    for piece in every_piece(side):
        solid = replace(piece, fill="solid", colour=(255, 255, 255))
        cover = alone(solid, 0)[:, :, 0] / 255
        x, y = piece.outline.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        perimeter = np.linalg.norm(piece.outline - np.roll(piece.outline, -1, axis=0), axis=1).sum()
        assert abs(cover.sum() - area) < 0.2 * perimeter
        assert ((cover > 0.1) & (cover < 0.9)).any()


@pytest.mark.parametrize("side", [20, 40])
def test_the_same_shape_looks_different_in_each_fill(side):
    pieces = every_piece(side)
    for first, second in itertools.combinations([replace(pieces[0], fill=fill) for fill in FILLS], 2):
        mean = np.abs(alone(first, 128).astype(int) - alone(second, 128).astype(int))[visible(replace(pieces[0], fill="solid"))].mean()
        assert mean > 10


def test_colours_are_far_apart():
    for first, second in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(first, second)) > 90


def test_an_object_is_drawn_in_the_colour_of_its_name():
    palette = np.array(list(COLOURS.values()))
    for index in range(40):
        sample = TASK.draw("val", index)
        # The last object is hidden by none; most of a solid one's middle is its colour.
        fill, colour, shape = TASK.names[sample.labels[-1]].split()
        if fill == "solid" and shape not in ("crescent", "hourglass"):
            x, y = ((sample.boxes[-1, :2] + sample.boxes[-1, 2:]) / 2).astype(int)
            nearest = np.abs(palette - sample.image[y, x].astype(int)).sum(axis=1).argmin()
            assert list(COLOURS)[nearest] == colour


class Bare(ShapesTask):
    """The task with nothing in its pictures but what lies behind the objects."""

    def layout(self, split: str, index: int) -> tuple[Piece, ...]:
        return ()


BARE = [Bare().draw("train", index).image for index in range(120)]


def test_the_ground_is_a_gradient():
    """Its coarse brightness varies in every picture."""
    coarse = [cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA).mean(axis=2).std() for image in BARE]
    assert min(coarse) > 8
    assert 20 < np.median(coarse) < 40


def straight_edges(image: np.ndarray) -> int:
    """Edges of at least 50 px that are no noise."""
    soft = cv2.medianBlur(image, 7)
    edges = np.max([cv2.Canny(np.ascontiguousarray(soft[:, :, channel]), 40, 80) for channel in range(3)], axis=0)
    found = cv2.HoughLinesP(edges, 1, np.pi / 180, 40, minLineLength=50, maxLineGap=3)
    return 0 if found is None else len(found)


def test_lines_clutter_the_ground_of_most_pictures_and_of_some_not():
    counts = np.array([straight_edges(image) for image in BARE])
    assert 0.6 < (counts > 0).mean() < 0.95
    assert np.median(counts) >= 2


def test_there_is_fine_and_coarse_grain_on_the_ground():
    """Neighbours differ as much as pixels that are far apart where the grain is of one pixel, and much less where it is of four."""
    strength, fineness = [], []
    for image in BARE:
        rest = image.astype(np.float32)
        rest -= cv2.blur(rest, (15, 15))
        apart = float(np.median(np.abs(rest[:, 6:] - rest[:, :-6])))
        strength.append(apart)
        fineness.append(float(np.median(np.abs(rest[:, 1:] - rest[:, :-1]))) / apart)
    assert 5 < np.median(strength) < 15
    assert 0.2 < np.mean(np.array(fineness) > 0.6) < 0.5
    assert 0.2 < np.mean(np.array(fineness) < 0.35) < 0.5


# --- training batches ---


def test_batches_are_as_their_contract_says():
    batches = ShapesBatches(TASK, count=64, batch=4, texts=40, seed=3)
    for step in range(20):
        batch = batches.at(step)
        assert batch.images.shape == (4, 3, 160, 160)
        assert batch.images.dtype == torch.uint8
        assert batch.text.shape == (4, 40, 512)
        assert batch.truth.valid.any(dim=1).all()
        assert (batch.truth.labels < 40).all()


def rows_of(text: torch.Tensor) -> np.ndarray:
    """Which name each text of a picture is, -1 for none."""
    same = torch.from_numpy(TASK.vocabulary.embeddings) @ text.T > 0.9999
    return np.where(same.any(dim=0), same.float().argmax(dim=0), -1)


def test_each_picture_gets_its_own_names_and_other_base_names_in_random_order():
    batches = ShapesBatches(TASK, count=64, batch=4, texts=30)
    first_slots = []
    for step in range(20):
        batch = batches.at(step)
        order = np.random.default_rng([0, 101, step // 16]).permutation(64)
        for row in range(4):
            names = rows_of(batch.text[row])
            assert (names >= 0).all()
            assert (names < BASE_COUNT).all()
            assert len(set(names)) == 30
            valid = batch.truth.valid[row]
            sample = TASK.draw("train", int(order[(step * 4 + row) % 64]))
            np.testing.assert_array_equal(names[batch.truth.labels[row][valid]], sample.labels)
            first_slots.append(int(batch.truth.labels[row][0]))
    assert len(set(first_slots)) > 15


def test_a_step_gives_the_same_batch_wherever_the_run_starts_and_however_little_is_kept():
    whole = list(itertools.islice(ShapesBatches(TASK, count=12, batch=4, seed=5).batches(), 8))
    resumed = ShapesBatches(TASK, count=12, batch=4, seed=5, memory=3 * 160 * 160 * 5).batches(start_step=5)
    for expected, found in zip(whole[5:], resumed, strict=False):
        assert torch.equal(expected.images, found.images)
        assert torch.equal(expected.text, found.text)
        assert torch.equal(expected.truth.boxes, found.truth.boxes)
        assert torch.equal(expected.truth.labels, found.truth.labels)
    assert not torch.equal(whole[0].images, next(ShapesBatches(TASK, count=12, batch=4, seed=6).batches()).images)


def test_the_fingerprint_follows_what_decides_the_batches():
    first = ShapesBatches(TASK, count=12).fingerprint
    assert ShapesBatches(ShapesTask(0, 160), count=12, memory=1 << 20).fingerprint == first
    others = ({"batch": 4}, {"texts": 30}, {"seed": 1}, {"split": "calibration"}, {"flip": 0.0}, {"brightness": 0.0}, {"count": 13})
    found = [ShapesBatches(TASK, **({"count": 12} | other)).fingerprint for other in others]
    found += [ShapesBatches(task, count=12).fingerprint for task in (ShapesTask(1), ShapesTask(size=192))]
    assert len({first, *found}) == 1 + len(found)


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own():
    batches = ShapesBatches(TASK, count=12, batch=5, flip=0, brightness=0)
    shown = np.concatenate([batches.at(step).images.permute(0, 2, 3, 1).numpy() for step in range(5)])[:24]
    pictures = [TASK.draw("train", index).image for index in range(12)]
    found = [next(index for index, picture in enumerate(pictures) if np.array_equal(picture, image)) for image in shown]
    assert sorted(found[:12]) == sorted(found[12:]) == list(range(12))
    assert found[:12] != found[12:]


def test_a_flip_mirrors_picture_and_boxes_and_keeps_the_names():
    plain = ShapesBatches(TASK, count=8, batch=8, flip=0, brightness=0).at(0)
    flipped = ShapesBatches(TASK, count=8, batch=8, flip=1, brightness=0).at(0)
    assert torch.equal(flipped.images, plain.images.flip(3))
    assert torch.equal(flipped.text, plain.text)
    assert torch.equal(flipped.truth.labels, plain.truth.labels)
    valid = plain.truth.valid
    expected = plain.truth.boxes[valid][:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([160.0, 0, 160, 0])
    assert torch.equal(flipped.truth.boxes[valid], expected)
    assert (expected[:, 2:] > expected[:, :2]).all()


def test_every_shape_is_drawn_both_ways_round():
    """So that a mirrored picture shows nothing that its name does not stand for."""
    turns: dict[str, set[bool]] = {shape: set() for shape in SHAPES}
    for index in range(300):
        for piece in TASK.layout("train", index):
            x, y = piece.outline.T
            turns[TASK.compositions[piece.label][2]].add(bool(np.dot(x, np.roll(y, -1)) > np.dot(y, np.roll(x, -1))))
    assert all(found == {True, False} for found in turns.values())


def test_brightness_scales_the_picture():
    plain = ShapesBatches(TASK, count=8, batch=8, flip=0, brightness=0).at(0).images.float()
    changed = ShapesBatches(TASK, count=8, batch=8, flip=0, brightness=0.2).at(0).images.float()
    middle = (plain > 60) & (plain < 200)
    gains = [float((new[mask] / old[mask]).median()) for new, old, mask in zip(changed, plain, middle, strict=True)]
    assert 0.79 < min(gains) < max(gains) < 1.21
    assert max(gains) - min(gains) > 0.05


# --- sets ---


def test_the_evaluation_set_is_coco_with_frequency_and_split():
    dataset: EvaluationSet = ShapesSet(TASK, "val", 30)
    assert len(dataset) == 30
    coco = dataset.coco
    assert [category["name"] for category in coco["categories"]] == list(TASK.names)
    assert [category["split"] for category in coco["categories"]] == ["base"] * 180 + ["novel"] * 60
    assert [category.get("frequency") for category in coco["categories"]] == ["f"] * 60 + ["c"] * 60 + ["r"] * 60 + [None] * 60
    assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"])
    for index, image in enumerate(coco["images"]):
        sample = TASK.draw("val", index)
        np.testing.assert_array_equal(dataset.picture(index), sample.image)
        own = [annotation for annotation in coco["annotations"] if annotation["image_id"] == image["id"]]
        xywh = np.array([annotation["bbox"] for annotation in own])
        np.testing.assert_allclose(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), sample.boxes, atol=1e-5)
        assert [annotation["category_id"] - 1 for annotation in own] == sample.labels.tolist()
        assert set(image["neg_category_ids"]) == set(range(1, 241)) - {annotation["category_id"] for annotation in own}
    with pytest.raises(IndexError):
        dataset.picture(30)


def test_a_written_set_is_read_back_as_it_was_drawn(tmp_path):
    counts = {"train": 60, "val": 5}
    seen: list[tuple[int, int]] = []
    data = write_coco(TASK, tmp_path / "set", counts, workers=2, progress=lambda done, total, _: seen.append((done, total)))
    assert data == tmp_path / "set" / "data.yaml"
    assert seen[-1] == (65, 65)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    vocabulary = Vocabulary.load(tmp_path / "set" / "vocabulary.npz")
    assert vocabulary.names == TASK.names
    np.testing.assert_array_equal(vocabulary.embeddings, TASK.vocabulary.embeddings)
    config = read_data(data)
    assert config.val is not None
    sets = {"train": config.train[0], "val": config.val}
    assert not set(texts_needed(config)) - set(open_vocabularies(config)[0].names)
    read, drawn = open_validation(config).coco, ShapesSet(TASK, "val", 5).coco
    assert read["images"] == drawn["images"]
    assert read["annotations"] == drawn["annotations"]
    known = ("id", "name", "frequency", "split")
    assert [{key: entry[key] for key in known if key in entry} for entry in read["categories"]] == drawn["categories"]
    for split, count in counts.items():
        dataset = open_set(sets[split])
        assert isinstance(dataset, CocoSet)
        assert len(dataset) == count
        assert not dataset.skipped
        assert not dataset.repaired
        for index in range(0, count, 4):
            sample = TASK.draw(split, index)
            boxes, labels, texts = dataset.truth(index)
            np.testing.assert_array_equal(dataset.picture(index), sample.image)
            np.testing.assert_allclose(boxes, sample.boxes, atol=1e-4)
            assert [texts[label][0] for label in labels] == [TASK.names[label] for label in sample.labels]


def test_a_written_training_set_knows_no_novel_name(tmp_path):
    write_coco(TASK, tmp_path / "set", {"train": 3, "calibration": 2}, workers=0)
    for split in ("train", "calibration"):
        text = (tmp_path / "set" / "annotations" / f"{split}.json").read_text(encoding="utf-8")
        assert [category["name"] for category in json.loads(text)["categories"]] == list(TASK.base)


def test_a_run_that_breaks_leaves_nothing_behind(tmp_path):
    def broken(done: int, total: int, text: str) -> None:
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        write_coco(TASK, tmp_path / "set", {"val": 2}, workers=0, progress=broken)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="no empty folder"):
        write_coco(TASK, tmp_path, {"val": 2}, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: ShapesTask(seed=-1), "cannot be negative"),
        (lambda: ShapesTask(size=100), "multiple of 32"),
        (lambda: TASK.draw("test", 0), "train, val, calibration"),
        (lambda: ShapesSet(TASK, "val", 0), "0 pictures"),
        (lambda: ShapesBatches(TASK, texts=300), "8 to 180"),
        (lambda: ShapesBatches(TASK, split="val"), "novel"),
        (lambda: ShapesBatches(TASK, batch=0), "batches of 0"),
        (lambda: write_coco(TASK, "nowhere", {}), "no split"),
        (lambda: write_coco(TASK, "nowhere", {"val": 0}), "0 pictures"),
    ],
)
def test_a_mistake_is_answered_in_one_line(mistake, message):
    with pytest.raises(UserError, match=message) as raised:
        mistake()
    assert "\n" not in str(raised.value)
