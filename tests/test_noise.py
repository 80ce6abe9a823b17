"""SQNR held against its definition, on values that hooks caught in two runs of the same graph."""

import math
from collections import Counter

import pytest
import torch
from prepared_models import RECIPES, calibrated_pico, pictures

from crqat_fx.errors import UserError
from crqat_fx.noise import EXACT, Energy, decibels, measure_noise, turned_on
from crqat_fx.quantize.calibrate import picture_batches
from crqat_fx.quantize.prepared import Phase
from passes.fx.graph import module_of, node_paths


@pytest.fixture(scope="module", params=RECIPES)
def prepared(request):
    return calibrated_pico(*request.param)


def batches(prepared, count=3):
    return list(picture_batches(prepared, pictures(count), 2))


def values(prepared, inputs):
    """What every module that one node calls returns, by that node's path."""
    found = {}
    calls = Counter(str(node.target) for node in prepared.graph.graph.nodes)
    handles = []
    for node, path in node_paths(prepared.graph).items():
        if module_of(prepared.graph, node) is not None and calls[str(node.target)] == 1:
            module = prepared.graph.get_submodule(str(node.target))
            handles.append(module.register_forward_hook(lambda _, __, output, path=path: found.update({path: output})))
    try:
        with torch.no_grad():
            prepared.graph.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def expected(signal, noise):
    return 10 * math.log10(float((signal.double() ** 2).sum()) / float((noise.double() ** 2).sum()))


def test_end_to_end_is_against_the_graph_with_its_quantizers_off(prepared):
    inputs = batches(prepared)[0]
    noise = measure_noise(prepared, [inputs])
    rounded = values(prepared, inputs)
    with turned_on(prepared.quantizers(), lambda _: False):
        exact = values(prepared, inputs)
    assert len(exact) > 100
    for path, value in exact.items():
        wanted = EXACT if torch.equal(value, rounded[path]) else expected(value, value - rounded[path])
        assert noise.tensors[path] == pytest.approx(wanted, abs=1e-3)


def test_local_is_what_one_quantizer_does_to_what_it_is_given_weights_included(prepared):
    inputs = batches(prepared)[0]
    given = {}
    handles = [
        each.register_forward_hook(lambda _, inputs, output, name=name: given.setdefault(name, []).append((inputs[0].detach(), output)))
        for name, each in prepared.quantizers().items()
    ]
    try:
        with torch.no_grad():
            prepared.graph.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    noise = measure_noise(prepared, [inputs])
    assert set(noise.local) == set(prepared.quantizers()) == set(given)
    assert any(name.endswith("weight_fake_quant") for name in given)
    for name, calls in given.items():
        before = torch.cat([one.flatten() for one, _ in calls])
        behind = torch.cat([other.flatten() for _, other in calls])
        wanted = EXACT if torch.equal(before, behind) else expected(before, before - behind)
        assert noise.local[name] == pytest.approx(wanted, abs=1e-3)


def test_clipped_is_the_share_of_values_beyond_the_ends_of_the_range(prepared):
    """Told by another way than codes: a value is clipped where it lies more than half a step beyond the values of the end codes."""
    narrowed = [each for each in prepared.quantizers().values() if each.log_scale is not None and each.spec.channel_axis is None]
    given = {}
    names = {each: name for name, each in prepared.quantizers().items() if each in narrowed and not each.weight}
    handles = [
        each.register_forward_pre_hook(lambda module, inputs: given.setdefault(names[module], []).append(inputs[0])) for each in names
    ]
    scales = [each.log_scale.detach().clone() for each in narrowed]
    inputs = batches(prepared)[:1]
    try:
        for each in narrowed:
            each.log_scale.data -= math.log(3)
        noise = measure_noise(prepared, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for each, scale in zip(narrowed, scales, strict=True):
            each.log_scale.data = scale
    for name, calls in given.items():
        quantizer = prepared.quantizers()[name]
        x, step = torch.cat([each.flatten() for each in calls]), quantizer.scale.detach() / 3
        zero = quantizer.zero_points
        low, high = ((code - zero) * step for code in (quantizer.quant_min, quantizer.quant_max))
        wanted = ((x < low - step / 2) | (x > high + step / 2)).float().mean()
        assert noise.clipped[name] == pytest.approx(float(wanted), abs=2e-3), name
    usual = measure_noise(prepared, inputs).clipped
    assert sum(noise.clipped[name] for name in names.values()) > 5 * sum(usual[name] for name in names.values())


def test_pictures_add_up_whatever_batches_they_come_in(prepared):
    together, apart = (measure_noise(prepared, list(picture_batches(prepared, pictures(3), size))) for size in (3, 1))
    assert together.pictures == apart.pictures == 3
    early = "backbone.image_model.stage1.0.conv"  # further on, the order in which floats are added turns codes
    assert together.tensors[early] < 60
    assert apart.tensors[early] == pytest.approx(together.tensors[early], abs=0.02)


def test_what_a_phase_turns_off_adds_no_noise_and_stays_off(prepared):
    before = prepared.phase
    first = prepared.stages[0].name
    try:
        prepared.set_phase(Phase(quantized=(first,), trained=()))
        noise = measure_noise(prepared, batches(prepared)[:1])
        own = set(prepared.quantizers([first]))
        assert set(noise.local) == own
        assert {name for name, each in prepared.quantizers().items() if each.enabled} == own
        prepared.set_phase(Phase(quantized=(), trained=()))
        assert set(measure_noise(prepared, batches(prepared)[:1]).tensors.values()) == {EXACT}
    finally:
        prepared.set_phase(before)


def test_measuring_leaves_the_model_as_it_was(prepared):
    state = {key: value.clone() for key, value in prepared.graph.state_dict().items()}
    prepared.graph.train()
    measure_noise(prepared, batches(prepared))
    assert prepared.graph.training
    assert all(torch.equal(value, state[key]) for key, value in prepared.graph.state_dict().items())
    assert not any(module._forward_hooks for module in prepared.graph.modules())
    prepared.graph.eval()


def test_progress_counts_pictures(prepared):
    told = []
    measure_noise(prepared, batches(prepared), total=3, progress=lambda done, total, at: told.append((done, total)))
    assert told == [(2, 3), (3, 3)]


def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor():
    prepared = calibrated_pico("8-8-8", "conv-inputs")
    weight = prepared.graph.get_submodule("backbone.image_model.stage1.0.conv").weight
    weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"backbone\.image_model\.stage1\.0\.conv: has values that are not finite"):
        measure_noise(prepared, batches(prepared)[:1])


def test_decibels_are_kept_within_what_floats_tell_apart():
    assert decibels(0.1) == pytest.approx(10)
    assert decibels(0) == decibels(1e-30) == EXACT
    assert decibels(math.inf) == -EXACT
    silence = Energy()
    silence.add(torch.zeros(3), torch.zeros(3))
    assert silence.db == EXACT
    silence.add(torch.zeros(3), torch.ones(3))
    assert silence.db == -EXACT
