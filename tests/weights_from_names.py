"""The weights and inputs that the parity references were computed at: functions of key names and seeds, so no weight file is needed."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def weights_from_names(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Every entry of an official-layout state dict, drawn anew from its name. `state` holds freshly initialised values."""
    return {key: _draw(key, value, seed) for key, value in state.items()}


def _draw(key: str, value: Tensor, seed: int) -> Tensor:
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    shape = tuple(value.shape)
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(value)
    z = generator.standard_normal(shape, dtype=np.float32) if shape else np.float32(generator.standard_normal())
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "logit_scale":  # around its initial value: ln(1/0.07) for v1, -1 for v2
        drawn = np.float32(value.item() + 0.05 * float(z))
    elif leaf == "running_var":
        drawn = 0.6 + 0.8 * generator.random(shape, dtype=np.float32)
    elif leaf == "running_mean":
        drawn = 0.1 * z
    elif leaf == "weight" and value.ndim == 1:
        drawn = 1.0 + 0.1 * z
    elif leaf == "weight":
        drawn = z * np.float32(1.4 / math.sqrt(int(np.prod(shape[1:]))))
        if key.endswith("guide_fc.weight"):  # the text is L2-normalised: let the gates really vary
            drawn = drawn * np.float32(40.0)
    elif leaf == "bias" and value.ndim == 0:
        drawn = np.float32(-4.0 + 0.1 * float(z))
    else:
        drawn = 0.1 * z
    return torch.as_tensor(np.asarray(drawn, dtype=np.float32)).reshape(shape).to(value.dtype)


def reference_inputs(
    batch: int = 2, height: int = 320, width: int = 256, texts: int = 7, dim: int = 512, seed: int = 123
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and L2-normalised text embeddings. The forward references use the defaults."""
    generator = np.random.Generator(np.random.PCG64(seed))
    images = torch.from_numpy(generator.random((batch, 3, height, width), dtype=np.float32))
    text = torch.from_numpy(generator.standard_normal((batch, texts, dim), dtype=np.float32))
    return images, text / text.norm(p=2, dim=-1, keepdim=True)
