"""What the inference benchmarks run: models of the published sizes with drawn weights, drawn texts, and the files made of them.

Weights and texts do not decide how long a file takes; shapes and kernels do. The weights are drawn so that activations keep their size
through the layers, as trained ones do: none overflows, fades, or becomes a denormal, which some processors compute slowly.
"""

import copy
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crqat_fx.export import OUTPUTS, export
from crqat_fx.models.yolo_world import ContrastiveHead, Levels, MaxSigmoidAttention, YoloWorld, build
from crqat_fx.quantize.calibrate import calibrate, picture_batches
from crqat_fx.quantize.prepare import prepare
from crqat_fx.quantize.prepared import Prepared
from crqat_fx.vocabulary import Vocabulary

CALIBRATION_PICTURES = 2  # ranges are wanted that fit, not accuracy


@dataclass(frozen=True)
class Workload:
    """One model at one size of pictures, and the files of it. All return raw outputs, so that no engine is timed at decoding."""

    size: str
    version: int = 2
    pixels: int = 640
    texts: int = 80

    @property
    def name(self) -> str:
        return f"v{self.version}-{self.size}"

    @functools.cached_property
    def model(self) -> YoloWorld:
        return drawn_model(self.size, self.version)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return drawn_vocabulary(self.texts, self.model.config.text_width)

    def write_float(self, path: Path, form: str = "straight", **settings: Any) -> Path:
        """Form (a) is `straight`: this project's model as it is written."""
        export(self.model, path, vocabulary=self.vocabulary, form=form, size=self.pixels, outputs="raw", **settings)  # type: ignore[arg-type]
        return path

    def write_integers(self, path: Path, recipe: str, target: str = "ort", **settings: Any) -> Path:
        export(prepared_for(self, recipe, target), path, outputs="raw", **settings)
        return path

    def write_public_form(self, path: Path) -> Path:
        """Form (b): what torch's TorchScript exporter, which public deployments call, writes of attention and contrast as Einsum."""
        write_public_form(self.model, self.vocabulary, path, self.pixels)
        return path


@functools.lru_cache(maxsize=1)
def prepared_for(workload: Workload, recipe: str, target: str) -> Prepared:
    """Calibrated, not trained; kept for the next file of the same."""
    prepared = prepare(workload.model, recipe=recipe, target=target, vocabulary=workload.vocabulary, size=workload.pixels)
    pictures = drawn_pictures(CALIBRATION_PICTURES, workload.pixels)
    calibrate(prepared, picture_batches(prepared, pictures, 1), "minmax", CALIBRATION_PICTURES)
    return prepared


def drawn_model(size: str, version: int = 2, seed: int = 0) -> YoloWorld:
    """A model of a published size, its weights and norms drawn."""
    model = build(size, version)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                inputs = module.weight[0].numel()
                module.weight.normal_(0, 1.4 / math.sqrt(inputs), generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                mean, variance = module.running_mean, module.running_var
                assert mean is not None
                assert variance is not None
                mean.normal_(0, 0.1, generator=generator)
                variance.uniform_(0.6, 1.4, generator=generator)
                module.weight.normal_(1, 0.1, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def drawn_vocabulary(texts: int = 80, width: int = 512, seed: int = 0) -> Vocabulary:
    embeddings = np.random.default_rng(seed).standard_normal((texts, width), dtype=np.float32)
    return Vocabulary(tuple(f"thing {number}" for number in range(texts)), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


def drawn_pictures(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Bytes, smooth patches and some noise: ranges as photographs give them."""
    generator = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 9, 9)).astype(np.float32))
        smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0].permute(1, 2, 0).numpy()
        noisy = smooth + generator.normal(0, 8, smooth.shape)
        pictures.append(noisy.clip(0, 255).astype(np.uint8))
    return pictures


# --- the form that public exporters write ---


class EinsumAttention(nn.Module):
    """The same attention with the scores of every text at once, as an Einsum over five axes."""

    def __init__(self, attention: MaxSigmoidAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        attention = self.attention
        batch, _, height, width = x.shape
        guide = attention.guide_fc(text).reshape(batch, text.shape[1], attention.heads, -1)
        embed = x.reshape(batch, attention.heads, -1, height, width)
        best = torch.einsum("bmchw,bnmc->bmhwn", embed, guide).max(-1)[0]
        gate = torch.sigmoid(best * attention.scale + attention.bias[None, :, None, None])
        projected = attention.project_conv(x).reshape(batch, attention.heads, -1, height, width)
        return (projected * gate.unsqueeze(2)).reshape(batch, -1, height, width)


class EinsumContrast(nn.Module):
    """The same head with its match as an Einsum."""

    def __init__(self, contrast: ContrastiveHead) -> None:
        super().__init__()
        self.contrast = contrast

    def forward(self, embedding: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        contrast = self.contrast
        regions = F.normalize(embedding, dim=1) if contrast.norm is None else contrast.norm(embedding)
        logits = torch.einsum("bchw,bnc->bnhw", regions, F.normalize(text, dim=2))
        return logits * contrast.logit_scale.exp() + contrast.bias, regions


class ForAVocabulary(nn.Module):
    """A detector whose texts are constant: pictures in, raw outputs out."""

    def __init__(self, model: YoloWorld, text: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("text", text)

    def forward(self, images: Tensor) -> tuple[*Levels, *Levels]:
        (l3, l4, l5), (b3, b4, b5), _ = self.model(images, self.get_buffer("text"))
        return l3, l4, l5, b3, b4, b5


def as_einsum(model: YoloWorld) -> YoloWorld:
    """A copy that computes the same, attention and contrast written as Einsum."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        owner, _, last = name.rpartition(".")
        if isinstance(module, MaxSigmoidAttention):
            model.get_submodule(owner).add_module(last, EinsumAttention(module))
        elif isinstance(module, ContrastiveHead):
            model.get_submodule(owner).add_module(last, EinsumContrast(module))
    return model


def write_public_form(model: YoloWorld, vocabulary: Vocabulary, path: Path, pixels: int, names: Sequence[str] = OUTPUTS) -> None:
    module = ForAVocabulary(as_einsum(model), torch.from_numpy(vocabulary.embeddings)[None]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, which is not this benchmark's question
        torch.onnx.export(
            module,
            (torch.zeros(1, 3, pixels, pixels),),
            path,
            input_names=["images"],
            output_names=list(names),
            opset_version=17,
            dynamo=False,
        )
