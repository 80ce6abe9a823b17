"""What a phase turns on, trains and freezes, that it stays so, and that a file brings all of it back or is refused."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from every_kind import RECIPE, EveryKind, inputs
from torch import nn

import crqat_fx
from crqat_fx import pipelines, unpickle
from crqat_fx.checkpoint import Checkpoint, write_checkpoint
from crqat_fx.errors import UserError
from crqat_fx.model_files import read_model
from crqat_fx.models.yolo_world import build
from crqat_fx.quantize.calibrate import calibrate
from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepare import load_prepared, prepare
from crqat_fx.quantize.prepared import Phase, Prepared, read_saved
from crqat_fx.recipe import QuantRecipe, QuantRule
from crqat_fx.torch_detector import TorchDetector
from crqat_fx.trace import yolo_world_examples
from crqat_fx.vocabulary import Vocabulary
from passes.base import Pass
from passes.fx.graph import STAGE, FxPass
from passes.spec import QuantSpec

BACKBONE, NECK_HEAD = "backbone", "neck-head"
FIRST = Phase(quantized=(BACKBONE,), trained=(BACKBONE,))
SECOND = Phase(quantized=(BACKBONE, NECK_HEAD), trained=(NECK_HEAD,), norm="frozen")


def vocabulary():
    embeddings = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    return Vocabulary(("a", "b", "c"), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def calibrated():
    """Two of them, for both targets; tests take copies."""
    made = {}
    for target in ("conv-inputs", "ort"):
        torch.manual_seed(0)
        model = build("pico", 2).train()
        prepared = prepare(model, None, "4-8-8-int", target, vocabulary=vocabulary(), size=64)
        calibrate(prepared, yolo_world_examples(model), "minmax")
        made[target] = prepared
    return made


def fresh(prepared):
    copied = copy.copy(prepared)
    copied.graph = copy.deepcopy(prepared.graph)
    copied.set_phase(prepared.phase)
    return copied


def stage_of_parameters(prepared):
    stages = {}
    for node in prepared.graph.graph.nodes:
        if node.op == "call_module":
            for name, _ in prepared.graph.get_submodule(str(node.target)).named_parameters():
                stages[f"{node.target}.{name}"] = node.meta[STAGE]
        elif node.op == "get_attr":
            stages[str(node.target)] = node.meta[STAGE]
    return stages


def step(prepared, rate=0.1):
    """One step of descent on whatever may learn, in training mode."""
    prepared.graph.train()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    text = torch.from_numpy(prepared.vocabulary.embeddings).expand(2, -1, -1)
    outputs = prepared.graph(images, text)
    sum(level.square().mean() for group in outputs for level in group).backward()
    with torch.no_grad():
        for parameter in prepared.graph.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad.sign() * 1e-2)
                parameter.grad = None


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
@pytest.mark.parametrize(("phase", "moving"), [(FIRST, BACKBONE), (SECOND, NECK_HEAD)])
def test_a_frozen_stage_never_drifts_and_a_trained_one_does(calibrated, target, phase, moving):
    prepared = fresh(calibrated[target])
    prepared.set_phase(phase)
    prepared.graph.eval()
    prepared.graph.train()
    before = {name: value.clone() for name, value in prepared.graph.state_dict().items()}
    for _ in range(2):
        step(prepared)
    stages = stage_of_parameters(prepared)
    moved = {name for name, value in prepared.graph.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name in moved if stages.get(name) == moving}
    assert len(trained) > 50
    statistics = {name for name in moved if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert not {stages[name] for name in moved if name in stages} - {moving}
    prefixes = {stages[re.sub(r"(running_mean|running_var|num_batches_tracked)$", "weight", name)] for name in statistics}
    assert prefixes == ({moving} if phase.norm == "train" else set())


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
def test_quantizers_are_on_in_the_quantized_stages_alone_those_of_weights_too(calibrated, target):
    prepared = fresh(calibrated[target])
    prepared.set_phase(FIRST)
    on = {name for name, each in prepared.quantizers().items() if each.enabled}
    assert on == set(prepared.quantizers([BACKBONE]))
    assert any(name.endswith("weight_fake_quant") for name in on)
    assert any(name.startswith("quant.") for name in on)
    assert set(prepared.quantizers()) - on == set(prepared.quantizers([NECK_HEAD]))


def test_with_the_neck_and_head_float_only_the_backbone_changes_what_comes_out(calibrated):
    prepared = fresh(calibrated["conv-inputs"])
    images, text = torch.rand(1, 3, 64, 64), torch.from_numpy(vocabulary().embeddings)[None]
    outputs = []
    for quantized in ((), (BACKBONE,), (BACKBONE, NECK_HEAD)):
        prepared.set_phase(Phase(quantized, trained=()))
        with torch.no_grad():
            outputs.append(prepared.graph.eval()(images, text)[1][0])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_an_unknown_stage_or_norm_is_refused(calibrated):
    prepared = fresh(calibrated["ort"])
    with pytest.raises(UserError, match=r"unknown stage 'neck'.*backbone, neck-head"):
        prepared.set_phase(Phase(quantized=("neck",), trained=()))
    with pytest.raises(UserError, match="norm is 'off'"):
        prepared.set_phase(Phase(quantized=(), trained=(), norm="off"))


def test_a_norm_by_itself_stays_frozen_too():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.norm(x))

    x = torch.rand(4, 3, 5, 5)
    recipe = QuantRecipe((QuantRule("*", QuantSpec(8, True, 0), QuantSpec(8)),))
    prepared = prepare(Alone().train(), [(x,)], recipe, "conv-inputs")
    calibrate(prepared, [(x,)], "minmax")
    prepared.set_phase(Phase(("whole",), ("whole",), "frozen"))
    before = prepared.graph.norm.running_mean.clone()
    prepared.graph.train()(x)
    assert torch.equal(prepared.graph.norm.running_mean, before)
    prepared.set_phase(Phase(("whole",), ("whole",), "train"))
    prepared.graph(x)
    assert not torch.equal(prepared.graph.norm.running_mean, before)


def test_statistics_that_nothing_can_freeze_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True)).eval()
    with pytest.raises(UserError, match="InstanceNorm2d, whose statistics cannot be frozen"):
        prepare(model, [(torch.rand(1, 3, 4, 4),)], QuantRecipe((QuantRule("*", activation=QuantSpec(8)),)))


# --- files ---


@pytest.mark.parametrize("target", ["conv-inputs", "ort"])
@pytest.mark.parametrize("phase", [FIRST, SECOND])
def test_a_file_brings_back_everything(calibrated, target, phase, tmp_path):
    prepared = fresh(calibrated[target])
    step(prepared)
    prepared.set_phase(phase)
    path = tmp_path / "prepared.pt"
    prepared.save(path)
    loaded = load_prepared(path)
    assert loaded.text() == prepared.text()
    assert (loaded.phase, loaded.recipe, loaded.target, loaded.size) == (phase, prepared.recipe, prepared.target, 64)
    assert loaded.vocabulary.names == ("a", "b", "c")
    assert loaded.config == prepared.config
    state = loaded.graph.state_dict()
    assert set(state) == set(prepared.graph.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in prepared.graph.state_dict().items())
    learning = {name: value.requires_grad for name, value in prepared.graph.named_parameters()}
    assert learning == {name: value.requires_grad for name, value in loaded.graph.named_parameters()}
    assert {name: each.enabled for name, each in loaded.quantizers().items()} == {
        name: each.enabled for name, each in prepared.quantizers().items()
    }
    frozen = [
        {name: each.frozen for name, each in model.graph.named_modules() if isinstance(each, ConvBn2d)} for model in (prepared, loaded)
    ]
    assert frozen[0] == frozen[1]
    assert not any(value.is_meta for value in (*loaded.graph.parameters(), *loaded.graph.buffers()))
    picture = np.random.default_rng(0).integers(0, 256, (70, 60, 3), np.uint8)
    found = [TorchDetector(model.graph, vocabulary(), 64).detect([picture])[0] for model in (prepared, loaded)]
    assert np.array_equal(found[0].boxes, found[1].boxes)
    assert np.array_equal(found[0].scores, found[1].scores)
    step(loaded)


def test_a_file_is_plain_data(calibrated, tmp_path):
    path = tmp_path / "prepared.pt"
    calibrated["ort"].save(path)
    content = torch.load(path, weights_only=True)
    assert content["version"] == crqat_fx.__version__
    assert content["graph"] == calibrated["ort"].digest()
    assert not list(tmp_path.glob(".*"))


class Doctored(FxPass):
    """A later release's pass, which leaves another graph: it turns one quantizer's bits."""

    name = "doctored"

    def rewrite(self, graph):
        for each in graph.modules():
            if isinstance(each, FakeQuantize) and each.spec.bits == 8 and each.learns:
                each.spec = dataclasses.replace(each.spec, bits=7)
                return 1
        return 0


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(crqat_fx.__version__, "now; prepare the model again"), ("0.0.9", "now; use crqat-fx 0.0.9, or prepare the model again")],
)
def test_a_file_whose_graph_is_built_otherwise_now_is_refused_with_what_to_do(calibrated, tmp_path, monkeypatch, version, remedy):
    path = tmp_path / "prepared.pt"
    monkeypatch.setattr("crqat_fx.quantize.prepared.__version__", version)
    calibrated["ort"].save(path)
    monkeypatch.setattr("crqat_fx.quantize.prepare.quantizer_passes", lambda *args: _doctored(pipelines.quantizer_passes(*args)))
    monkeypatch.setattr("crqat_fx.quantize.prepare.hold_to_recipe", lambda *args: None)
    with pytest.raises(UserError, match=rf"was prepared by crqat-fx {re.escape(version)}, .*{re.escape(remedy)}$"):
        load_prepared(path)


def _doctored(pipeline):
    doctored: Pass = Doctored()
    pipeline.passes = (*pipeline.passes, doctored)
    return pipeline


def test_of_ones_own_module_the_file_has_no_code_and_says_so(tmp_path):
    path = tmp_path / "own.pt"
    model = EveryKind().eval()
    prepared = prepare(model, [inputs()], RECIPE)
    calibrate(prepared, [inputs()], "minmax")
    prepared.save(path)
    with pytest.raises(UserError, match="giving the module"):
        load_prepared(path)
    loaded = load_prepared(path, EveryKind(), [inputs()])
    with torch.no_grad():
        for expected, got in zip(prepared.graph.eval()(*inputs(1)), loaded.graph(*inputs(1)), strict=True):
            assert torch.equal(expected, got)
    other = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(UserError):
        load_prepared(path, other, [(torch.rand(1, 3, 4, 4),)])


def _written(path, content):
    torch.save(content, path)


def _with(change):
    def doctor(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return doctor


def _half(value):
    return value.half() if value.is_floating_point() else value


def _scale_of(state):
    return next(value for name, value in state.items() if name.endswith("log_scale"))


def test_a_shipped_model_is_known_by_name_and_is_not_prepared() -> None:
    with pytest.raises(UserError, match=r"pico-v1\.pt: is no prepared model"):
        read_saved("pico-v1")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: path.write_bytes(b"no archive"), "is a text file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is cut short or damaged"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: _written(path, {"format": "else"}), "is no prepared model"),
        (lambda path: _written(path, nn.Linear(1, 1)), "is no prepared model"),
        (_with(lambda content: content.update(format_version=99)), "of format 99, .*; update"),
        (_with(lambda content: content.update(format_version=1)), "of format 1, .*; prepare the model again"),
        (_with(lambda content: content.pop("phase")), "is damaged"),
        (_with(lambda content: content.update(state=[1])), "is damaged"),
        (_with(lambda content: content["state"].update(odd="text")), "is damaged: .*of what should be a tensor"),
        (_with(lambda content: next(iter(content["calibrations"].values())).update(observer=3)), "is damaged: .*of its calibration"),
        (_with(lambda content: next(iter(content["calibrations"].values())).update(scale=3)), "is damaged: .*of what should be a tensor"),
        (_with(lambda content: content.update(size="big")), "is damaged"),
        (_with(lambda content: content.update(config={"version": 7})), "is damaged"),
        (_with(lambda content: content.update(config=[])), "is damaged"),
        (_with(lambda content: content.update(config={**content["config"], "widen": 1e9})), "is damaged"),
        (_with(lambda content: content.update(config={**content["config"], "pool_heads": 0})), "is damaged: .*of its configuration"),
        (_with(lambda content: content.update(config={**content["config"], "class_width": 7.5})), "is damaged: .*of its configuration"),
        (_with(lambda content: content.update(config={**content["config"], "text_width": True})), "is damaged: .*of its configuration"),
        (_with(lambda content: content.update(size=33)), "is damaged: .*of its configuration"),
        (_with(lambda content: content.update(size=10**9)), "is damaged: .*of its size"),
        (_with(lambda content: content.update(state={name: _half(each) for name, each in content["state"].items()})), "of another kind"),
        (_with(lambda content: _scale_of(content["state"]).fill_(float("nan"))), "not finite"),
        (_with(lambda content: content["vocabulary"].update(embeddings=torch.eye(3, 7))), "7"),
        (_with(lambda content: content["vocabulary"].update(names=["a"])), "1 names"),
        (_with(lambda content: content.update(recipe={"rules": []})), "holds no list of `rules`"),
        (_with(lambda content: content.update(target="tpu")), "is damaged: .*unknown target"),
        (_with(lambda content: content["state"].popitem()), "is damaged: its state does not fit"),
        (_with(lambda content: content["phase"].update(quantized=["cellar"])), "unknown stage 'cellar'"),
    ],
)
def test_a_file_that_is_something_else_is_refused_in_one_line(calibrated, tmp_path, fault, message):
    path = tmp_path / "prepared.pt"
    calibrated["conv-inputs"].save(path)
    fault(path)
    with pytest.raises(UserError, match=message) as caught:
        load_prepared(path)
    assert "\n" not in str(caught.value)


def test_one_reader_tells_a_prepared_model_from_a_checkpoint_and_opens_the_file_once(calibrated, tmp_path, monkeypatch):
    opened, really = [], unpickle.opened

    def counted(path):
        opened.append(path)
        return really(path)

    path = tmp_path / "some.pt"
    for place in ("crqat_fx.unpickle", "crqat_fx.checkpoint", "crqat_fx.quantize.prepared"):
        monkeypatch.setattr(f"{place}.opened", counted)
    with pytest.raises(UserError, match="does not exist"):
        read_model(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"some\.pt: is "):
        read_model(path)
    opened.clear()
    calibrated["ort"].save(path)
    found = read_model(path)
    assert isinstance(found, Prepared)
    assert found.text() == calibrated["ort"].text()
    model = build("pico", 2)
    write_checkpoint(path, model, model.config)
    found = read_model(path)
    assert isinstance(found, Checkpoint)
    assert all(torch.equal(value, found.state[name]) for name, value in model.state_dict().items())
    assert opened == [path, path]


def test_a_file_tells_what_set_each_range_and_from_where_training_moved_it(calibrated, tmp_path):
    prepared = fresh(calibrated["ort"])
    before = {name: each.scale.detach().clone() for name, each in prepared.quantizers().items()}
    step(prepared)
    prepared.save(tmp_path / "p.pt")
    loaded = load_prepared(tmp_path / "p.pt")
    learning = {name for name, each in loaded.quantizers().items() if each.learns}
    assert set(loaded.calibrations) == learning
    assert {each.observer for each in loaded.calibrations.values()} == {"minmax"}
    assert {each.pictures for each in loaded.calibrations.values()} == {3}
    assert all(torch.equal(before[name], each.scale) for name, each in loaded.calibrations.items())
    assert any(not torch.equal(each.scale, loaded.quantizers()[name].scale) for name, each in loaded.calibrations.items())


def test_a_model_whose_ranges_were_never_set_comes_back_from_its_file(tmp_path):
    prepared = prepare(build("pico", 2), None, "4-8-8-int", "ort", vocabulary=vocabulary(), size=64)
    prepared.save(tmp_path / "p.pt")
    loaded = load_prepared(tmp_path / "p.pt")
    assert not loaded.calibrated
    assert loaded.calibrations == {}
    assert loaded.text() == prepared.text()
