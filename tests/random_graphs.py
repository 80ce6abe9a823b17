"""Random small networks of the parts that detectors are made of, for tests that hold whatever the network is."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from crqat_fx.models.yolo_world import SPPF, Bottleneck, Concat, ConvModule, MaxSigmoidAttention
from crqat_fx.recipe import QuantRecipe, QuantRule
from passes.spec import QuantSpec

TEXT_WIDTH, TEXTS, SIDE = 16, 5, 8
PARTS = ("residual", "split", "pool", "resize", "attention")


@dataclass(frozen=True)
class Plan:
    """What a network is made of: parts in order, their widths, the bits of weights and activations, and the seed of its weights."""

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    weight_bits: int
    activation_bits: int
    constant_text: bool
    seed: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A convolution chain with at least two of the other parts."""
    others = draw(st.lists(st.sampled_from(PARTS), min_size=2, max_size=4, unique=True))
    parts = draw(st.permutations(["convolution", *others]))
    widths = draw(st.lists(st.sampled_from([4, 6, 8, 12, 16]), min_size=len(parts), max_size=len(parts)))
    return Plan(
        tuple(parts),
        tuple(widths),
        draw(st.sampled_from([2, 3, 4, 5, 7, 8])),
        draw(st.sampled_from([3, 4, 5, 8])),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


class Split(nn.Module):
    """Half of the channels go through a convolution and are put beside the others again, in another order."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.half = width // 2
        self.main = ConvModule(inputs, 2 * self.half, 1)
        self.side = ConvModule(self.half, self.half, 3)
        self.concat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        first, last = torch.split(self.main(x), [self.half, self.half], 1)
        return self.concat(self.side(last), first, last)


class Net(nn.Module):
    """The parts of a plan, one after the other, with a last convolution behind them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(plan.seed)
        width = 3
        blocks: list[nn.Module] = []
        for part, asked in zip(plan.parts, plan.widths, strict=True):
            if part in ("residual", "pool", "attention") or width == 3:
                blocks.append(ConvModule(width, asked, 3, stride=1 + (part == "convolution")))
                width = asked
            if part == "residual":
                blocks.append(Bottleneck(width, identity=True))
            elif part == "split":
                blocks.append(Split(width, asked))
                width = asked // 2 * 3
            elif part == "pool":
                blocks.append(SPPF(width))
            elif part == "resize":
                blocks.append(nn.Upsample(scale_factor=2, mode="nearest"))
            elif part == "attention":
                blocks.append(MaxSigmoidAttention(width, TEXT_WIDTH))
            else:
                blocks += [ConvModule(width, asked, 1), ConvModule(asked, asked, 3, activation=False)]
                width = asked
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(width, 5, 1)
        self.constant_text = plan.constant_text
        self.register_buffer("text", nn.functional.normalize(torch.randn(1, TEXTS, TEXT_WIDTH, generator=generator), dim=2))
        for name, value in self.state_dict().items():  # random and lively: norms with statistics that are not those of a fresh one
            if value.is_floating_point() and name != "text":
                drawn = torch.randn(value.shape, generator=generator)
                positive = name.endswith("running_var") or (".bn." in name and name.endswith("weight"))
                fan = value[0].numel() if value.dim() > 1 else 1
                value.copy_(drawn.abs() * 0.5 + 0.5 if positive else drawn * (1.5 / fan) ** 0.5 if value.dim() > 1 else drawn * 0.2)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        texts = self.text if self.constant_text else text
        for block in self.blocks:
            images = block(images, texts) if isinstance(block, MaxSigmoidAttention) else block(images)
        return self.last(images)


def inputs_of(plan: Plan, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = nn.functional.normalize(torch.randn(1, TEXTS, TEXT_WIDTH, generator=generator), dim=2)
    return torch.rand(batch, 3, SIDE, SIDE, generator=generator), text.expand(batch, -1, -1)


def recipe_of(plan: Plan) -> QuantRecipe:
    weight = QuantSpec(plan.weight_bits, symmetric=True, channel_axis=0)
    attention = QuantSpec(8, channel_axis=1)
    return QuantRecipe(
        (
            QuantRule("*", weight, QuantSpec(plan.activation_bits)),
            QuantRule("*.max_similarity", activation=attention, optional=True),
            QuantRule("*.gate", activation=attention, optional=True),
        )
    )
