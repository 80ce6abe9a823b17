"""What does a quantizer cost? Forward and backward of ours beside torch's learnable kernel and a composition of torch's operations.

python benchmarks/bench_fake_quant.py [--quick] [--rounds 15] [--json results.json]

One thread, processor time; the forms take turns in every round, and what counts is the median of the ratios of one round. Beside them, for
scale, a SiLU and the 3x3 convolution that would read the tensor.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from crqat_fx.quantize.rounding import BLOCKED, PLAIN, Grid, Kernels, fake_quantize
from passes.spec import QuantSpec

Work = Callable[[], None]

# what is quantized, its shape, how; the first one is the figure to compare
WORKLOADS = {
    "activation, 4 bit": ((4, 64, 160, 160), QuantSpec(4)),
    "activation, 4 bit, a scale a channel": ((4, 64, 160, 160), QuantSpec(4, False, 1)),
    "small activation, 8 bit": ((2, 256, 20, 20), QuantSpec(8)),
    "weight, 4 bit, a scale a channel": ((256, 256, 3, 3), QuantSpec(4, True, 0)),
}
QUICK = (1, 8, 40, 40)
OURS = "ours"


def composed(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """LSQ+ from torch's operations, as it is commonly written: detached roundings."""
    if grid.axis is not None:
        shape = [-1 if axis == grid.axis else 1 for axis in range(x.ndim)]
        scale, zero = scale.view(shape), zero.view(shape)
    whole = (zero.round() - zero).detach() + zero
    ratio = x / scale
    code = torch.clamp((ratio.round() - ratio).detach() + ratio + whole, grid.lowest, grid.highest)
    return (code - whole) * scale


def forms(shape: tuple[int, ...], spec: QuantSpec) -> dict[str, Work]:
    """Each runs forward and backward once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    gradient = torch.randn(shape, generator=generator)
    size = () if spec.channel_axis is None else (shape[spec.channel_axis],)
    scale = torch.full(size, 4.0 / (spec.highest - spec.lowest)).requires_grad_()
    zero = None if spec.symmetric else torch.full(size, (spec.highest + spec.lowest) / 2).requires_grad_()
    grid = Grid(spec.lowest, spec.highest, spec.channel_axis)
    shift = torch.zeros(size) if zero is None else zero
    leaves = [leaf for leaf in (x, scale, zero) if leaf is not None]

    def both(y: Tensor) -> None:
        torch.autograd.grad(y, leaves, gradient, allow_unused=True)

    def own(kernels: Kernels) -> Work:
        return lambda: both(fake_quantize(x, scale, zero, grid, 1.0, kernels))

    def learnable() -> None:
        # torch's learnable kernels take a zero point that is learned, and give it a gradient, always
        point = shift.detach().reshape(-1).requires_grad_()
        flat = scale.reshape(-1)
        if grid.axis is None:
            both(torch._fake_quantize_learnable_per_tensor_affine(x, flat, point, grid.lowest, grid.highest, 1.0))
        else:
            both(torch._fake_quantize_learnable_per_channel_affine(x, flat, point, grid.axis, grid.lowest, grid.highest, 1.0))

    work: dict[str, Work] = {
        OURS: own(BLOCKED),
        "torch's learnable kernel": learnable,
        "composed python": lambda: both(composed(x, scale, shift, grid)),
        "our function, not in blocks": own(PLAIN),
    }
    if spec.channel_axis != 0:
        convolution = nn.Conv2d(shape[1], shape[1], 3, padding=1, bias=False)

        def convolve() -> None:
            torch.autograd.grad(convolution(x), [x, convolution.weight], gradient)

        def activate() -> None:
            torch.autograd.grad(nn.functional.silu(x), x, gradient)

        work["SiLU, for scale"] = activate
        work["3x3 convolution, for scale"] = convolve
    return work


def measure(work: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each form in every round; the forms take turns, and which begins moves on."""
    for each in work.values():
        each()
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            began = time.process_time()
            work[name]()
            seconds[name].append(time.process_time() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tensors, two rounds: only to see that it runs")
    parser.add_argument("--rounds", type=int, default=15, help="how often each form runs (default: 15)")
    parser.add_argument("--json", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 2 if options.quick else options.rounds
    results = []
    for name, (shape, spec) in WORKLOADS.items():
        size = QUICK if options.quick else shape
        seconds = measure(forms(size, spec), rounds)
        print(f"{name} {list(size)}, forward and backward")
        for form, samples in seconds.items():
            ratio = statistics.median(other / own for other, own in zip(samples, seconds[OURS], strict=True))
            milliseconds = statistics.median(samples) * 1e3
            print(f"  {form:<30}{milliseconds:>9.2f} ms{ratio:>8.2f} x ours")
            results.append({"workload": name, "shape": size, "form": form, "milliseconds": milliseconds, "ratio_to_ours": ratio})
    if options.json:
        written = {"benchmark": "fake_quant", "threads": 1, "rounds": rounds, "torch": torch.__version__, "results": results}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
