"""The texts of a training picture, and vocabularies becoming one."""

import numpy as np

from crqat_fx.data.texts import EMPTY, merged, sample_texts

CLASSES = tuple((f"class {i}",) for i in range(200))


def test_a_picture_gets_its_own_classes_and_negatives_up_to_the_slots() -> None:
    labels = np.array([7, 150, 7, 3])
    texts, slots = sample_texts(labels, CLASSES, 80, np.random.default_rng(0))
    assert len(texts) == len(set(texts)) == 80
    assert [texts[slot] for slot in slots] == ["class 7", "class 150", "class 7", "class 3"]


def test_negatives_are_drawn_from_all_classes_alike() -> None:
    counts = {texts[0]: 0 for texts in CLASSES}
    for seed in range(400):
        for text in sample_texts(np.array([0]), CLASSES, 50, np.random.default_rng(seed))[0]:
            counts[text] += 1
    assert counts.pop("class 0") == 400
    expected = 400 * 49 / 199
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_positives_stand_anywhere_among_the_slots() -> None:
    places = [int(sample_texts(np.array([5]), CLASSES, 80, np.random.default_rng(seed))[1][0]) for seed in range(300)]
    assert min(places) < 8
    assert max(places) > 71
    assert abs(np.mean(places) - 39.5) < 5


def test_a_caption_is_drawn_among_the_synonyms() -> None:
    classes = (("cat", "kitty", "puss"), ("dog",))
    drawn = [sample_texts(np.array([0]), classes, 2, np.random.default_rng(seed)) for seed in range(60)]
    assert {texts[slots[0]] for texts, slots in drawn} == {"cat", "kitty", "puss"}
    assert all("dog" in texts for texts, _ in drawn)


def test_slots_beyond_the_classes_are_empty_and_last() -> None:
    texts, slots = sample_texts(np.array([1, 0]), CLASSES[:3], 5, np.random.default_rng(1))
    assert sorted(texts[:3]) == ["class 0", "class 1", "class 2"]
    assert texts[3:] == (EMPTY, EMPTY)
    assert [texts[slot] for slot in slots] == ["class 1", "class 0"]


def test_more_classes_than_slots_leave_some_out() -> None:
    labels = np.arange(100).repeat(2)
    texts, slots = sample_texts(labels, CLASSES, 80, np.random.default_rng(0))
    assert (slots == -1).sum() == 40
    assert all(texts[slot] == f"class {label}" for slot, label in zip(slots, labels, strict=True) if slot >= 0)


def test_a_picture_without_boxes_and_classes_has_empty_texts() -> None:
    texts, slots = sample_texts(np.zeros(0, np.int64), (), 3, np.random.default_rng(0))
    assert texts == (EMPTY,) * 3
    assert slots.shape == (0,)


def test_classes_with_the_same_texts_become_one() -> None:
    vocabularies = [(("cat",), ("dog",)), (("bird",), ("cat",)), (), (("dog",), ("cat", "kitty"))]
    classes, places = merged(vocabularies)
    assert classes == (("cat",), ("dog",), ("bird",), ("cat", "kitty"))
    assert [rows.tolist() for rows in places] == [[0, 1], [2, 0], [], [1, 3]]


def test_one_vocabulary_merged_with_itself_stays() -> None:
    classes, places = merged([CLASSES] * 4)
    assert classes is CLASSES
    assert all((rows == np.arange(200)).all() for rows in places)
