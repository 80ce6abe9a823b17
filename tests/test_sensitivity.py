"""One block at a time: what it measures, held against a direct run; and what it leaves alone."""

import dataclasses
import json
import math

import pytest
import torch
from prepared_models import RECIPES, SIZE, calibrated_pico, pictures

from crqat_fx.data.shapes import ShapesSet, ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.evaluate import evaluate
from crqat_fx.graph_view import view
from crqat_fx.models.yolo_world import build
from crqat_fx.noise import decibels, turned_on
from crqat_fx.plots import write_sensitivity
from crqat_fx.prepared_inspection import owners_of_quantizers
from crqat_fx.quantize.calibrate import picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Phase
from crqat_fx.sensitivity import ALL, FirstPictures, ap_of, noise_of_blocks, sensitivity
from crqat_fx.torch_detector import TorchDetector


@pytest.fixture(scope="module", params=RECIPES)
def prepared(request):
    return calibrated_pico(*request.param)


@pytest.fixture(scope="module")
def dataset():
    return ShapesSet(ShapesTask(size=SIZE), "val", 6)


def blocks_of_quantizers(prepared):
    owners = owners_of_quantizers(prepared, view(prepared.graph, prepared.target))
    return {name: block for name, (_, block) in owners.items()}


def direct(prepared, inputs, wanted):
    """The noise in the detections by the definition, from two whole runs."""
    with torch.no_grad(), turned_on(prepared.quantizers(), lambda _: False):
        exact = prepared.graph.eval()(*inputs)
    with torch.no_grad(), turned_on(prepared.quantizers(), wanted):
        rounded = prepared.graph(*inputs)
    shares = []
    for entry in (0, 1):
        signal = noise = 0.0
        for logits, one, other in zip(exact[0], exact[entry], rounded[entry], strict=True):
            weight = logits.sigmoid().amax(1, keepdim=True).double()
            signal += float((weight * one.double() ** 2).sum())
            noise += float((weight * (one.double() - other.double()) ** 2).sum())
        shares.append(noise / signal)
    return sum(shares) / 2


def test_a_block_alone_is_what_a_run_with_its_quantizers_on_and_all_others_off_gives(prepared):
    inputs = next(picture_batches(prepared, pictures(2), 2))
    shares = noise_of_blocks(prepared, [inputs])
    owners = blocks_of_quantizers(prepared)
    assert set(shares) == {*owners.values(), ALL}
    for block, share in shares.items():
        wanted = direct(prepared, inputs, lambda name, block=block: block in (owners[name], ALL))
        assert share == pytest.approx(wanted, rel=1e-3, abs=1e-13)
    assert sum(share > 1e-9 for share in shares.values()) > 10


def test_noises_of_blocks_alone_nearly_add_up_to_that_of_all(prepared):
    shares = noise_of_blocks(prepared, picture_batches(prepared, pictures(6), 3))
    together = shares.pop(ALL)
    assert decibels(sum(shares.values())) == pytest.approx(decibels(together), abs=3)


def test_ap_is_that_of_the_detector_with_this_block_alone_quantized(prepared, dataset):
    scored = FirstPictures(dataset, 4)
    owners = blocks_of_quantizers(prepared)
    block = "backbone.image_model.stage1"
    for which, wanted in ((None, lambda _: False), (ALL, lambda _: True), (block, lambda name: owners[name] == block)):
        with turned_on(prepared.quantizers(), wanted):
            detector = TorchDetector(prepared.graph, prepared.vocabulary, SIZE)
            expected = evaluate(detector, scored).scores.ap
        assert ap_of(prepared, scored, which, batch=2) == expected


def test_every_block_is_scored_where_ap_is_asked_for(dataset, monkeypatch):
    prepared, scored = calibrated_pico(*RECIPES[0]), []
    monkeypatch.setattr("crqat_fx.sensitivity.ap_of", lambda _, pictures, block, **__: scored.append(block) or float(len(scored)))
    found = sensitivity(prepared, dataset, pictures=1, ap_pictures=4)
    assert scored == [None, ALL, *(each.block for each in found.blocks)]
    assert (found.float_ap, found.ap) == (1, 2)
    assert [each.ap for each in found.blocks] == [3.0 + number for number in range(len(found.blocks))]
    assert found.ap_pictures == 4


def test_the_model_is_left_as_it_was(prepared, dataset):
    before = prepared.phase
    try:
        prepared.set_phase(Phase(quantized=("backbone",), trained=("neck-head",)))
        state = {key: value.clone() for key, value in prepared.graph.state_dict().items()}
        prepared.graph.train()
        sensitivity(prepared, dataset, pictures=2)
        assert prepared.graph.training
        assert all(torch.equal(value, state[key]) for key, value in prepared.graph.state_dict().items())
    finally:
        prepared.set_phase(before)
        prepared.graph.eval()


def test_without_ap_there_is_none_and_the_report_is_json(prepared, dataset):
    told = []
    found = sensitivity(prepared, dataset, pictures=3, batch=2, progress=lambda done, total, at: told.append((done, total)))
    loaded = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert loaded["all"]["ap"] is None
    assert loaded["float"]["ap"] is None
    assert [each["block"] for each in loaded["blocks"]] == [each.block for each in found.blocks]
    assert loaded["blocks"][0]["db"] == pytest.approx(-10 * math.log10(loaded["blocks"][0]["share"]))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_first_pictures_of_a_set_keep_their_truth(dataset):
    first = FirstPictures(dataset, 2)
    ids = {image["id"] for image in first.coco["images"]}
    assert len(first) == len(ids) == 2
    assert {each["image_id"] for each in first.coco["annotations"]} == ids
    assert first.coco["categories"] == dataset.coco["categories"]
    assert len(FirstPictures(dataset, 100)) == 6


def test_what_cannot_be_measured_is_refused(dataset):
    with pytest.raises(UserError, match="no ranges"):
        sensitivity(prepare(build("pico", 2).eval(), None, "4-4-8", "conv-inputs", size=SIZE), dataset)
    with pytest.raises(UserError, match="no picture to measure on"):
        noise_of_blocks(calibrated_pico(*RECIPES[0]), [])


def test_values_that_are_not_finite_are_told_and_no_figure_is_made_of_them(dataset):
    damaged = calibrated_pico(*RECIPES[0])
    quantizer = next(each for each in damaged.quantizers().values() if each.log_scale is not None and not each.weight)
    with torch.no_grad():
        quantizer.log_scale.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        noise_of_blocks(damaged, picture_batches(damaged, pictures(1), 1))


def test_the_plot_has_a_row_for_every_block(prepared, dataset, tmp_path):
    found = sensitivity(prepared, dataset, pictures=1)
    write_sensitivity(found, tmp_path / "s.svg")
    scored = tuple(dataclasses.replace(each, ap=40.0 - number) for number, each in enumerate(found.blocks))
    write_sensitivity(dataclasses.replace(found, blocks=scored, float_ap=41.0, ap=2.0, ap_pictures=5), tmp_path / "s.png")
    drawn = (tmp_path / "s.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {each.block.rpartition('.')[2]} -->" in drawn or each.block.rpartition(".")[2].isdigit() for each in found.blocks)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
