"""Makes the checkpoint files that the tests read: published kinds, and parts of hostile ones.

Run as a script (`python checkpoint_files.py FOLDER sound|unusable`) it writes files that hold objects of ultralytics and mmengine. It
makes stand-ins for their classes first, which is why it is a process of its own: the process that reads has no such modules.
"""

import datetime
import functools
import json
import os
import pathlib
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from weights_from_names import weights_from_names

from crqat_fx.models.yolo_world import build

DATA = Path(__file__).parent / "data"
NAMES = ("person", "traffic light", "fire hydrant", "teddy bear", "toothbrush")


def weights(size: str, version: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the official layout, statistics and biases varied."""
    return {key: value.clone() for key, value in _drawn(size, version, seed).items()}


@functools.cache
def _drawn(size: str, version: int, seed: int) -> dict[str, Tensor]:
    return weights_from_names(build(size, version).state_dict(), seed)


def embeddings(names: tuple[str, ...] = NAMES, width: int = 512) -> Tensor:
    drawn = torch.randn(len(names), width, generator=torch.Generator().manual_seed(5))
    return drawn / drawn.norm(dim=1, keepdim=True)


def ultralytics_names(size: str, version: int) -> dict[str, tuple[str | None, list[int]]]:
    """ultralytics' names, as its own code gave them: key -> official key, shape. Pico is as deep as S, so its names are those of S.

    The file holds what they have in common once: module -> official module, {entry: shape}.
    """
    modules = json.loads((DATA / f"ultralytics_names_v{version}_{size}.json").read_text())
    return {
        ".".join(filter(None, (module, entry))): (official_module and ".".join(filter(None, (official_module, entry))), shape)
        for module, (official_module, entries) in modules.items()
        for entry, shape in entries.items()
    }


def official(path: Path, state: Mapping[str, object], **more: object) -> Path:
    torch.save({"meta": {"mmengine_version": "0.10.3"}, "state_dict": OrderedDict(state), **more}, path)
    return path


# --- archives by hand ---


def archive(path: Path, pickle: bytes, entries: Mapping[str, bytes] | None = None) -> Path:
    """An archive like torch.save's around a pickle given as bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        file.writestr("archive/version", "3\n")
        for entry, content in (entries or {}).items():
            file.writestr(entry, content)
    return path


def text(value: str) -> bytes:
    """The pickle instruction that pushes a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    """The pickle instruction that pushes a global."""
    return f"c{module}\n{attribute}\n".encode()


def pickled(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


class Call:
    """Pickles as a call of `function`, which whoever unpickles it makes."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


# --- files of other libraries' objects: written by a process that has stand-ins for their classes ---

ULTRALYTICS_CLASSES = {
    "ultralytics.nn.tasks": ("WorldModel", "DetectionModel"),
    "ultralytics.nn.modules.conv": ("Conv", "Concat"),
    "ultralytics.nn.modules.block": ("Bottleneck", "C2f", "C2fAttn", "SPPF", "MaxSigmoidAttnBlock", "ImagePoolingAttn", "DFL"),
    "ultralytics.nn.modules.head": ("WorldDetect", "Detect", "ContrastiveHead", "BNContrastiveHead"),
    "clip.model": ("CLIP",),
}


def write_foreign_files(folder: Path, kind: str) -> None:
    """Writes the files of a kind, `sound` or `unusable`, by running this file in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder), kind], check=True, env=environment)


def _stand_in_classes() -> dict[str, Any]:
    """Fake modules in sys.modules, their classes importable by pickle, so that it writes down their names."""
    plain = {
        "ultralytics.utils": {"IterableSimpleNamespace": types.SimpleNamespace},
        "mmengine.config.config": {"ConfigDict": dict},
        "mmengine.logging.history_buffer": {"HistoryBuffer": object},
    }
    described = {module: dict.fromkeys(names, nn.Module) for module, names in ULTRALYTICS_CLASSES.items()} | plain
    classes: dict[str, Any] = {}
    for module, bases in described.items():
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            package = ".".join(parts[:length])
            sys.modules.setdefault(package, types.ModuleType(package))
        for class_name, base in bases.items():
            made = type(class_name, (base,), {"__module__": module})
            setattr(sys.modules[module], class_name, made)
            classes[class_name] = made
    history: Any = classes["HistoryBuffer"]
    for statistic in ("min", "mean"):  # functions of a class: pickled as getattr(HistoryBuffer, "min")

        def method(self: object) -> None: ...

        method.__module__, method.__qualname__ = history.__module__, f"HistoryBuffer.{statistic}"
        setattr(history, statistic, method)

    def forward_fuse(self: object) -> None: ...

    classes["Conv"].forward_fuse = forward_fuse
    return classes


def _module(tree: dict[str, Any], classes: Mapping[str, Any], where: str = "") -> nn.Module:
    """A module tree from a tree of weights: torch's own layers at the leaves, stand-ins above, numbered children in containers."""
    leaves = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    branches = {key: value for key, value in tree.items() if not isinstance(value, Tensor)}
    children = {key: _module(value, classes, f"{where}.{key}") for key, value in branches.items()}
    module: nn.Module
    weight = leaves.get("weight")
    if "running_mean" in leaves:
        module = nn.BatchNorm2d(len(leaves["weight"]), eps=1e-3, momentum=0.03)
    elif weight is not None and weight.ndim == 4:
        module = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias="bias" in leaves)
    elif weight is not None and weight.ndim == 2:
        module = nn.Linear(weight.shape[1], weight.shape[0])
    elif weight is not None:
        module = nn.LayerNorm(len(weight))
    elif children and all(key.isdigit() for key in children):
        layers = [children.get(str(index), classes["Concat"]()) for index in range(max(map(int, children)) + 1)]
        return nn.Sequential(*layers) if where == ".model" else nn.ModuleList(layers)
    else:
        module = classes[_class_name(tree, where)]()
    for key, value in children.items():
        module.add_module(key, value)
    for key, value in leaves.items():
        if key in ("running_mean", "running_var", "num_batches_tracked"):
            module.register_buffer(key, value.clone())
        else:
            module.register_parameter(key, nn.Parameter(value.clone(), requires_grad=".dfl" not in where))
    if "conv" in children and type(module) is classes["Conv"]:
        module.act = nn.SiLU()
    return module


def _class_name(tree: Mapping[str, Any], where: str) -> str:
    known = {
        "cv4": "WorldDetect",
        "dfl": "Detect",
        "query": "ImagePoolingAttn",
        "gl": "MaxSigmoidAttnBlock",
        "attn": "C2fAttn",
        "m": "C2f",
        "norm": "BNContrastiveHead",
        "logit_scale": "ContrastiveHead",
    }
    if not where:
        return "WorldModel"
    if where.endswith(".dfl"):
        return "DFL"
    if "cv1" in tree and not {"m", "attn"} & set(tree):
        return "Bottleneck" if ".m." in where else "SPPF"
    return next((class_name for part, class_name in known.items() if part in tree), "Conv")


def _world_model(state: Mapping[str, Tensor], classes: Mapping[str, Any], version: int) -> Any:
    """A model of ultralytics as its training leaves it, before it is halved: weights of the official layout under its names."""
    flat: dict[str, Tensor] = {}
    for key, (official_key, shape) in ultralytics_names("s", version).items():
        value = torch.arange(16.0).view(1, 16, 1, 1) if official_key is None else state[official_key]
        flat[key] = value.reshape(1) if shape == [1] else value
    model: Any = _module(_tree(flat), classes)
    model.names = dict(enumerate(NAMES))
    model.txt_feats = embeddings().unsqueeze(0)
    model.nc, model.yaml, model.save, model.inplace, model.clip_model = len(NAMES), {"nc": len(NAMES), "scale": "s"}, [4, 6], True, None
    model.stride = model.model[-1].stride = torch.tensor([8.0, 16.0, 32.0])
    model.args = classes["IterableSimpleNamespace"](task="detect", imgsz=640)
    for index, layer in enumerate(model.model):
        layer.i, layer.f, layer.type, layer.np = index, -1, type(layer).__name__, 0
    return model


def _tree(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def _halved(model: Any) -> Any:
    """As published: 16 bits, the vocabulary too."""
    model.half()
    model.txt_feats = model.txt_feats.half()
    return model


def _write_sound(folder: Path, classes: Mapping[str, Any]) -> None:
    arguments = {"imgsz": 512, "project": pathlib.PurePosixPath("runs"), "save_dir": None}
    published = {"epoch": -1, "ema": None, "date": datetime.datetime(2024, 2, 14), "version": "8.1.9", "train_args": arguments}
    for version in (1, 2):
        for size in ("pico", "s"):
            model = _halved(_world_model(weights(size, version), classes, version))
            torch.save({"model": model, **published}, folder / f"ultralytics-v{version}-{size}.pt")

    def model(seed: int = 0) -> Any:
        return _world_model(weights("pico", 2, seed), classes, 2)

    training = {"model": model(1), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": {0, 1}}]}}
    averaged = model()
    averaged.clip_model = classes["CLIP"]()
    averaged.clip_model.logit_scale = nn.Parameter(torch.tensor(4.6))
    averaged.register_buffer("scratch", torch.zeros(3), persistent=False)
    torch.save(published | training | {"ema": _halved(averaged)}, folder / "ultralytics-training.pt")

    unset = model()
    unset.txt_feats = torch.randn(1, len(NAMES), 512)
    torch.save({"model": unset}, folder / "ultralytics-unset-vocabulary.pt")
    renamed = model()
    renamed.names = list(NAMES[:-1])
    torch.save({"model": renamed}, folder / "ultralytics-fewer-names.pt")
    for file, size in (("square", [320, 320]), ("oblong", (320, 640))):
        torch.save({"model": model(), "train_args": {"imgsz": size}}, folder / f"ultralytics-{file}.pt")

    _write_official_training(folder, classes)


def _write_unusable(folder: Path, classes: Mapping[str, Any]) -> None:
    def model() -> Any:
        return _world_model(weights("pico", 2), classes, 2)

    fused = model()
    for layer in fused.modules():
        if type(layer) is classes["Conv"] and hasattr(layer, "bn"):
            layer.conv.bias = nn.Parameter(layer.bn.bias.detach().clone())
            del layer.bn
            layer.forward = layer.forward_fuse
    torch.save({"model": fused}, folder / "fused.pt")
    head = model()
    for contrast in head.model[-1].cv4:
        del contrast.norm, contrast.bias, contrast.logit_scale
    torch.save({"model": head}, folder / "fused-head.pt")
    state = {key: value for key, value in model().state_dict().items() if ".attn." not in key and ".cv4." not in key}
    detector = _module(_tree(state), classes)
    detector.__class__ = classes["DetectionModel"]
    torch.save({"model": detector}, folder / "no-text.pt")
    bins = model()
    bins.model[-1].dfl.conv.weight.data.mul_(2)
    torch.save({"model": bins}, folder / "other-bins.pt")
    cyclic = model()
    cyclic._modules["again"] = cyclic
    torch.save({"model": cyclic}, folder / "cyclic.pt")


def _write_official_training(folder: Path, classes: Mapping[str, Any]) -> None:
    """What mmengine's runner saves: averages, optimizer, schedulers, and a message hub full of its own objects."""
    state = weights("pico", 1)
    losses = classes["HistoryBuffer"]()
    losses.max_length = 1_000_000
    losses._log_history, losses._count_history = np.linspace(3, 1, 50), np.ones(50, dtype=np.int64)
    losses._statistics_methods = {"min": type(losses).min, "mean": type(losses).mean}
    kept: Any = OrderedDict(state)
    kept._metadata = OrderedDict({"": {"version": 1}})
    kept["data_preprocessor.mean"] = torch.zeros(3, 1, 1)
    kept["backbone.text_model.model.text_model.embeddings.token_embedding.weight"] = torch.ones(7, 4)
    kept["backbone.text_model.model.text_model.embeddings.position_ids"] = torch.arange(5).unsqueeze(0)
    kept["backbone.text_model.model.text_projection.weight"] = torch.ones(4, 4).half()
    content = {
        "meta": {
            "epoch": 100,
            "best": np.float64(0.354),
            "cfg": "model = dict()\n",
            "dataset_meta": {"CLASSES": NAMES, "PALETTE": np.zeros((5, 3), np.uint8)},
            "hooks": classes["ConfigDict"](type="EMAHook", momentum=1e-4),
            "time": datetime.datetime(2024, 1, 30, 12),
        },
        "state_dict": kept,
        "ema_state_dict": OrderedDict({"steps": torch.tensor(9)} | {f"module.{key}": value for key, value in state.items()}),
        "message_hub": {"log_scalars": OrderedDict(loss=losses), "runtime_info": OrderedDict(iter=3), "resumed_keys": OrderedDict()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": 4}}, "param_groups": [{"lr": 2e-3, "betas": (0.9, 0.999)}]},
        "param_schedulers": [{"last_step": 3, "by_epoch": True, "device": torch.device("cpu"), "shape": torch.Size([1, 2])}],
    }
    torch.save(content, folder / "official-training.pth")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"sound": _write_sound, "unusable": _write_unusable}[sys.argv[2]](Path(sys.argv[1]), _stand_in_classes())
