"""data.yaml and the training batches made of it."""

import itertools
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_sets import COLOURS, NAMES, WIDTH, draw, save, write_coco, write_data, write_grounding, write_vocabulary

from crqat_fx.data.augment import Augmentation
from crqat_fx.data.batch import Batch
from crqat_fx.data.config import DataConfig, open_validation, read_data, texts_needed
from crqat_fx.data.loader import DetectionBatches, Samples
from crqat_fx.errors import UserError
from crqat_fx.vocabulary import Vocabulary

SMALL = Augmentation(size=64)
PLAIN = Augmentation(size=64, scale=0.0, translate=0.0, flip=0.0, hue=0.0, saturation=0.0, value=0.0)
PHRASES = ["a red cat", "a dog", *(f"cat {i}" for i in range(9))]


def coco_data(folder: Path, count: int = 6, **more: Any) -> DataConfig:
    """A data.yaml of one COCO set."""
    write_coco(folder / "animals", count)
    write_vocabulary(folder / "v.npz", NAMES)
    return write_data(
        folder, vocabularies="v.npz", train={"annotations": "animals/annotations.json", "pictures": "animals/pictures"} | more
    )


def mixed_data(folder: Path, weight: float = 1.0) -> DataConfig:
    """A COCO set of 6 pictures and a grounding set of 4."""
    write_coco(folder / "animals")
    write_grounding(folder / "grounding")
    write_vocabulary(folder / "v.npz", NAMES)
    write_vocabulary(folder / "phrases.npz", PHRASES)
    return write_data(
        folder,
        vocabularies=["v.npz", "phrases.npz"],
        train=[
            {"annotations": "animals/annotations.json", "pictures": "animals/pictures"},
            {
                "annotations": "grounding/annotations.json",
                "pictures": "grounding/pictures",
                "format": "grounding",
                "weight": weight,
            },
        ],
    )


def take(source: DetectionBatches, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(source.batches(start), count))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        pairs = ((left.images, right.images), (left.text, right.text), (left.truth.boxes, right.truth.boxes))
        for a, b in (*pairs, (left.truth.labels, right.truth.labels), (left.truth.valid, right.truth.valid)):
            assert torch.equal(a, b)


def embedding(folder: Path, name: str) -> np.ndarray:
    for file in ("v.npz", "phrases.npz"):
        vocabulary = Vocabulary.load(folder / file)
        if name in vocabulary.names:
            return vocabulary.embeddings[vocabulary.names.index(name)]
    raise KeyError(name)


# --- batches ---


def test_a_batch_has_pictures_texts_and_boxes_of_the_sizes_asked_for(tmp_path: Path) -> None:
    (batch,) = take(DetectionBatches(coco_data(tmp_path), batch=3, augmentation=SMALL, texts=5), 1)
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.text.shape == (3, 5, 8)
    assert batch.text.dtype == torch.float32
    assert batch.truth.labels.max() < 3
    assert batch.truth.valid.any()


def test_a_label_s_embedding_is_that_of_what_is_drawn_there(tmp_path: Path) -> None:
    """Through mosaic, text sampling, padding and batching: the colour at a box's middle tells its class, the class its embedding."""
    settings = Augmentation(size=64, hue=0.0, saturation=0.0, value=0.0)
    source = DetectionBatches(mixed_data(tmp_path), batch=4, augmentation=settings, texts=7)
    checked: Counter[str] = Counter()
    for batch in take(source, 12):
        for picture, slot in batch.truth.valid.nonzero().tolist():
            left, top, right, bottom = batch.truth.boxes[picture, slot].tolist()
            seen = batch.images[picture, :, int((top + bottom) / 2), int((left + right) / 2)].numpy().astype(int)
            colour = min(COLOURS, key=lambda name: float(np.abs(seen - COLOURS[name]).sum()))
            text = batch.text[picture, batch.truth.labels[picture, slot]].numpy()
            names = {"cat": ["cat", "a red cat", *PHRASES[2:]], "dog": ["dog", "a dog"], "bird": ["bird"]}[colour]
            assert any(np.array_equal(text, embedding(tmp_path, name)) for name in names)
            checked[colour] += 1
    assert min(checked[name] for name in NAMES) > 5


def test_mosaics_of_a_grounding_set_have_the_phrases_of_their_four_pictures(tmp_path: Path) -> None:
    write_grounding(tmp_path)
    write_vocabulary(tmp_path / "v.npz", PHRASES)
    config = write_data(
        tmp_path, vocabularies="v.npz", train={"annotations": "annotations.json", "pictures": "pictures", "format": "grounding"}
    )
    source = DetectionBatches(config, batch=1, augmentation=SMALL, texts=10, seed=3)
    for step in range(8):
        sample, _ = source.samples.sample(step, 0)
        named = [text for text in sample.texts if text]
        assert len(named) == len(set(named))
        assert {"a red cat", "a dog"} < set(named) < set(PHRASES)
        assert 3 <= len(named) <= 6  # the two that all share, and one of each of up to four pictures


def test_a_picture_of_a_very_long_side_is_trained_on(tmp_path: Path) -> None:
    def lengthen(content: dict[str, Any]) -> None:
        save(tmp_path / "animals" / "pictures" / "0.png", draw([("cat", (1_000, 0, 50_000, 32))], 60_000, 32))
        content["images"][0].update(width=60_000, height=32)
        content["annotations"][0].update(bbox=[1_000, 0, 50_000, 32])

    config = coco_data(tmp_path, 1)
    write_coco(tmp_path / "animals", 1, lengthen)
    for until in (None, 0):
        source = DetectionBatches(config, batch=2, augmentation=Augmentation(size=640), texts=4, mosaic_until=until)
        (batch,) = take(source, 1)
        assert batch.images.shape == (2, 3, 640, 640)
        assert not source.skipped


def test_slots_without_a_text_have_a_zero_embedding(tmp_path: Path) -> None:
    (batch,) = take(DetectionBatches(coco_data(tmp_path), batch=2, augmentation=SMALL, texts=5), 1)
    assert batch.text[:, 3:].abs().max() == 0
    assert batch.text[:, :3].norm(dim=2).allclose(torch.ones(2, 3))


def test_padding_names_the_embedding_of_slots_without_a_text(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    write_vocabulary(tmp_path / "v.npz", [*NAMES, "(empty)"])
    config = write_data(
        tmp_path,
        vocabularies="v.npz",
        padding="(empty)",
        train={"annotations": "animals/annotations.json", "pictures": "animals/pictures"},
    )
    (batch,) = take(DetectionBatches(config, batch=2, augmentation=SMALL, texts=5), 1)
    assert np.array_equal(batch.text[1, 4].numpy(), embedding(tmp_path, "(empty)"))


# --- determinism ---


def test_batches_are_the_same_with_no_worker_and_with_several(tmp_path: Path) -> None:
    config = mixed_data(tmp_path)
    alone = take(DetectionBatches(config, batch=3, augmentation=SMALL, texts=6, seed=4), 5)
    assert_same(alone, take(DetectionBatches(config, batch=3, augmentation=SMALL, texts=6, seed=4, workers=2), 5))


def test_workers_may_be_spawned(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    alone = take(DetectionBatches(config, batch=2, augmentation=SMALL, texts=4), 2)
    assert_same(alone, take(DetectionBatches(config, batch=2, augmentation=SMALL, texts=4, workers=1, start_method="spawn"), 2))


def test_a_stopped_training_goes_on_with_the_batches_it_would_have_seen(tmp_path: Path) -> None:
    config = mixed_data(tmp_path)
    whole = take(DetectionBatches(config, batch=3, augmentation=SMALL, texts=6), 9)
    assert_same(whole[6:], take(DetectionBatches(config, batch=3, augmentation=SMALL, texts=6), 3, start=6))


def test_another_seed_gives_other_batches(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    (one,) = take(DetectionBatches(config, batch=2, augmentation=SMALL, texts=4, seed=0), 1)
    (other,) = take(DetectionBatches(config, batch=2, augmentation=SMALL, texts=4, seed=1), 1)
    assert not torch.equal(one.images, other.images)


def test_drawing_batches_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    source = DetectionBatches(coco_data(tmp_path), batch=2, augmentation=SMALL, texts=4)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    take(source, 2)
    assert torch.equal(torch.rand(1), expected)


# --- the fingerprint ---


def test_the_fingerprint_is_the_same_elsewhere_and_with_other_workers(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    first = DetectionBatches(mixed_data(here), batch=2, augmentation=SMALL).fingerprint
    shutil.copytree(here, there)
    assert DetectionBatches(read_data(there / "data.yaml"), batch=2, augmentation=SMALL, workers=2).fingerprint == first
    assert 8 <= len(first) <= 32


def spoil_annotations(folder: Path) -> None:
    path = folder / "animals" / "annotations.json"
    path.write_text(path.read_text().replace("[4, 8, 30, 40]", "[4, 8, 30, 41]"))


@pytest.mark.parametrize(
    "change",
    [
        spoil_annotations,
        lambda folder: write_vocabulary(folder / "phrases.npz", reversed(PHRASES)),
        lambda folder: mixed_data(folder, weight=2.0),
        lambda folder: (folder / "data.yaml").write_text(
            (folder / "data.yaml").read_text().replace("animals/pictures", "animals/pictures\n  classes: [dog, cat, bird]")
        ),
        lambda folder: (folder / "data.yaml").write_text(f"{(folder / 'data.yaml').read_text()}padding: cat 8\n"),
    ],
    ids=["annotations", "vocabulary", "weight", "classes", "padding"],
)
def test_the_fingerprint_follows_what_decides_the_batches(tmp_path: Path, change: Callable[[Path], object]) -> None:
    before = DetectionBatches(mixed_data(tmp_path), batch=2).fingerprint
    change(tmp_path)
    assert DetectionBatches(read_data(tmp_path / "data.yaml"), batch=2).fingerprint != before


def test_the_fingerprint_follows_the_texts_of_the_classes(tmp_path: Path) -> None:
    found = set()
    for listed in ('[["cat"], ["dog"], ["bird"]]', '[["cat", "dog"], ["dog"], ["bird"]]'):
        config = coco_data(tmp_path, texts="texts.json")
        (tmp_path / "texts.json").write_text(listed)
        found.add(DetectionBatches(config, batch=2).fingerprint)
    assert len(found) == 2


def test_the_fingerprint_follows_the_settings(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    others = ({"batch": 3}, {"texts": 5}, {"seed": 1}, {"mosaic_until": 9}, {"augmentation": PLAIN})
    found = [DetectionBatches(config, **({"batch": 2} | other)).fingerprint for other in ({}, *others)]
    assert len(set(found)) == len(found)


# --- mixing ---


class Numbered:
    """A set whose picture i is a flat picture of grey level i."""

    def __init__(self, first: int, count: int) -> None:
        self.annotations = Path(f"numbered {first}")
        self.indices = np.arange(count)
        self._first = first

    def name(self, index: int) -> str:
        return str(index)

    def picture(self, index: int) -> np.ndarray:
        return np.full((64, 64, 3), self._first + index, np.uint8)

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray, tuple[tuple[str, ...], ...]]:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), (("a",),)


def shown(weights: list[float], places: range, mosaic_until: int = 0) -> Counter[int]:
    sets = [Numbered(0, 10), Numbered(100, 20)]
    samples = Samples(sets, weights, batch=4, texts=1, augmentation=PLAIN, mosaic_until=mosaic_until, seed=0)
    return Counter(int(samples.sample(*divmod(place, 4))[0].image[32, 32, 0]) for place in places)


def test_an_epoch_shows_each_picture_once(tmp_path: Path) -> None:
    for epoch in range(2):
        assert shown([1, 1], range(30 * epoch, 30 * epoch + 30)) == {**dict.fromkeys(range(10), 1), **dict.fromkeys(range(100, 120), 1)}


def test_a_weight_is_how_often_an_epoch_shows_a_picture(tmp_path: Path) -> None:
    counts = shown([2.5, 0.25], range(30))
    assert sorted(counts[level] for level in range(10)) == [2] * 5 + [3] * 5
    assert sum(counts[level] for level in range(100, 120)) == 5
    assert max(counts[level] for level in range(100, 120)) == 1


def test_another_epoch_repeats_other_pictures_of_a_fractional_weight() -> None:
    sets = [Numbered(0, 40)]
    samples = Samples(sets, [1.5], batch=4, texts=1, augmentation=PLAIN, mosaic_until=0, seed=0)
    levels = [int(samples.sample(*divmod(place, 4))[0].image[32, 32, 0]) for place in range(120)]
    counts = [Counter(levels[:60]), Counter(levels[60:])]
    first, second = ({level for level, count in epoch.items() if count == 2} for epoch in counts)
    assert [set(epoch) for epoch in counts] == [set(range(40))] * 2
    assert len(first) == len(second) == 20
    assert first != second
    assert max(first | second) >= 30  # and no set of the first ones


def test_sets_are_shuffled_together_and_anew_each_epoch(tmp_path: Path) -> None:
    sets = [Numbered(0, 10), Numbered(100, 20)]
    samples = Samples(sets, [1, 1], batch=1, texts=1, augmentation=PLAIN, mosaic_until=0, seed=0)
    order = [int(samples.sample(place, 0)[0].image[32, 32, 0]) for place in range(60)]
    assert order[:30] != order[30:]
    assert len({level >= 100 for level in order[:10]}) == 2


def test_a_mosaic_is_of_one_set(tmp_path: Path) -> None:
    sets = [Numbered(0, 10), Numbered(150, 20)]
    samples = Samples(sets, [1, 1], batch=4, texts=1, augmentation=PLAIN, mosaic_until=None, seed=0)
    mixed = 0
    for place in range(30):
        levels = np.unique(samples.sample(*divmod(place, 4))[0].image)
        levels = levels[levels != 114]
        assert levels.max() < 100 or levels.min() >= 100
        mixed += len(levels) > 1
    assert mixed > 20


def test_mosaics_end_at_their_step(tmp_path: Path) -> None:
    samples = Samples([Numbered(0, 10)], [1], batch=1, texts=1, augmentation=PLAIN, mosaic_until=6, seed=0)
    levels = [len(np.unique(samples.sample(step, 0)[0].image)) for step in range(12)]
    assert min(levels[:6]) > 1
    assert levels[6:] == [1] * 6


class Named(Numbered):
    """A set whose picture i shows one object on all of it, whose text is the picture's number."""

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray, tuple[tuple[str, ...], ...]]:
        others = tuple((f"other {i}",) for i in range(index % 3))
        return np.array([[0, 0, 64, 64]], np.float32), np.array([len(others)]), (*others, (str(index),))


def test_the_labels_of_a_mosaic_mean_the_merged_texts() -> None:
    samples = Samples([Named(0, 100)], [1], batch=1, texts=12, augmentation=PLAIN, mosaic_until=None, seed=0)
    pictures_seen = 0
    for step in range(20):
        sample, _ = samples.sample(step, 0)
        for box, label in zip(sample.boxes.astype(int), sample.labels, strict=True):
            middle = sample.image[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2, 0]
            assert sample.texts[label] == str(middle)
        pictures_seen += len(sample.boxes)
    assert pictures_seen > 50


def test_a_picture_is_augmented_anew_each_time() -> None:
    samples = Samples([Named(0, 1)], [1], batch=1, texts=12, augmentation=SMALL, mosaic_until=0, seed=0)
    assert len({samples.sample(step, 0)[0].boxes.tobytes() for step in range(10)}) > 5


# --- faults ---


def test_a_broken_picture_is_replaced_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = coco_data(tmp_path)
    (tmp_path / "animals" / "pictures" / "2.png").write_bytes(b"no picture")
    (tmp_path / "animals" / "pictures" / "3.png").unlink()
    source = DetectionBatches(config, batch=4, augmentation=SMALL, texts=4)
    with caplog.at_level(logging.WARNING):
        batches = take(source, 6)
    assert all(batch.images.shape == (4, 3, 64, 64) for batch in batches)
    assert source.skipped == {"picture that cannot be read": 2}
    assert len(caplog.records) == 2
    assert "2.png" in caplog.text
    assert "3.png" in caplog.text


def test_broken_pictures_met_by_workers_are_counted_too(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    (tmp_path / "animals" / "pictures" / "2.png").write_bytes(b"no picture")
    source = DetectionBatches(config, batch=4, augmentation=SMALL, texts=4, workers=2)
    take(source, 5)
    assert source.skipped == {"picture that cannot be read": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_readable_picture_is_an_error_not_an_endless_search(tmp_path: Path, workers: int) -> None:
    config = coco_data(tmp_path)
    for path in (tmp_path / "animals" / "pictures").iterdir():
        path.unlink()
    source = DetectionBatches(config, batch=2, augmentation=SMALL, texts=4, workers=workers)
    with pytest.raises(UserError, match="in a row cannot be read") as caught:
        take(source, 1)
    assert "Traceback" not in str(caught.value)


def test_faults_of_the_annotation_files_are_counted_with_the_source(tmp_path: Path) -> None:
    write_coco(tmp_path, change=lambda content: content["annotations"][0].update(category_id=5))
    write_vocabulary(tmp_path / "v.npz", NAMES)
    config = write_data(tmp_path, vocabularies="v.npz", train={"annotations": "annotations.json", "pictures": "pictures"})
    assert DetectionBatches(config, batch=1).skipped == {"annotation of a category that is not listed": 1}


def test_a_category_without_an_embedding_is_an_error_that_names_it(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    write_vocabulary(tmp_path / "v.npz", ["cat", "horse"])
    with pytest.raises(UserError, match=r"lack 2 of its texts: 'bird', 'dog'.*crqat-fx embed"):
        DetectionBatches(config, batch=1)


def test_a_phrase_without_an_embedding_is_an_error_that_names_it(tmp_path: Path) -> None:
    config = mixed_data(tmp_path)
    write_vocabulary(tmp_path / "phrases.npz", ["a red cat", *PHRASES[2:]])
    with pytest.raises(UserError, match=r"lack 1 of its texts: 'a dog'"):
        DetectionBatches(config, batch=1)


def test_vocabularies_of_different_widths_are_an_error(tmp_path: Path) -> None:
    config = mixed_data(tmp_path)
    write_vocabulary(tmp_path / "phrases.npz", PHRASES, width=16)
    with pytest.raises(UserError, match="16 numbers"):
        DetectionBatches(config, batch=1)


def test_a_set_of_pictures_too_small_to_train_on_is_an_error(tmp_path: Path) -> None:
    write_coco(tmp_path, change=lambda content: [image.update(width=20) for image in content["images"]] and None)
    write_vocabulary(tmp_path / "v.npz", NAMES)
    config = write_data(tmp_path, vocabularies="v.npz", train={"annotations": "annotations.json", "pictures": "pictures"})
    with pytest.raises(UserError, match="no picture of at least 32 px"):
        DetectionBatches(config, batch=1)


@pytest.mark.parametrize("spoilt", [{"iscrowd": 1}, {"bbox": [WIDTH + 20, 0, 10, 10]}], ids=["crowds", "outside"])
@pytest.mark.parametrize("write", [write_coco, write_grounding])
def test_a_set_without_a_box_to_train_on_is_an_error_that_names_it(
    tmp_path: Path, write: Callable[..., tuple[Path, Path]], spoilt: dict[str, Any]
) -> None:
    mixed_data(tmp_path)
    name = "grounding" if write is write_grounding else "animals"
    write(tmp_path / name, change=lambda content: [annotation.update(spoilt) for annotation in content["annotations"]] and None)
    with pytest.raises(UserError, match=rf"{name}.annotations.json: has no box to train on"):
        DetectionBatches(read_data(tmp_path / "data.yaml"), batch=1)


def test_boxes_on_pictures_too_small_to_train_on_do_not_count(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"][1].update(width=20)
        content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] == 101]

    config = coco_data(tmp_path, 2)
    write_coco(tmp_path / "animals", 2, change)
    with pytest.raises(UserError, match="has no box to train on"):
        DetectionBatches(config, batch=1)


def test_senseless_numbers_are_errors(tmp_path: Path) -> None:
    config = coco_data(tmp_path)
    for numbers in ({"batch": 0}, {"batch": 1, "texts": 0}, {"batch": 1, "workers": -1}, {"batch": 1, "seed": -1}):
        with pytest.raises(UserError):
            DetectionBatches(config, **numbers)


# --- data.yaml ---


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = coco_data(tmp_path, weight=2, classes=["cat"])
    (one,) = config.train
    assert one.annotations == tmp_path / "animals" / "annotations.json"
    assert config.vocabularies == (tmp_path / "v.npz",)
    assert (one.weight, one.classes, one.format, one.texts) == (2.0, ("cat",), "coco", None)


def test_the_texts_needed_are_all_captions_and_the_names_evaluation_asks_for(tmp_path: Path) -> None:
    mixed_data(tmp_path)
    (tmp_path / "texts.json").write_text('[["cat", "kitty"], ["cat", "wolf"], ["bird"]]')
    animals = {"annotations": "animals/annotations.json", "pictures": "animals/pictures"}
    grounding = {"annotations": "grounding/annotations.json", "pictures": "grounding/pictures", "format": "grounding"}
    config = write_data(tmp_path, train=[animals, grounding], val=animals | {"texts": "texts.json"})
    verbatim = {text: text for text in (*NAMES, *PHRASES[:6])}
    assert texts_needed(config) == verbatim | {"cat/kitty": "cat", "cat/wolf": "cat"}


def test_the_padding_is_needed_as_the_empty_text_s_embedding(tmp_path: Path) -> None:
    write_coco(tmp_path)
    config = write_data(tmp_path, padding="(empty)", train={"annotations": "annotations.json", "pictures": "pictures"})
    assert texts_needed(config) == {"(empty)": "", "bird": "bird", "cat": "cat", "dog": "dog"}


def test_a_padding_that_is_a_text_of_a_set_is_an_error(tmp_path: Path) -> None:
    coco_data(tmp_path)
    config = write_data(
        tmp_path, vocabularies="v.npz", padding="dog", train={"annotations": "animals/annotations.json", "pictures": "animals/pictures"}
    )
    for use in (texts_needed, lambda config: DetectionBatches(config, batch=1)):
        with pytest.raises(UserError, match="padding 'dog' is a text of its sets"):
            use(config)


def test_a_padding_without_an_embedding_is_an_error(tmp_path: Path) -> None:
    coco_data(tmp_path)
    config = write_data(
        tmp_path, vocabularies="v.npz", padding="(none)", train={"annotations": "animals/annotations.json", "pictures": "animals/pictures"}
    )
    with pytest.raises(UserError, match=r"padding '\(none\)' is in none of the vocabularies; .*crqat-fx embed"):
        DetectionBatches(config, batch=1)


def test_the_set_to_evaluate_on_is_opened_in_its_format(tmp_path: Path) -> None:
    write_coco(tmp_path)
    config = write_data(tmp_path, val={"annotations": "annotations.json", "pictures": "pictures", "classes": ["dog"]})
    assert open_validation(config).names == ("dog",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trian: []", "unknown key 'trian'"),
        ("train: {annotations: a, pictures: b, wieght: 1}", "train: unknown key 'wieght'"),
        ("train: {pictures: b}", "train: annotations is None"),
        ("train: [a]", "train is 'a'"),
        ("train: {annotations: a, pictures: b, format: voc}", "format is 'voc'.*coco, objects365, lvis, grounding"),
        ("train: {annotations: a, pictures: b, format: [1]}", "format is"),
        ("train: {annotations: a, pictures: b, weight: 0}", "weight is 0"),
        ("train: {annotations: a, pictures: b, weight: .nan}", "weight is nan"),
        ("train: {annotations: a, pictures: b, classes: cat}", "classes is 'cat'"),
        ("train: {annotations: a, pictures: b, format: grounding, texts: t.json}", "takes no texts"),
        ("val: {annotations: a, pictures: b, format: grounding}", "cannot be evaluated on"),
        ("val: {annotations: a, pictures: b, weight: 2}", "val: weight"),
        ("vocabularies: 3", "vocabularies is 3"),
        ("padding: ''", "padding is ''"),
        ("train: [", "no readable YAML"),
        ("- train", "no mapping|not a mapping"),
    ],
)
def test_a_faulty_data_yaml_is_an_error_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_data(path)
    assert "data.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"), [({}, "no set to train on"), ({"train": {"annotations": "a", "pictures": "b"}}, "no vocabulary")]
)
def test_training_without_a_set_or_a_vocabulary_is_an_error(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DetectionBatches(write_data(tmp_path, **keys), batch=1)


def test_evaluation_without_a_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no set to evaluate on"):
        open_validation(write_data(tmp_path))
