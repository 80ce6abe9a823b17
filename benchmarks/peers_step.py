"""How long does a training step take with others' quantizers: torch's learnable kernels, and Brevitas, in place of every one of ours?

python benchmarks/peers_step.py [--quick] [--version 1] [--rounds 12] [--json results.json]

The network, the places, bits, axes and first ranges are the same. A folded weight, k W, the others round as W with the scale s / k, as they
know no folding: that costs them less than it stands for.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that are started

import dataclasses
import statistics
from collections.abc import Callable
from importlib.metadata import version

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.quant.int_base import IntQuant
from brevitas.core.scaling import ConstScaling, IntScaling, ParameterScaling
from brevitas.core.zero_point import ParameterZeroPoint, ZeroZeroPoint
from torch import Tensor, nn
from training_step import FLOAT, Form, Options, Workload, measure, ratio

from crqat_fx.quantize.conv_bn import ConvBn2d
from crqat_fx.quantize.fake_quant import FakeQuantize
from crqat_fx.quantize.prepared import Prepared

OURS, TORCH, BREVITAS = "ours", "torch's learnable kernels", "Brevitas"


class TorchQuantizer(nn.Module):
    """torch's kernels: the learnable ones, or the plain one where the scale is known."""

    def __init__(self, ours: FakeQuantize, scale: Tensor) -> None:
        super().__init__()
        self.gradient_scale, self.grid, self.learns = ours.gradient_scale, ours.grid, ours.learns
        zero = ours.zero_points.float()
        self.scale = nn.Parameter(scale.reshape(-1), requires_grad=self.learns)
        self.zero_point = nn.Parameter(zero.reshape(-1), requires_grad=self.learns)
        self.known = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        ends = self.grid.lowest, self.grid.highest
        if not self.learns:
            return torch.fake_quantize_per_tensor_affine(x, *self.known, *ends)
        if self.grid.axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero_point, *ends, self.gradient_scale(x))
        return torch._fake_quantize_learnable_per_channel_affine(
            x, self.scale, self.zero_point, self.grid.axis, *ends, self.gradient_scale(x)
        )


class BrevitasQuantizer(nn.Module):
    """Brevitas' integer quantizer with a learned scale and, where ours has one, a learned whole zero point."""

    def __init__(self, ours: FakeQuantize, scale: Tensor, dimensions: int) -> None:
        super().__init__()
        spec = ours.spec
        shape = [1] * dimensions
        if spec.channel_axis is not None:
            shape[spec.channel_axis] = -1
            scale = scale.view(shape)
        rounds = IntQuant(narrow_range=False, signed=spec.symmetric, input_view_impl=Identity())
        steps = IntScaling(signed=spec.symmetric, narrow_range=False)
        bits = BitWidthConst(spec.bits)
        threshold = scale * steps(bits())  # what Brevitas learns
        zero = ours.zero_points.float().reshape(scale.shape) * scale
        learned = None if scale.ndim == 0 else tuple(scale.shape)
        self.quantizer = RescalingIntQuant(
            rounds,
            ParameterScaling(threshold, learned) if ours.learns else ConstScaling(threshold),
            steps,
            ParameterZeroPoint(zero, rounds, True, learned) if ours.shifts and ours.learns else ZeroZeroPoint(),
            bits,
        )

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return self.quantizer(x)[0]


def swap(prepared: Prepared, make: Callable[[FakeQuantize, Tensor, int], nn.Module]) -> None:
    """Another quantizer for each of ours, made of it, its scale, and the number of axes of what it rounds."""
    axes: dict[FakeQuantize, int] = {}
    hooks = [
        quantizer.register_forward_pre_hook(lambda module, inputs: axes.update({module: inputs[0].ndim}))
        for quantizer in prepared.quantizers().values()
    ]
    with torch.no_grad():
        prepared.graph.eval()(*Workload(size=64, batch=1, texts=2).inputs())
    for hook in hooks:
        hook.remove()
    for name, quantizer in prepared.quantizers().items():
        owner = prepared.graph.get_submodule(name.rpartition(".")[0])
        scale = quantizer.scale.detach().clone()
        if isinstance(owner, ConvBn2d):
            factor = owner.bn.weight / torch.sqrt(owner.bn.running_var + owner.bn.eps)
            scale = scale / factor.detach().abs()
        prepared.graph.set_submodule(name, make(quantizer, scale, axes[quantizer]))


def with_torchs_kernels(prepared: Prepared) -> None:
    swap(prepared, lambda ours, scale, dimensions: TorchQuantizer(ours, scale))


def with_brevitas(prepared: Prepared) -> None:
    swap(prepared, BrevitasQuantizer)


def forms(target: str, recipe: str) -> list[Form]:
    return [
        FLOAT,
        Form(OURS, target, recipe),
        Form(TORCH, target, recipe, with_torchs_kernels),
        Form(BREVITAS, target, recipe, with_brevitas),
    ]


def main() -> None:
    options = Options.read(__doc__, rounds=12)
    print(f"{options.workload}: forward and backward, one thread; Brevitas {version('brevitas')}")
    results = []
    for target, recipe in (("conv-inputs", "4-4-8"), ("ort", "4-8-8-int")):
        found = forms(target, recipe)
        seconds, losses = measure(found, options.workload, options.rounds)
        print(f"{target}, {recipe}")
        for form in found:
            own = seconds[form.name]
            milliseconds, over, times = statistics.median(own) * 1e3, ratio(own, seconds[FLOAT.name]), ratio(own, seconds[OURS])
            print(f"  {form.name:<27}{milliseconds:>9.1f} ms   {over} x float   {times} x ours   loss {losses[form.name]:.4f}")
            ratios = {"over_float": dataclasses.asdict(over), "over_ours": dataclasses.asdict(times)}
            results.append({"target": target, "form": form.name, "milliseconds": milliseconds, **ratios, "loss": losses[form.name]})
    options.write("peers_step", results)


if __name__ == "__main__":
    main()
