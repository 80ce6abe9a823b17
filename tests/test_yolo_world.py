"""The model against the published one, and the promises that tracing and large vocabularies rest on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published import PARAMETERS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from weights_from_names import reference_inputs, weights_from_names

from crqat_fx.models import yolo_world
from crqat_fx.models.yolo_world import (
    SIZES,
    ContrastiveHead,
    YoloWorld,
    YoloWorldConfig,
    anchor_points,
    build,
    config_for,
    decode_boxes,
    flatten_levels,
    initialise_head,
    max_similarity,
    size_of,
)

DATA = Path(__file__).parent / "data"
PRESETS = [(version, size) for version in (1, 2) for size in SIZES if (version, size) != (1, "xl")]


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def reference(request):
    model = build("s", request.param)
    model.load_state_dict(weights_from_names(model.state_dict()))
    return model.eval(), np.load(DATA / f"forward_v{request.param}_s.npz")


def text_of(texts: int, batch: int = 1, width: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(batch, texts, width, generator=generator), dim=2)


def test_logits_boxes_and_regions_equal_the_published_model(reference):
    model, expected = reference
    with torch.no_grad():
        logits, bins, regions = model(*reference_inputs())
    for level in range(3):
        np.testing.assert_allclose(logits[level].numpy(), expected[f"logits{level}"], rtol=0, atol=2e-5)
        embedding = expected[f"region_embedding{level}_every_8_4_4"]
        if model.config.version == 2:  # what the text meets: the embedding after the head's BatchNorm
            norm = model.bbox_head.head_module.cls_contrasts[level].norm
            channels = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            mean, variance, weight, bias = (values.detach().numpy()[::8, None, None] for values in channels)
            embedding = (embedding - mean) / np.sqrt(variance + 1e-3) * weight + bias
        np.testing.assert_allclose(regions[level][:, ::8, ::4, ::4].numpy(), embedding, rtol=0, atol=2e-5)
    np.testing.assert_allclose(decode_boxes(bins).numpy(), expected["boxes"], rtol=0, atol=1e-3)


def test_backbone_neck_text_and_region_embeddings_equal_the_published_model(reference):
    model, expected = reference
    seen: dict[str, Tensor] = {}
    head = model.bbox_head.head_module
    watched = {f"region_embedding{i}": head.cls_preds[i] for i in range(3)}
    if model.config.version == 1:
        watched["text_enhanced"] = model.neck.text_enhancer
    hooks = [module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out})) for name, module in watched.items()]
    images, text = reference_inputs()
    with torch.no_grad():
        features = model.backbone(images)
        neck = model.neck(*features, text)
        model.bbox_head(*neck, text)
    for hook in hooks:
        hook.remove()
    for level in range(3):
        for name, tensor in (("backbone", features[level]), ("neck", neck[level]), ("region_embedding", seen[f"region_embedding{level}"])):
            np.testing.assert_allclose(tensor[:, ::8, ::4, ::4].numpy(), expected[f"{name}{level}_every_8_4_4"], rtol=0, atol=2e-5)
    if model.config.version == 1:
        np.testing.assert_allclose(seen["text_enhanced"].numpy(), expected["text_enhanced"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("version", "size"), PARAMETERS)
def test_state_names_shapes_and_parameter_counts_are_the_official_ones(version, size):
    with torch.device("meta"):
        model = build(size, version)
    published = json.loads((DATA / f"keys_v{version}_{size}.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[version, size]


@pytest.mark.parametrize(("version", "size"), PRESETS)
def test_every_preset_runs_and_names_itself(version, size):
    with torch.device("meta"):
        model = build(size, version)
        logits, bins, regions = model(torch.empty(1, 3, 64, 96), torch.empty(1, 4, 512))
    assert [tuple(level.shape) for level in logits] == [(1, 4, 8, 12), (1, 4, 4, 6), (1, 4, 2, 3)]
    assert [tuple(level.shape) for level in bins] == [(1, 64, 8, 12), (1, 64, 4, 6), (1, 64, 2, 3)]
    assert [tuple(level.shape) for level in regions] == [(1, 512, 8, 12), (1, 512, 4, 6), (1, 512, 2, 3)]
    assert size_of(model.config) == size


@pytest.mark.parametrize(
    ("size", "channels", "box_channels", "class_channels"),
    [
        ("s", (32, 64, 128, 256, 512), 64, 128),
        ("m", (48, 96, 192, 384, 576), 64, 192),
        ("l", (64, 128, 256, 512, 512), 64, 256),
        ("x", (80, 160, 320, 640, 640), 80, 320),
        ("xl", (96, 192, 384, 768, 768), 96, 384),
    ],
)
def test_channels_are_the_published_ones(size, channels, box_channels, class_channels):
    config = config_for(size, 2)
    assert (config.channels, config.box_channels, config.class_channels) == (channels, box_channels, class_channels)


@pytest.mark.parametrize("version", [1, 2])
def test_any_width_and_depth_runs(version):
    for step in range(1, 31):
        config = YoloWorldConfig(version=version, deepen=(0.33, 1.0)[step % 2], widen=step / 20, last_stage=(512, 768, 1024)[step % 3])
        with torch.device("meta"):
            logits, _, _ = YoloWorld(config).eval()(torch.empty(1, 3, 32, 32), torch.empty(1, 2, 512))
        assert logits[2].shape == (1, 2, 1, 1)


def test_unknown_sizes_versions_and_impossible_widths_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'xxl'.*pico, nano, s"):
        build("xxl", 1)
    with pytest.raises(ValueError, match="version is 3"):
        build("s", 3)
    with pytest.raises(ValueError, match="pool_width 100 does not divide into 8"):
        YoloWorldConfig(version=1, deepen=1.0, widen=1.0, pool_width=100)


@pytest.mark.parametrize("version", [1, 2])
def test_plain_symbolic_trace_holds_at_other_batch_size_and_vocabulary(version):
    model = build("pico", version).eval()
    traced = torch.fx.symbolic_trace(model)
    nodes = len(traced.graph.nodes)
    assert not traced.graph.eliminate_dead_code()
    assert len(traced.graph.nodes) == nodes
    assert set(traced.state_dict()) == set(model.state_dict())
    assert not [node for node in traced.graph.nodes if "einsum" in str(node.target)]
    assert len([node for node in traced.graph.nodes if node.target is max_similarity]) == 4
    with torch.no_grad():
        for batch, height, width, texts in ((1, 64, 64, 3), (3, 96, 160, 40)):
            images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
            text = text_of(texts, batch)
            for eager, graph in zip(model(images, text), traced(images, text), strict=True):
                for one, other in zip(eager, graph, strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize("texts", [1, 5, 31, 32, 33, 80])
def test_max_similarity_equals_the_maximum_over_all_scores_with_and_without_gradients(texts):
    generator = torch.Generator().manual_seed(texts)
    guide = torch.randn(2, 3, texts, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    embed = torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = torch.einsum("bmnc,bmcp->bmnp", guide, embed).amax(2)
    wanted = torch.autograd.grad(whole.square().sum(), (guide, embed))
    blocked = max_similarity(guide, embed)
    got = torch.autograd.grad(blocked.square().sum(), (guide, embed))
    torch.testing.assert_close(blocked, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(max_similarity(guide, embed), whole, rtol=0, atol=1e-12)


def test_the_gradient_of_equal_scores_goes_to_the_first_text():
    guide = torch.ones(1, 1, 40, 1, requires_grad=True)
    max_similarity(guide, torch.ones(1, 1, 1, 2, requires_grad=True)).sum().backward()
    assert guide.grad is not None
    assert guide.grad.flatten().nonzero().flatten().tolist() == [0]


def peak_bytes_without_logits(model: nn.Module, texts: int) -> int:
    """The most that was allocated at one moment of a forward, the logits left out."""
    images, text = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(0)), text_of(texts)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        logits, _, _ = model(images, text)
    events = sorted((event.start_ns(), event.nbytes()) for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [size for _, size in events]
    for level in logits:  # never freed: the last allocation of its size
        last = len(changes) - 1 - changes[::-1].index(level.numel() * level.element_size())
        changes[last] = 0
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("version", [1, 2])
def test_a_vocabulary_of_1203_needs_hardly_more_memory_than_one_of_80(version):
    model = build("s", version).eval()
    for form in (model, torch.fx.symbolic_trace(model)):
        small, large = (peak_bytes_without_logits(form, texts) for texts in (80, 1203))
        assert small > 10 * 2**20
        assert large <= 1.3 * small


def test_the_memory_bound_would_not_hold_if_all_scores_existed_at_once(monkeypatch):
    model = build("s", 2).eval()
    small = peak_bytes_without_logits(model, 80)
    monkeypatch.setattr(yolo_world, "TEXTS_AT_ONCE", 1203)
    assert peak_bytes_without_logits(model, 1203) > 1.3 * small


def test_results_do_not_depend_on_how_many_texts_are_scored_at_once(monkeypatch):
    model = build("pico", 1).eval()
    images, text = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), text_of(1203)
    with torch.no_grad():
        blocked = model(images, text)
        monkeypatch.setattr(yolo_world, "TEXTS_AT_ONCE", 1203)
        whole = model(images, text)
    for one, other in zip(blocked[0], whole[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_decoded_boxes_are_distances_from_the_cell_centres():
    bins = [torch.full((1, 64, 1, 2), -50.0), torch.full((1, 64, 1, 1), -50.0), torch.full((1, 64, 1, 1), -50.0)]
    for level in bins:  # left 1, top 2, right 3 and a half, bottom 0, in strides
        level[0, [1, 16 + 2, 32 + 3, 32 + 4, 48 + 0]] = 50.0
    boxes = decode_boxes(bins)[0]
    assert boxes.tolist() == [[-4, -12, 32, 4], [4, -12, 40, 4], [-8, -24, 64, 8], [-16, -48, 128, 16]]


def test_anchor_points_and_flattened_levels_share_one_order():
    levels = [torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 1)]
    for level, stride in zip(levels, (8, 16, 32), strict=True):
        height, width = level.shape[2:]
        level[0, 0] = (torch.arange(width) + 0.5) * stride
        level[0, 1] = ((torch.arange(height) + 0.5) * stride)[:, None]
    points, strides = anchor_points(levels)
    assert torch.equal(flatten_levels(levels)[0], points)
    assert strides.tolist() == [8] * 6 + [16] * 2 + [32]


def test_the_head_starts_at_five_objects_a_picture():
    model = build("pico", 2)
    initialise_head(model, texts=40, size=160)
    biases = [contrast.bias.item() for contrast in model.bbox_head.head_module.cls_contrasts]
    assert biases == pytest.approx([np.log(5 / 40 / (160 / stride) ** 2) for stride in (8, 16, 32)])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_region_that_is_all_zero_has_finite_logits_in_half_precision(half: torch.dtype) -> None:
    head = ContrastiveHead(YoloWorldConfig(version=1, deepen=0.33, widen=0.125, text_width=16))
    embedding, text = torch.zeros(1, 16, 2, 2, dtype=half), torch.rand(1, 3, 16)
    embedding[..., 0] = 1
    with torch.autocast("cpu", half):
        logits, _ = head(embedding, text)
    assert torch.isfinite(logits).all()
    assert not logits[..., 1].any()
    assert logits[..., 0].all()
