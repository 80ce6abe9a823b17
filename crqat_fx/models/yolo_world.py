"""YOLO-World, the open-vocabulary detector, top to bottom in plain PyTorch: v1 and v2, any depth and width.

    images [B,3,H,W], text [B,N,D]
       backbone   CSP-Darknet                                      c3, c4, c5 at strides 8, 16, 32
       neck       PAN whose CSP layers are gated by the text       p3, n4, n5
       head       towers per stride                                bins: box distances, regions: one embedding a cell
       contrast   regions against the text                         logits

Parameter names equal the official checkpoints', so loading is strict. `torch.fx.symbolic_trace` works as it is and holds for other
batch sizes, picture sizes and vocabularies: adds, concats and products are small named modules that a tracer may keep as leaves, and
`max_similarity` is one node. Anchors, losses, assignment and NMS live outside.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16, 32)
BINS = 16  # of each side's distance distribution
BN_EPS, BN_MOMENTUM = 1e-3, 0.03
SMALLEST_HALF = 2.0**-24  # of 16-bit numbers: a region that is all zero is divided by it, and not by an eps that they round to zero
HEAD_DIM = 32  # of the max-sigmoid attention, for all published sizes; others have wider heads where 32 does not divide
TEXTS_AT_ONCE = 32  # of `max_similarity`: a block of scores that stays in the cache

Size = Literal["pico", "nano", "s", "m", "l", "x", "xl"]
SIZES: tuple[str, ...] = get_args(Size)
Levels = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class YoloWorldConfig:
    """Everything that decides the shape of a YOLO-World. Widths given as 0 follow from `widen`, as published."""

    version: int
    deepen: float
    widen: float
    last_stage: int = 1024  # channels of stride 32 before `widen`
    text_width: int = 512  # of the text and region embeddings
    class_width: int = 0  # of the classification towers
    box_width: int = 0  # of the box towers
    pool_width: int = 256  # of v1's image-pooling attention
    pool_heads: int = 8

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"version is {self.version}: YOLO-World is 1 or 2")
        if self.deepen <= 0 or self.widen <= 0:
            raise ValueError(f"deepen is {self.deepen} and widen {self.widen}: both must be positive")
        if self.pool_width % self.pool_heads:
            raise ValueError(f"pool_width {self.pool_width} does not divide into {self.pool_heads} heads")

    @property
    def channels(self) -> tuple[int, int, int, int, int]:
        """Of the stem and of strides 4, 8, 16, 32."""
        stem, p2, p3, p4, p5 = (math.ceil(base * self.widen / 8) * 8 for base in (64, 128, 256, 512, self.last_stage))
        return stem, p2, p3, p4, p5

    def repeats(self, blocks: int) -> int:
        return max(round(blocks * self.deepen), 1)

    @property
    def class_channels(self) -> int:
        return self.class_width or max(self.channels[2], 80)

    @property
    def box_channels(self) -> int:
        return self.box_width or max(16, self.channels[2] // 4, 4 * BINS)


_SCALES: dict[str, dict[str, float | int]] = {
    "pico": {"deepen": 0.33, "widen": 0.125, "class_width": 64, "pool_width": 64, "pool_heads": 2},
    "nano": {"deepen": 0.33, "widen": 0.25},
    "s": {"deepen": 0.33, "widen": 0.5},
    "m": {"deepen": 0.67, "widen": 0.75, "last_stage": 768},
    "l": {"deepen": 1.0, "widen": 1.0, "last_stage": 512},
    "x": {"deepen": 1.0, "widen": 1.25, "last_stage": 512},
    "xl": {"deepen": 1.0, "widen": 1.5, "last_stage": 512},
}


def config_for(size: str, version: int) -> YoloWorldConfig:
    """The preset of a size: `pico` and `nano`, for small machines, and v1's `xl` are ours; the others were published."""
    if size not in _SCALES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    return YoloWorldConfig(version=version, **_SCALES[size])  # type: ignore[arg-type]  # the table's integers are integers


def size_of(config: YoloWorldConfig) -> str | None:
    """The preset's name, or None for a configuration of the user's own."""
    return next((size for size in SIZES if config_for(size, config.version) == config), None)


def build(size: str, version: int) -> "YoloWorld":
    """A freshly initialised model of a preset."""
    return YoloWorld(config_for(size, version))


# --- small named modules: what quantizers, recipes and hooks can point at ---


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Concat(nn.Module):
    """Concatenates along the channels, or another axis."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.axis)


class Multiply(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


class MatMul(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


class Match(nn.Module):
    """Every text against every position: text [B,N,D], regions [B,D,HW], a scalar bias -> [B,N,HW], with no second tensor of that size.
    Texts [1,N,D] serve all pictures."""

    def forward(self, text: Tensor, regions: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, text.expand(regions.shape[0], -1, -1), regions)


@torch.fx.wrap
def max_similarity(guide: Tensor, embed: Tensor) -> Tensor:
    """The best match of each position among the texts, head by head: guide [B,m,N,c], embed [B,m,c,HW] -> [B,m,HW].

    The [B,m,N,HW] scores never exist at once, so that memory does not grow with the vocabulary. A position's gradient goes to its best
    text, the first of equals.
    """
    if torch.is_grad_enabled() and (guide.requires_grad or embed.requires_grad):
        best: Tensor = _MaxSimilarity.apply(guide, embed)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return best
    return functools.reduce(torch.maximum, (torch.matmul(texts, embed).amax(2) for texts in guide.split(TEXTS_AT_ONCE, 2)))


class _MaxSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, guide: Tensor, embed: Tensor) -> Tensor:
        best, index = torch.matmul(guide[:, :, :TEXTS_AT_ONCE], embed).max(2)
        for start in range(TEXTS_AT_ONCE, guide.shape[2], TEXTS_AT_ONCE):
            score, winner = torch.matmul(guide[:, :, start : start + TEXTS_AT_ONCE], embed).max(2)
            better = score > best
            best = torch.where(better, score, best)
            index = torch.where(better, winner + start, index)
        ctx.save_for_backward(guide, embed, index)
        return best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        guide, embed, index = ctx.saved_tensors
        index = index.unsqueeze(3).expand(-1, -1, -1, guide.shape[3])
        to_embed = guide.gather(2, index).transpose(2, 3) * gradient.unsqueeze(2)
        to_guide = torch.zeros_like(guide).scatter_add_(2, index, (embed * gradient.unsqueeze(2)).transpose(2, 3))
        return to_guide, to_embed


# --- blocks ---


class ConvModule(nn.Module):
    """Convolution, BatchNorm and, unless told otherwise, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, activation: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.activate = nn.SiLU() if activation else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.activate is None else self.activate(x)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, identity: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3)
        self.conv2 = ConvModule(channels, channels, 3)
        self.add = Add() if identity else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return y if self.add is None else self.add(x, y)


class C2f(nn.Module):
    """Cross-stage partial layer: half the channels run through a chain of bottlenecks whose every link reaches the last convolution."""

    def __init__(self, inputs: int, outputs: int, repeats: int) -> None:
        super().__init__()
        self.mid = outputs // 2
        self.main_conv = ConvModule(inputs, 2 * self.mid, 1)
        self.blocks = nn.ModuleList(Bottleneck(self.mid, identity=True) for _ in range(repeats))
        self.concat = Concat()
        self.final_conv = ConvModule((2 + repeats) * self.mid, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, last = torch.split(self.main_conv(x), [self.mid, self.mid], 1)
        parts = [first, last]
        for block in self.blocks:
            last = block(last)
            parts.append(last)
        return self.final_conv(self.concat(*parts))


class SPPF(nn.Module):
    """Spatial pyramid pooling by one pool applied three times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels // 2, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.concat = Concat()
        self.conv2 = ConvModule(channels // 2 * 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y1 = self.pool(x)
        y2 = self.pool(y1)
        return self.conv2(self.concat(x, y1, y2, self.pool(y2)))


class MaxSigmoidAttention(nn.Module):
    """Gates a feature map, head by head, by how well each position matches the best of the texts."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        most = max(channels // HEAD_DIM, 1)
        self.heads = next(heads for heads in range(most, 0, -1) if channels % heads == 0)  # `most` at every published width
        self.scale = (channels // self.heads) ** -0.5
        self.bias = nn.Parameter(torch.zeros(self.heads))
        self.guide_fc = nn.Linear(text_width, channels)
        self.project_conv = ConvModule(channels, channels, 3, activation=False)
        self.gate = Multiply()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        guide = self.guide_fc(text).unflatten(2, (self.heads, -1)).transpose(1, 2)
        embed = x.unflatten(1, (self.heads, -1)).flatten(3)
        score = max_similarity(guide, embed) * self.scale + self.bias.unsqueeze(1)
        projected = self.project_conv(x)
        gated = self.gate(projected.unflatten(1, (self.heads, -1)).flatten(3), torch.sigmoid(score).unsqueeze(2))
        return gated.view_as(projected)


class TextGatedC2f(nn.Module):
    """A C2f without residual adds whose last link is gated by the text (the paper's T-CSP layer)."""

    def __init__(self, inputs: int, outputs: int, repeats: int, text_width: int) -> None:
        super().__init__()
        self.mid = outputs // 2
        self.main_conv = ConvModule(inputs, 2 * self.mid, 1)
        self.blocks = nn.ModuleList(Bottleneck(self.mid, identity=False) for _ in range(repeats))
        self.attn_block = MaxSigmoidAttention(self.mid, text_width)
        self.concat = Concat()
        self.final_conv = ConvModule((3 + repeats) * self.mid, outputs, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        first, last = torch.split(self.main_conv(x), [self.mid, self.mid], 1)
        parts = [first, last]
        for block in self.blocks:
            last = block(last)
            parts.append(last)
        parts.append(self.attn_block(last, text))
        return self.final_conv(self.concat(*parts))


class Projection(nn.Module):
    """A bare 1x1 convolution, in the module that the checkpoints' names ask for."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ImagePoolingAttention(nn.Module):
    """v1: the texts read 3 x 3 pooled patches of three feature maps."""

    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        width, text_width = config.pool_width, config.text_width
        self.heads = config.pool_heads
        self.scale = (width // self.heads) ** -0.5
        self.projections = nn.ModuleList(Projection(channels, width) for channels in config.channels[2:])
        self.pool = nn.AdaptiveMaxPool2d(3)
        self.concat = Concat(2)
        self.query = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.value = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.match = MatMul()
        self.mix = MatMul()
        self.proj = nn.Linear(width, text_width)
        self.add = Add()

    def forward(self, text: Tensor, p3: Tensor, p4: Tensor, c5: Tensor) -> Tensor:
        patches = [self.pool(project(x)).flatten(2) for project, x in zip(self.projections, (p3, p4, c5), strict=True)]
        tokens = self.concat(*patches).transpose(1, 2)
        query = self.query(text).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key = self.key(tokens).unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1)
        value = self.value(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
        attention = torch.softmax(self.match(query, key) * self.scale, -1)
        mixed = self.mix(attention, value).transpose(1, 2).flatten(2)
        return self.add(self.proj(mixed), text)


# --- backbone, neck, head ---


class Darknet(nn.Module):
    """CSP-Darknet of YOLOv8."""

    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        stem, p2, p3, p4, p5 = config.channels
        self.stem = ConvModule(3, stem, 3, stride=2)
        self.stage1 = nn.Sequential(ConvModule(stem, p2, 3, stride=2), C2f(p2, p2, config.repeats(3)))
        self.stage2 = nn.Sequential(ConvModule(p2, p3, 3, stride=2), C2f(p3, p3, config.repeats(6)))
        self.stage3 = nn.Sequential(ConvModule(p3, p4, 3, stride=2), C2f(p4, p4, config.repeats(6)))
        self.stage4 = nn.Sequential(ConvModule(p4, p5, 3, stride=2), C2f(p5, p5, config.repeats(3)), SPPF(p5))

    def forward(self, images: Tensor) -> Levels:
        c3 = self.stage2(self.stage1(self.stem(images)))
        c4 = self.stage3(c3)
        return c3, c4, self.stage4(c4)


class Backbone(nn.Module):
    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        self.image_model = Darknet(config)

    def forward(self, images: Tensor) -> Levels:
        return self.image_model(images)


class TextGuidedPan(nn.Module):
    """Path aggregation, top-down then bottom-up. v1 refreshes the text from the pictures half-way; v2 keeps it."""

    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        _, _, p3, p4, p5 = config.channels
        repeats, text_width = config.repeats(3), config.text_width
        self.upsample_layers = nn.ModuleList(nn.Upsample(scale_factor=2, mode="nearest") for _ in range(2))
        self.top_down_concats = nn.ModuleList(Concat() for _ in range(2))
        self.top_down_layers = nn.ModuleList(
            [TextGatedC2f(p4 + p5, p4, repeats, text_width), TextGatedC2f(p3 + p4, p3, repeats, text_width)],
        )
        self.text_enhancer = ImagePoolingAttention(config) if config.version == 1 else None
        self.downsample_layers = nn.ModuleList([ConvModule(p3, p3, 3, stride=2), ConvModule(p4, p4, 3, stride=2)])
        self.bottom_up_concats = nn.ModuleList(Concat() for _ in range(2))
        self.bottom_up_layers = nn.ModuleList(
            [TextGatedC2f(p3 + p4, p4, repeats, text_width), TextGatedC2f(p4 + p5, p5, repeats, text_width)],
        )

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor, text: Tensor) -> Levels:
        p4 = self.top_down_layers[0](self.top_down_concats[0](self.upsample_layers[0](c5), c4), text)
        p3 = self.top_down_layers[1](self.top_down_concats[1](self.upsample_layers[1](p4), c3), text)
        if self.text_enhancer is not None:
            text = self.text_enhancer(text, p3, p4, c5)
        n4 = self.bottom_up_layers[0](self.bottom_up_concats[0](self.downsample_layers[0](p3), p4), text)
        n5 = self.bottom_up_layers[1](self.bottom_up_concats[1](self.downsample_layers[1](n4), c5), text)
        return p3, n4, n5


class ContrastiveHead(nn.Module):
    """exp(logit_scale) <text / |text|, region> + bias, the region L2-normalised in v1, batch-normalised in v2."""

    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(config.text_width, eps=BN_EPS, momentum=BN_MOMENTUM) if config.version == 2 else None
        self.bias = nn.Parameter(torch.zeros(()))
        self.logit_scale = nn.Parameter(torch.tensor(-1.0 if config.version == 2 else math.log(1 / 0.07)))
        self.match = Match()

    def forward(self, embedding: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and the regions: what the product reads, up to a positive scale."""
        regions = embedding if self.norm is None else self.norm(embedding)
        matched = F.normalize(embedding, dim=1, eps=SMALLEST_HALF) if self.norm is None else regions
        text = F.normalize(text, dim=2) * self.logit_scale.exp()
        logits = self.match(text, matched.flatten(2), self.bias)
        return logits.unflatten(2, regions.shape[2:]), regions


class HeadModule(nn.Module):
    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        levels = config.channels[2:]
        self.cls_preds = nn.ModuleList(self._tower(inputs, config.class_channels, config.text_width) for inputs in levels)
        self.reg_preds = nn.ModuleList(self._tower(inputs, config.box_channels, 4 * BINS) for inputs in levels)
        self.cls_contrasts = nn.ModuleList(ContrastiveHead(config) for _ in levels)

    @staticmethod
    def _tower(inputs: int, width: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(ConvModule(inputs, width, 3), ConvModule(width, width, 3), nn.Conv2d(width, outputs, 1))

    def forward(self, p3: Tensor, n4: Tensor, n5: Tensor, text: Tensor) -> tuple[Levels, Levels, Levels]:
        features = (p3, n4, n5)
        (l3, r3), (l4, r4), (l5, r5) = [
            self.cls_contrasts[level](self.cls_preds[level](features[level]), text) for level in range(len(STRIDES))
        ]
        b3, b4, b5 = [self.reg_preds[level](features[level]) for level in range(len(STRIDES))]
        return (l3, l4, l5), (b3, b4, b5), (r3, r4, r5)


class Head(nn.Module):
    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        self.head_module = HeadModule(config)

    def forward(self, p3: Tensor, n4: Tensor, n5: Tensor, text: Tensor) -> tuple[Levels, Levels, Levels]:
        return self.head_module(p3, n4, n5, text)


class YoloWorld(nn.Module):
    """The whole detector. Pictures are RGB in [0, 1], sides multiples of 32; text is L2-normalised, one text at least."""

    def __init__(self, config: YoloWorldConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.neck = TextGuidedPan(config)
        self.bbox_head = Head(config)
        initialise_head(self)

    def forward(self, images: Tensor, text: Tensor) -> tuple[Levels, Levels, Levels]:
        """Logits [B,N,h,w], bins [B,64,h,w] (four sides by 16) and regions [B,D,h,w], each over strides 8, 16, 32."""
        c3, c4, c5 = self.backbone(images)
        p3, n4, n5 = self.neck(c3, c4, c5, text)
        return self.bbox_head(p3, n4, n5, text)


def initialise_head(model: YoloWorld, texts: int = 80, size: int = 640) -> None:
    """Starting biases: about five objects a picture of `size` pixels among `texts` texts. The defaults are the published ones."""
    head = model.bbox_head.head_module
    for contrast, tower, stride in zip(head.cls_contrasts, head.reg_preds, STRIDES, strict=True):
        nn.init.constant_(contrast.get_parameter("bias"), math.log(5 / texts / (size / stride) ** 2))
        nn.init.constant_(tower.get_parameter("2.bias"), 1.0)


# --- outside the traced module ---


def anchor_points(levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The centre of every cell [A,2] in input pixels (x, y), and its stride [A]: level by level, row by row."""
    centres, strides = [], []
    for level, stride in zip(levels, STRIDES, strict=True):
        height, width = level.shape[2:]
        y, x = torch.meshgrid(
            torch.arange(height, device=level.device, dtype=torch.float32),
            torch.arange(width, device=level.device, dtype=torch.float32),
            indexing="ij",
        )
        centres.append(((torch.stack([x, y], -1) + 0.5) * stride).flatten(0, 1))
        strides.append(torch.full((height * width,), float(stride), device=level.device))
    return torch.cat(centres), torch.cat(strides)


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """[B,C,h,w] of every level -> [B,A,C]."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


def decode_boxes(bins: Sequence[Tensor]) -> Tensor:
    """[B,64,h,w] of every level -> boxes [B,A,4], xyxy in input pixels."""
    points, strides = anchor_points(bins)
    distribution = flatten_levels(bins).float().unflatten(2, (4, BINS)).softmax(3)
    steps = torch.arange(BINS, device=distribution.device, dtype=torch.float32)
    distances = (distribution @ steps) * strides[:, None]
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], 2)
