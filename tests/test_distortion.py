"""Distortion against a teacher: the relations by hand, the measurement against its definition spelled out, and its pictures."""

import copy
import inspect
import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from listed_set import ListedSet
from matplotlib.colors import to_rgb

from crqat_fx.assign import assign
from crqat_fx.data.batch import Truth
from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.distortion import (
    Distortion,
    DistortionResult,
    Example,
    Histogram,
    confidence_relations,
    distortion,
    embedding_relations,
    mean_to_others,
    pearson,
    region_region,
    region_text,
)
from crqat_fx.errors import UserError
from crqat_fx.models.yolo_world import YoloWorld, anchor_points, build, config_for, decode_boxes, flatten_levels
from crqat_fx.plots import STUDENT, TEACHER, distributions_figure, heatmaps_figure, scatter_figure, write_plots
from crqat_fx.vocabulary import Vocabulary

TASK = ShapesTask(size=96)
SHAPES = ShapesSet(TASK, "val", 5)


@pytest.fixture(scope="module")
def teacher() -> YoloWorld:
    return random_model(1)


@pytest.fixture(scope="module")
def student(teacher: YoloWorld) -> YoloWorld:
    return disturbed(teacher, "")


def random_model(version: int) -> YoloWorld:
    """One whose regions differ from place to place, for its BatchNorms know the drawn pictures, and whose scores are spread over (0, 1)."""
    torch.manual_seed(version)
    model = build("pico", version)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average over all that is seen
    images = torch.from_numpy(np.stack([SHAPES.picture(index) for index in range(5)])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        for contrast in model.bbox_head.head_module.cls_contrasts:
            contrast.bias.fill_(-1.0)
        model.train()(images, torch.from_numpy(TASK.vocabulary.embeddings).expand(5, -1, -1))
    return model.eval()


def disturbed(model: YoloWorld, part: str) -> YoloWorld:
    """A copy whose parameters in `part` are 30% noise."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if part in name:
                parameter.add_(0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return other


def compare(student: YoloWorld, teacher: YoloWorld, dataset=SHAPES, **options) -> DistortionResult:
    return distortion(student, teacher, dataset, TASK.vocabulary, size=96, **options)


def values(result: DistortionResult) -> np.ndarray:
    return np.stack([getattr(kind, space) for kind in (result.region_text, result.region_region) for space in ("embedding", "confidence")])


# --- relations ---


def test_embedding_relations_are_cosines_with_the_text_first():
    relations = embedding_relations(torch.tensor([2.0, 0.0]), torch.tensor([[0.0, 3.0], [1.0, 1.0], [-5.0, 0.0]]))
    half = math.sqrt(0.5)
    assert region_text(relations).tolist() == pytest.approx([0, half, -1])
    assert region_region(relations).tolist() == pytest.approx([half, 0, -half])  # (1,2), (1,3), (2,3)
    assert mean_to_others(relations).tolist() == pytest.approx([half / 2, 0, -half / 2], abs=1e-7)


def test_confidence_relations_hold_the_texts_score_and_cosines_of_score_vectors():
    scores = torch.tensor([[0.6, 0.8, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.5]])
    relations = confidence_relations(scores, slot=1)
    assert region_text(relations).tolist() == pytest.approx([0.8, 0.4, 0.0])
    assert region_region(relations).tolist() == pytest.approx([1, 0, 0])
    assert torch.equal(relations, relations.T)


def test_a_region_alone_has_no_relation_to_others():
    relations = embedding_relations(torch.ones(4), torch.ones(1, 4))
    assert len(region_text(relations)) == 1
    assert len(region_region(relations)) == 0
    assert mean_to_others(relations).isnan().all()


def test_pearson_equals_numpys_where_both_are_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = 0.5 * x + rng.normal(size=40)
    expected = np.corrcoef(x, y)[0, 1]
    with_gaps = np.concatenate([[np.nan, 7.0], x]), np.concatenate([[3.0, np.nan], y])
    assert pearson(*with_gaps) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(pearson(np.ones(5), y[:5]))
    assert math.isnan(pearson(x[:1], y[:1]))


# --- measurement ---


def by_definition(student: YoloWorld, teacher: YoloWorld, index: int) -> list[float]:
    """The four distortions of one picture of the drawn task, entry by entry."""
    coco, text = SHAPES.coco, TASK.vocabulary.embeddings.astype(np.float64)
    objects = [a for a in coco["annotations"] if a["image_id"] == coco["images"][index]["id"]]
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)])[None]
    labels = torch.tensor([a["category_id"] - 1 for a in objects])[None]
    image = torch.from_numpy(SHAPES.picture(index)).permute(2, 0, 1)[None].float() / 255
    outputs = []
    with torch.no_grad():
        for model in (teacher, student):
            logits, bins, regions = model(image, torch.from_numpy(TASK.vocabulary.embeddings)[None])
            outputs.append((flatten_levels(logits).sigmoid(), decode_boxes(bins), flatten_levels(regions)))
        truth = Truth(boxes, labels, torch.ones_like(labels, dtype=torch.bool))
        assignment = assign(outputs[0][0], outputs[0][1], anchor_points(logits)[0], truth)
    sums: dict[int, list[float]] = {kind: [] for kind in range(4)}
    for label in sorted(set(labels[0].tolist())):
        chosen = np.flatnonzero((assignment.positive[0] & (assignment.labels[0] == label)).numpy())
        errors: dict[int, list[float]] = {kind: [] for kind in range(4)}
        scores = [out[0][0].double().numpy() for out in outputs]
        regions = [out[2][0].double().numpy() for out in outputs]
        for i in chosen:
            errors[0].append(abs(cosine(regions[0][i], text[label]) - cosine(regions[1][i], text[label])))
            errors[1].append(abs(scores[0][i, label] - scores[1][i, label]))
            for j in chosen:
                if i != j:
                    errors[2].append(abs(cosine(regions[0][i], regions[0][j]) - cosine(regions[1][i], regions[1][j])))
                    errors[3].append(abs(cosine(scores[0][i], scores[0][j]) - cosine(scores[1][i], scores[1][j])))
        for kind, of_text in errors.items():
            if of_text:
                sums[kind].append(float(np.mean(of_text)))
    return [float(np.mean(of_kind)) for of_kind in sums.values()]


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("version", [1, 2])
def test_the_measurement_equals_its_definition_spelled_out(version):
    teacher = random_model(version)
    student = disturbed(teacher, "")
    result = compare(student, teacher, limit=2, batch_size=2)
    expected = np.array([by_definition(student, teacher, index) for index in range(2)]).T
    assert values(result) == pytest.approx(expected, rel=1e-4)
    assert (expected > 1e-4).all()
    assert result.pictures == ("000000.png", "000001.png")


def test_a_model_is_not_distorted_against_itself(teacher):
    assert values(compare(copy.deepcopy(teacher), teacher)).max() < 1e-7


def test_a_single_picture_has_distortions_and_no_correlation(student, teacher):
    of_text = compare(student, teacher, limit=1).as_dict()["region_text"]
    assert of_text["embedding"] > 0
    assert of_text["pearson"] is None


def test_the_batch_changes_nothing_and_the_limit_counts_pictures(student, teacher):
    steps = []
    whole = compare(student, teacher, limit=3, batch_size=2, progress=lambda *step: steps.append(step))
    single = compare(student, teacher, limit=3, batch_size=1)
    assert values(whole) == pytest.approx(values(single), abs=1e-6)
    assert len(whole.pictures) == 3
    assert steps == [(2, 3, "pictures"), (3, 3, "pictures")]


def test_the_scale_of_regions_is_no_distortion():
    teacher = random_model(1)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for tower in student.bbox_head.head_module.cls_preds:
            tower[2].weight.mul_(3)
            tower[2].bias.mul_(3)
    assert values(compare(student, teacher)).max() < 1e-5


def test_positions_come_from_the_teachers_boxes_and_not_from_the_students(student, teacher):
    usual = values(compare(student, teacher))
    assert (values(compare(disturbed(student, "reg_preds"), teacher)) == usual).all()
    assert not np.allclose(values(compare(student, disturbed(teacher, "reg_preds"))), usual)


def test_regions_are_those_that_meet_the_text_after_the_heads_norm_in_v2():
    teacher = random_model(2)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for contrast in student.bbox_head.head_module.cls_contrasts:
            contrast.norm.bias.add_(0.5 * torch.randn(512, generator=torch.Generator().manual_seed(0)))
    assert compare(student, teacher).region_region.embedding.min() > 1e-3


def test_histograms_count_every_relation_of_both_models(student, teacher):
    result = compare(student, teacher)
    for space in ("embedding", "confidence"):
        texts, pairs = result.histograms["region_text"][space], result.histograms["region_region"][space]
        assert texts.teacher.sum() == texts.student.sum() == result.anchors
        assert pairs.teacher.sum() == pairs.student.sum() > result.anchors
        assert (texts.teacher != texts.student).any()
    middle = (texts.edges[1:] + texts.edges[:-1]) / 2
    assert (middle * texts.teacher).sum() / texts.teacher.sum() == pytest.approx(mean_confidence(teacher), abs=0.01)


def mean_confidence(teacher: YoloWorld) -> float:
    total, count = 0.0, 0
    for index in range(len(SHAPES)):
        objects = [a for a in SHAPES.coco["annotations"] if a["image_id"] == index + 1]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)])[None]
        labels = torch.tensor([a["category_id"] - 1 for a in objects])[None]
        image = torch.from_numpy(SHAPES.picture(index)).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            logits, bins, _ = teacher(image, torch.from_numpy(TASK.vocabulary.embeddings)[None])
        scores = flatten_levels(logits).sigmoid()
        found = assign(
            scores, decode_boxes(bins), anchor_points(logits)[0], Truth(boxes, labels, torch.ones_like(labels, dtype=torch.bool))
        )
        total += float(scores[0, found.positive[0], found.labels[0, found.positive[0]]].sum())
        count += int(found.positive.sum())
    return total / count


# --- odd sets ---


def cat_set(*annotations: dict[str, object], picture: np.ndarray | None) -> ListedSet:
    images = [{"id": 7, "file_name": "cat.png", "width": 80, "height": 40}]
    rows = [{"id": index + 1, "image_id": 7, "category_id": 3, "iscrowd": 0} | annotation for index, annotation in enumerate(annotations)]
    return ListedSet({"images": images, "categories": [{"id": 3, "name": "cat"}], "annotations": rows}, (picture,))


def cat_distortion(student: YoloWorld, teacher: YoloWorld, dataset: ListedSet) -> DistortionResult:
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(("dog", "cat"), unit(rng.normal(size=(2, 512))))
    return distortion(student, teacher, dataset, vocabulary, size=64)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_objects_lie_in_the_letterbox_where_they_lie_in_the_picture_and_crowds_are_left_out(student, teacher):
    picture = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    crowd = {"bbox": [50, 10, 30, 30], "iscrowd": 1}
    result = cat_distortion(student, teacher, cat_set({"bbox": [5, 0, 35, 40]}, crowd, picture=picture))
    (example,) = result.examples
    assert example.picture.shape == (64, 64, 3)
    assert example.boxes.tolist() == [[4, 16, 32, 48]]  # times .8, and 16 px of grey above
    assert example.names == ("cat",)
    x, y = example.points.T
    assert ((x > 4) & (x < 32) & (y > 16) & (y < 48)).all()
    assert len(example.teacher) == len(example.student) == len(example.strides) == result.anchors == 10
    assert (example.teacher != example.student).all()


def test_a_set_without_objects_is_an_error(student, teacher):
    with pytest.raises(UserError, match="no picture gives the teacher a position"):
        cat_distortion(student, teacher, cat_set(picture=np.zeros((40, 80, 3), np.uint8)))


def test_a_picture_that_cannot_be_read_is_left_out_and_named(student, teacher):
    broken = ListedSet(SHAPES.coco, (None, *(SHAPES.picture(index) for index in range(1, 5))))
    result = compare(student, teacher, dataset=broken, batch_size=1)
    assert result.skipped == ("000000.png",)
    assert values(result) == pytest.approx(values(compare(student, teacher))[:, 1:], abs=1e-6)


@pytest.mark.parametrize("of_other_width", ["student", "teacher"])
def test_a_model_that_takes_texts_of_another_width_is_refused_before_any_picture_is_looked_at(student, teacher, of_other_width):
    other = YoloWorld(replace(config_for("pico", 1), text_width=16)).eval()
    pair = {"student": student, "teacher": teacher} | {of_other_width: other}
    unreadable = ListedSet(SHAPES.coco, (None,) * 5)
    with pytest.raises(UserError, match=f"the {of_other_width} takes texts 16 wide, the vocabulary's are 512 wide"):
        compare(**pair, dataset=unreadable)


def test_a_module_that_says_nothing_of_its_texts_is_compared(student, teacher):
    class Wrapped(torch.nn.Module):
        def __init__(self, model: YoloWorld) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
            return self.model(*inputs)

    assert (values(compare(Wrapped(student).eval(), teacher, limit=1)) == values(compare(student, teacher, limit=1))).all()


def test_as_many_pictures_are_compared_as_published():
    assert inspect.signature(distortion).parameters["limit"].default == 512


def test_a_model_in_training_mode_is_refused(student, teacher):
    with pytest.raises(ValueError, match="student is in training mode"):
        compare(copy.deepcopy(student).train(), teacher)


def test_a_model_whose_outputs_are_not_numbers_is_an_error_and_not_a_gap(student, teacher):
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.bbox_head.head_module.cls_preds[0][2].bias.fill_(math.nan)
    with pytest.raises(UserError, match=r"000000\.png: a model's embedding relations are not numbers"):
        compare(broken, teacher)


# --- what is written ---


def test_the_result_is_plain_json_with_a_row_a_picture(student, teacher):
    result = compare(student, teacher)
    read = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert read["pictures"] == len(read["per_picture"]) == 5
    assert read["region_region"]["embedding"] == pytest.approx(np.mean([row["region_region_embedding"] for row in read["per_picture"]]))
    assert -1 <= read["region_text"]["pearson"] <= 1


def test_draws_heat_maps_distributions_and_the_scatter(student, teacher, tmp_path):
    result = compare(student, teacher, examples=2)
    paths = write_plots(result, tmp_path / "plots")
    assert [path.name for path in paths] == ["distributions.png", "heatmaps.png", "scatter.png"]
    assert sorted((tmp_path / "plots").iterdir()) == paths
    for path in paths:
        picture = cv2.imread(str(path))
        assert min(picture.shape[:2]) > 400
        assert picture.std() > 5  # something was drawn


def drawn_result() -> DistortionResult:
    """Every number that a figure shows is another, so that none can stand for another."""
    edges = {"embedding": np.linspace(-1, 1, 5), "confidence": np.linspace(0, 1, 5)}
    counts = {"region_text": {"embedding": (1, 5), "confidence": (2, 6)}, "region_region": {"embedding": (3, 7), "confidence": (4, 8)}}
    histograms = {
        kind: {
            space: Histogram(edges[space], np.array([of_teacher, 1, 2, 3]), np.array([of_student, 1, 2, 3]))
            for space, (of_teacher, of_student) in spaces.items()
        }
        for kind, spaces in counts.items()
    }
    texts = Distortion(np.array([0.1, 0.2, 0.4]), np.array([0.01, 0.03, 0.02]))
    pairs = Distortion(np.array([0.5, np.nan, 0.7]), np.array([0.06, np.nan, 0.09]))
    return DistortionResult(("a", "b", "c"), 9, texts, pairs, histograms, (drawn_example(),))


def drawn_example() -> Example:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = (200, 10, 10)
    return Example(
        name="a",
        picture=picture,
        boxes=np.array([[2, 3, 30, 28]], np.float32),
        names=("cat",),
        points=np.array([[12.0, 4.0], [8.0, 24.0], [48.0, 16.0]], np.float32),
        strides=np.array([8.0, 16.0, 32.0], np.float32),
        teacher=np.array([0.9, 0.8, np.nan], np.float32),
        student=np.array([0.3, 0.2, np.nan], np.float32),
    )


def test_the_distributions_show_each_models_own_counts_as_shares_of_each_relation_in_each_space():
    result = drawn_result()
    panels = iter(distributions_figure(result).axes)
    for kind, title in (("region_text", "region-text"), ("region_region", "region-region")):
        for space in ("embedding", "confidence"):
            axis, histogram = next(panels), result.histograms[kind][space]
            assert axis.get_title().startswith(f"{title}, {space} space (MAE {np.nanmean(getattr(getattr(result, kind), space)):.4f})")
            outlines = [patch for patch in axis.patches if patch.get_label() in ("teacher", "student")]
            assert [patch.get_label() for patch in outlines] == ["teacher", "student"]
            for patch, colour, counts in zip(outlines, (TEACHER, STUDENT), (histogram.teacher, histogram.student), strict=True):
                assert to_rgb(patch.get_edgecolor()) == to_rgb(colour)
                assert patch.get_data().values == pytest.approx(counts / counts.sum())
                assert (patch.get_data().edges == histogram.edges).all()
            filled = [patch for patch in axis.patches if patch not in outlines]
            assert [to_rgb(patch.get_facecolor()) for patch in filled] == [to_rgb(TEACHER), to_rgb(STUDENT)]
            assert [patch.get_data().values[0] for patch in filled] == [patch.get_data().values[0] for patch in outlines]
    assert next(panels, None) is None


def test_the_scatter_has_embedding_space_across_and_confidence_space_up():
    result = drawn_result()
    texts, pairs = scatter_figure(result).axes
    for axis, drawn in ((texts, result.region_text), (pairs, result.region_region)):
        (dots,) = axis.collections
        offsets = np.ma.filled(dots.get_offsets(), np.nan)
        np.testing.assert_array_equal(offsets, np.stack([drawn.embedding, drawn.confidence], 1))
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("MAE in embedding space", "MAE in confidence space")
        assert (axis.get_xlim()[0], axis.get_ylim()[0]) == (0, 0)
        assert f"{drawn.pearson:.3f}" in axis.get_title()
    assert texts.get_title().startswith("region-text: ")
    assert texts.get_title().endswith("over 3 pictures")
    assert pairs.get_title().startswith("region-region: ")
    assert pairs.get_title().endswith("over 2 pictures")


def test_heat_maps_show_the_picture_then_the_teachers_then_the_students_similarities_on_one_scale():
    example = drawn_example()
    whole, teacher, student, scale = heatmaps_figure([example]).axes
    assert [axis.get_title() for axis in (whole, teacher, student)] == ["picture", "teacher", "student"]
    assert (whole.images[0].get_array() == example.picture).all()
    assert [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in whole.patches] == [((2, 3), 28, 25)] * 2
    assert [text.get_text() for text in whole.texts] == ["cat"]
    for axis, shown in ((teacher, example.teacher), (student, example.student)):
        (cells,) = axis.collections
        assert cells.get_array().mask.tolist() == [True, False, False]  # coarse cells below, and one that is alone
        assert cells.get_array().compressed().tolist() == [shown[1], shown[0]]
        assert cells.get_clim() == pytest.approx((0.2, 0.9))
        corners = [tuple(path.get_extents().bounds) for path in cells.get_paths()]
        assert corners == [(32, 0, 32, 32), (0, 16, 16, 16), (8, 0, 8, 8)]
        assert axis.get_xlabel() == f"mean {np.nanmean(shown):.3f}"
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, 64), (32, 0))
    assert scale.get_ylabel().startswith("mean cosine similarity")


def test_plots_are_refused_where_a_file_stands(student, teacher, tmp_path):
    (tmp_path / "plots").write_text("here")
    with pytest.raises(UserError, match="is a file, not a folder"):
        write_plots(compare(student, teacher, limit=1), tmp_path / "plots")
