"""A module of one's own in which every entry of a target's table makes a difference, its recipe, and mere marks for quantizers."""

import torch
import torch.nn.functional as F
from torch import nn

from crqat_fx.models import yolo_world
from crqat_fx.models.yolo_world import Add, Concat, Match, MatMul, Multiply
from crqat_fx.recipe import QuantRecipe, QuantRule
from passes.spec import QuantSpec


class Marked(nn.Module):
    """Stands where a quantizer would, and lets everything through."""

    is_quantizer = True

    def __init__(self, spec, known=None):
        super().__init__()
        self.spec, self.known = spec, known

    def extra_repr(self):
        kind = "s" if self.spec.symmetric else "u"
        axis = "" if self.spec.channel_axis is None else f", axis {self.spec.channel_axis}"
        return f"{kind}{self.spec.bits}{axis}{'' if self.known is None else ', known'}"

    def forward(self, x):
        return x


class Joining(nn.Module):
    """What a C2f has: a split, an add and a pool, and a concat that joins them."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.silu = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        self.second, self.add, self.pool = nn.Conv2d(4, 4, 1), Add(), nn.MaxPool2d(3, 1, 1)
        self.concat, self.other_concat = Concat(), Concat()

    def forward(self, x):
        left, right = torch.split(self.silu(self.bn(self.first(x))), [4, 4], 1)
        added = self.add(right, self.second(right * 2.0))
        return added, self.concat(left, self.pool(added)), self.other_concat(right, left)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.joining = nn.Conv2d(3, 4, 1), Joining()

    def forward(self, x):
        return self.joining(self.stem(x))


class EveryKind(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.up, self.third, self.relu = Body(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.guide, self.bias, self.gate = nn.Linear(6, 8), nn.Parameter(torch.randn(2, 1)), Multiply()
        self.patches, self.similar, self.mix, self.place = nn.AdaptiveMaxPool2d(2), MatMul(), MatMul(), nn.Parameter(torch.randn(4, 4))
        self.norm, self.other_silu, self.other_gate = nn.LayerNorm(8), nn.SiLU(), Multiply()
        self.regions, self.match, self.last = nn.Conv2d(8, 6, 1), Match(), nn.Linear(8, 5)

    def forward(self, images, text):
        added, joined, inner = self.body(images)
        z = self.relu(self.third(self.up(inner)))
        guide = self.guide(text).unflatten(2, (2, -1)).transpose(1, 2)
        embed = z.unflatten(1, (2, -1)).flatten(3)
        score = yolo_world.max_similarity(guide, embed) * 0.5 + self.bias
        gated = self.gate(embed, torch.sigmoid(score).unsqueeze(2))
        patches = self.patches(z).flatten(2)
        rows = patches.permute(0, 2, 1)
        attention = torch.softmax(self.similar(rows, patches) + self.place, -1)
        mixed = self.mix(attention, rows)
        normed = self.norm(mixed)
        floating = self.last(self.other_gate(normed, torch.sigmoid(self.other_silu(normed))))
        regions = F.normalize(self.regions(gated.view_as(z)), dim=1)
        return self.match(text, regions.flatten(2), self.bias[0]), floating, mixed, attention, gated, added, joined


WEIGHT = QuantSpec(8, symmetric=True, channel_axis=0)
RECIPE = QuantRecipe(
    (
        QuantRule("*", WEIGHT, QuantSpec(4)),
        *(QuantRule(path, activation=QuantSpec(6, channel_axis=1)) for path in ("max_similarity", "gate", "similar", "mix", "match")),
    ),
    share_scales=True,
)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 8, 8, generator=generator), torch.randn(2, 3, 6, generator=generator)
