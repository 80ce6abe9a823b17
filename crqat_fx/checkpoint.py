"""Reads YOLO-World checkpoints of three kinds as one, and writes this project's own.

    official     mmengine's .pth, published or from training: `state_dict`, which holds the averaged weights already
    ultralytics  a pickled model: the same weights under other names, its vocabulary baked in
    crqat-fx     what `write_checkpoint` writes: plain data that `torch.load(weights_only=True)` reads too

Size, version and text width are found in the weights. Nothing in a file is run (see `crqat_fx.unpickle`), and a file is taken whole or
refused: every entry the model has must be there, of its shape, of numbers that can be, and no other.
"""

import dataclasses
import logging
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from crqat_fx.data.shapes import ShapesTask
from crqat_fx.errors import UserError
from crqat_fx.files import written
from crqat_fx.models.yolo_world import BINS, SIZES, YoloWorld, YoloWorldConfig, config_for, size_of
from crqat_fx.shipped import locate
from crqat_fx.unpickle import AGAIN, Archive, Inert, StoredTensor, opened, shown
from crqat_fx.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

FORMAT = "crqat-fx checkpoint"
FORMAT_VERSION = 1
DRAWN = "drawn_task_seed"  # metadata of a model of the drawn task: the vocabulary is a function of it and need not be stored

Origin = Literal["official", "ultralytics", "crqat-fx", "preset"]  # a preset comes from no file: its weights are freshly drawn
Stored = Mapping[str, StoredTensor]

_STEM = "backbone.image_model.stem.conv.weight"
_GUIDE = "neck.top_down_layers.0.attn_block.guide_fc.weight"
_TEXT_MODEL = "backbone.text_model."
_DROPPED = ("data_preprocessor.", _TEXT_MODEL)
_MODEL = "give a YOLO-World checkpoint: an official .pth, an ultralytics -world or -worldv2 .pt, or one that crqat-fx wrote"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's content, whichever kind of file it came from."""

    path: Path
    origin: Origin
    config: YoloWorldConfig
    state: dict[str, Tensor]  # in float32, under the official names
    vocabulary: Vocabulary | None = None
    text_model: dict[str, Tensor] | None = None  # CLIP's text encoder, under transformers' names
    extra: dict[str, object] = dataclasses.field(default_factory=dict)  # what the file says of itself: the picture size as `size`, ...


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Whatever kind of checkpoint is at `path`, or the shipped model of that name; a UserError says what is wrong with any other file."""
    with opened(locate(path)) as archive:
        return checkpoint_in(archive)


def checkpoint_in(archive: Archive) -> Checkpoint:
    """The checkpoint in a file that is open."""
    contents = archive.contents
    if not isinstance(contents, dict):
        held = contents.kind if isinstance(contents, Inert) else type(contents).__name__
        raise UserError(f"holds {held}, not a checkpoint", where=archive.path, remedy=_MODEL)
    kind = contents.get("format")
    if kind == FORMAT:
        return _read_own(contents, archive)
    if isinstance(kind, str) and kind.startswith("crqat-fx "):
        raise UserError(
            f"is a {shown(kind)} file, not a checkpoint", where=archive.path, remedy="give the checkpoint that it was made from"
        )
    model = contents.get("ema") or contents.get("model")
    if isinstance(model, Inert):
        return _read_ultralytics(contents, model, archive)
    return _read_official(contents, archive)


def load_model(path: str | Path) -> tuple[YoloWorld, Checkpoint]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint. Both share the weights' memory."""
    checkpoint = read_checkpoint(path)
    return model_of(checkpoint), checkpoint


def model_of(checkpoint: Checkpoint) -> YoloWorld:
    with torch.device("meta"):
        model = YoloWorld(checkpoint.config)
    model.load_state_dict(checkpoint.state, assign=True)
    return model.eval()


def write_checkpoint(
    path: str | Path,
    model_or_state: nn.Module | Mapping[str, Tensor],
    config: YoloWorldConfig,
    *,
    vocabulary: Vocabulary | None = None,
    half: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Writes this project's own file, whole or not at all. `half` stores floats in 16 bits; they are read back as float32.

    `metadata` is plain: scalars, strings, and lists and dicts of them.
    """
    given = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    state = {key: value.detach().cpu().contiguous() for key, value in given.items()}
    _check_entries({key: tuple(value.shape) for key, value in state.items()}, config, path)
    if vocabulary is not None and vocabulary.width != config.text_width:
        what = f"the vocabulary is {vocabulary.width} wide and the model's text {config.text_width}"
        raise UserError(what, where=path, remedy="embed it with the CLIP that the model was trained with")
    _check_numbers(state, path, "go back to weights from before they broke")
    embeddings = None if vocabulary is None else torch.from_numpy(vocabulary.embeddings)
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        embeddings = None if embeddings is None else embeddings.half()
        _check_numbers(state, path, "they are too large for 16 bits: write them in full")
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        # a tensor that views a larger one would take all of it into the file
        "state": {key: value.clone() if value.untyped_storage().nbytes() > value.nbytes else value for key, value in state.items()},
        "vocabulary": None if vocabulary is None else {"names": list(vocabulary.names), "embeddings": embeddings},
        "metadata": _plain(dict(metadata or {})),
    }
    write_archive(path, content)


def write_archive(path: str | Path, content: object) -> None:
    """torch.save, whole or not at all, and straight to the file: no copy of the weights is made."""
    with written(path) as temporary, temporary.open("wb") as file:  # of a path torch would take the archive's name
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the file's own word, which torch covers up
                raise error.__context__ from error
            raise


# --- the three kinds ---


def _read_official(contents: dict[object, object], archive: Archive) -> Checkpoint:
    where = archive.path
    stored = _tensors(contents.get("state_dict", contents), where)
    state = {key: value for key, value in stored.items() if not key.startswith(_DROPPED)}
    if "embeddings" in state or any(key.startswith("adapter.") for key in state):
        raise UserError(
            "is prompt-tuned: it was trained for one fixed vocabulary, whose embeddings it holds in place of a text encoder",
            where=where,
            remedy="give the checkpoint it was tuned from, and a vocabulary",
        )
    if any(re.search(r"attn_block\.guide_(weight|convs)|cls_contrasts\.\d+\.conv\.", key) for key in state):
        raise UserError(
            "is re-parameterised: its vocabulary is folded into its convolutions, so it can neither take another nor be trained",
            where=where,
            remedy="give the checkpoint it was made from, and a vocabulary",
        )
    config = _config_of(state, where)
    text_model = {
        key.removeprefix(_TEXT_MODEL).removeprefix("model."): value for key, value in stored.items() if key.startswith(_TEXT_MODEL)
    }
    return Checkpoint(
        path=where,
        origin="official",
        config=config,
        state=_strictly(state, config, archive),
        text_model=_floats(text_model, archive) if text_model else None,
    )


def _read_ultralytics(contents: dict[object, object], model: Inert, archive: Archive) -> Checkpoint:
    where = archive.path
    stored = _module_tensors(model, where)
    if "model.0.conv.weight" not in stored:
        raise UserError(f"holds {model.kind}, no YOLO-World", where=where, remedy=_MODEL)
    guided = any(key.endswith(".attn.gl.weight") for key in stored)
    if "model.0.bn.weight" not in stored or (guided and not any(key.endswith(".logit_scale") for key in stored)):
        raise UserError(
            "is fused: BatchNorms are folded into convolutions, and its contrastive head is not what it was trained as",
            where=where,
            remedy="give the .pt file as published or as training left it, before fuse() or export",
        )
    if not guided:
        raise UserError(f"holds {model.kind}, which reads no text: no YOLO-World", where=where, remedy=_MODEL)
    version = 1 if any(key.startswith("model.16.query.") for key in stored) else 2
    state = {official_name(key, version): value for key, value in stored.items() if not key.startswith("clip_model.")}
    distances = state.pop("dfl.conv.weight", None)  # frozen: the bins' numbers
    if distances is not None and archive.tensor(distances).flatten().tolist() != list(range(BINS)):
        raise UserError(f"reads its boxes from other bins than 0 to {BINS - 1}", where=where, remedy=_MODEL)
    for key, value in state.items():
        if key.endswith(".bias") and ".cls_contrasts." in key and value.size == (1,):
            state[key] = dataclasses.replace(value, size=(), stride=())
    config = _config_of(state, where)
    arguments = contents.get("train_args")
    size = _picture_size(arguments.get("imgsz"), where) if isinstance(arguments, dict) else None
    return Checkpoint(
        path=where,
        origin="ultralytics",
        config=config,
        state=_strictly(state, config, archive),
        vocabulary=_baked_vocabulary(model, config, archive),
        extra={} if size is None else {"size": size},
    )


def _read_own(contents: dict[object, object], archive: Archive) -> Checkpoint:
    where = archive.path
    version = contents.get("format_version")
    if version != FORMAT_VERSION:
        told = version if type(version) is int and 0 <= version < 2**31 else "unknown"
        what = f"is a crqat-fx checkpoint of format {told}, and this release reads format {FORMAT_VERSION}"
        raise UserError(what, where=where, remedy="update crqat-fx")
    config = _own_config(contents.get("config"), where)
    stored = _tensors(contents.get("state"), where)
    metadata = contents.get("metadata")
    try:
        extra = _plain(metadata)
    except TypeError as error:
        raise UserError(f"is damaged: its metadata holds {error}", where=where, remedy=AGAIN) from error
    if not isinstance(extra, dict):
        raise UserError("is damaged: its metadata is no mapping", where=where, remedy=AGAIN)
    vocabulary = _own_vocabulary(contents.get("vocabulary"), config, archive)
    seed = extra.get(DRAWN)
    if vocabulary is None and type(seed) is int and 0 <= seed < 2**32:
        vocabulary = ShapesTask(seed).vocabulary
    return Checkpoint(
        path=where, origin="crqat-fx", config=config, state=_strictly(stored, config, archive), vocabulary=vocabulary, extra=extra
    )


# --- ultralytics' model as a state dict of official names ---

_LAYERS_BEFORE_TEXT = (
    "backbone.image_model.stem",
    *(f"backbone.image_model.stage{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)),
    "backbone.image_model.stage4.2",
    *("", "", "neck.top_down_layers.0"),  # "": upsample and concat, which have no weights
    *("", "", "neck.top_down_layers.1"),
)
_LAYERS_AFTER_TEXT = (
    *("neck.downsample_layers.0", "", "neck.bottom_up_layers.0"),
    *("neck.downsample_layers.1", "", "neck.bottom_up_layers.1"),
    "bbox_head.head_module",
)
_LAYERS = {
    1: (*_LAYERS_BEFORE_TEXT, "neck.text_enhancer", *_LAYERS_AFTER_TEXT),
    2: (*_LAYERS_BEFORE_TEXT, *_LAYERS_AFTER_TEXT),
}
_SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {  # by the layer's official name: its parts, ultralytics' and official
    r"stage4\.2": ((r"cv(\d)", r"conv\1"),),
    r"stage\d\.1|top_down|bottom_up": (
        (r"m\.(\d+)\.cv(\d)", r"blocks.\1.conv\2"),
        ("cv1", "main_conv"),
        ("cv2", "final_conv"),
        (r"attn\.gl", "attn_block.guide_fc"),
        (r"attn\.proj_conv", "attn_block.project_conv"),
        (r"attn\.bias", "attn_block.bias"),
    ),
    "text_enhancer": ((r"projections\.(\d)", r"projections.\1.conv"),),
    "head_module": (("cv2", "reg_preds"), ("cv3", "cls_preds"), ("cv4", "cls_contrasts"), (r"dfl\.conv\.weight", "dfl.conv.weight")),
}


def official_name(key: str, version: int) -> str:
    """The official name of an entry of ultralytics' state dict. What has none keeps its own, except the head's `dfl.conv.weight`."""
    match = re.fullmatch(r"model\.(\d{1,3})\.(.+)", key)
    if match is None or int(match[1]) >= len(_LAYERS[version]) or not _LAYERS[version][int(match[1])]:
        return key
    layer, rest = _LAYERS[version][int(match[1])], match[2]
    if layer.endswith("head_module") and rest == "dfl.conv.weight":
        return rest
    for kind, spellings in _SPELLINGS.items():
        if not re.search(kind, layer):
            continue
        for theirs, official in spellings:
            renamed, found = re.subn(rf"^{theirs}(?=\.|$)", official, rest)
            if found:
                return f"{layer}.{renamed}"
        break
    return f"{layer}.{rest}"


MOST_PARTS = 100_000  # modules and their entries; the largest published model has about 2,000
_PARTS = ("_parameters", "_buffers", "_modules")


def _module_tensors(model: Inert, where: Path) -> dict[str, StoredTensor]:
    """The state dict that a module which was not made would have had."""
    tensors: dict[str, StoredTensor] = {}
    waiting: list[tuple[str, Inert, int]] = [("", model, 0)]
    visited = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        attributes = module.state
        if isinstance(attributes, dict):
            visited += 1 + sum(len(kind) for kind in map(attributes.get, _PARTS) if isinstance(kind, dict))
        if not isinstance(attributes, dict) or depth > 32 or visited > MOST_PARTS:
            raise UserError("is damaged: its model is no tree of modules", where=where, remedy=AGAIN)
        hidden = attributes.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(attributes.get(kind)):
                if isinstance(value, StoredTensor) and not (isinstance(hidden, set) and name in hidden):
                    tensors[prefix + name] = value
        for name, child in _named(attributes.get("_modules")):
            if isinstance(child, Inert):
                waiting.append((f"{prefix}{name}.", child, depth + 1))
    return tensors


def _named(mapping: object) -> list[tuple[str, object]]:
    return [(name, value) for name, value in mapping.items() if isinstance(name, str)] if isinstance(mapping, dict) else []


def _picture_size(stored: object, where: Path) -> int | None:
    """The side of the square pictures that a model was trained on: `imgsz` is a number or, rarely, a pair."""
    if stored is None:
        return None
    sides: list[object] = list(stored) if isinstance(stored, list | tuple) else [stored, stored]
    match sides:
        case [int(width), int(height)] if width == height and 0 < width < 2**16 and type(width) is type(height) is int:
            return width
    told = " x ".join(str(side) for side in sides[:4] if type(side) is int and abs(side) < 2**31) or "of no number"
    logger.warning("%s: the picture size in it, %s, is left aside: pictures are square", where, told)
    return None


def _baked_vocabulary(model: Inert, config: YoloWorldConfig, archive: Archive) -> Vocabulary | None:
    """The vocabulary an ultralytics model was saved with, or None and a warning where it is none."""
    attributes = model.state if isinstance(model.state, dict) else {}
    names, stored = attributes.get("names"), attributes.get("txt_feats")
    if isinstance(names, dict):
        names = [names.get(index) for index in range(len(names))]
    if not isinstance(stored, StoredTensor) or not isinstance(names, list):
        return None
    embeddings = _numbers(stored, archive).numpy()
    if embeddings.ndim != 3 or embeddings.shape[0] != 1 or embeddings.shape[2] != config.text_width:
        logger.warning("%s: the vocabulary in it is left aside: its embeddings are of shape %s", archive.path, list(embeddings.shape))
        return None
    if not (np.abs(np.linalg.norm(embeddings[0], axis=1) - 1) < 0.05).all():
        logger.warning("%s: the vocabulary in it is left aside: its embeddings were never set", archive.path)
        return None
    try:
        return Vocabulary(tuple(typing.cast(list[str], names)), embeddings[0])
    except UserError as error:
        logger.warning("%s: the vocabulary in it is left aside: %s", archive.path, error.what)
        return None


# --- this project's own files ---


def _own_config(stored: object, where: Path) -> YoloWorldConfig:
    types = typing.get_type_hints(YoloWorldConfig)
    damaged = UserError("is damaged: its configuration describes no YOLO-World", where=where, remedy=AGAIN)
    if not isinstance(stored, dict) or set(stored) != set(types):
        raise damaged
    for name, value in stored.items():
        lowest = 0 if name in ("class_width", "box_width") else 1
        fraction = types[name] is float and type(value) in (int, float) and 0 < value <= 8
        if not fraction and not (types[name] is int and type(value) is int and lowest <= value <= 2**16):
            raise damaged
    try:
        return YoloWorldConfig(**stored)
    except ValueError as error:
        raise damaged from error


def _own_vocabulary(stored: object, config: YoloWorldConfig, archive: Archive) -> Vocabulary | None:
    if stored is None:
        return None
    match stored:
        case {"names": list() as names, "embeddings": StoredTensor(size=(rows, config.text_width)) as embeddings} if rows == len(names):
            try:
                return Vocabulary(tuple(names), _numbers(embeddings, archive).numpy())
            except UserError as error:
                raise UserError(f"is damaged: in its vocabulary, {error.what}", where=archive.path, remedy=AGAIN) from error
    raise UserError("is damaged: its vocabulary is not names and embeddings", where=archive.path, remedy=AGAIN)


def _plain(value: object, budget: list[int] | None = None, depth: int = 0) -> object:
    """A copy of plain data; anything else is a TypeError. Data that refers to itself, or to the same parts over and over, runs out."""
    left = [100_000] if budget is None else budget
    left[0] -= 1
    if left[0] < 0 or depth > 16:
        raise TypeError("more than plain data can")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, left, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, left, depth + 1) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__}")


# --- weights: found out, checked, read ---


def _tensors(stored: object, where: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict, which holds nothing else."""
    if not isinstance(stored, dict):
        raise UserError("holds no state dict", where=where, remedy=_MODEL)
    tensors: dict[str, StoredTensor] = {}
    for key, value in stored.items():
        if not isinstance(key, str) or not isinstance(value, StoredTensor):
            named = shown(key) if isinstance(key, str) else "one entry"
            raise UserError(f"holds no state dict: {named} is no tensor", where=where, remedy=_MODEL)
        tensors[key] = value
    return tensors


def _config_of(state: Stored, where: Path) -> YoloWorldConfig:
    """The preset whose stem is as wide as the state's, at its version and text width."""
    stem, guide = state.get(_STEM), state.get(_GUIDE)
    if stem is None or guide is None:
        absent = _STEM if stem is None else _GUIDE
        raise UserError(f"is no YOLO-World: {absent} is not among its {len(state)} entries", where=where, remedy=_MODEL)
    if len(stem.size) != 4 or len(guide.size) != 2 or not 0 < guide.size[1] < 2**16:
        raise UserError("is no YOLO-World: its stem or its text guidance has no such shape", where=where, remedy=_MODEL)
    version = 1 if any(key.startswith("neck.text_enhancer.") for key in state) else 2
    presets = {config.channels[0]: config for config in (config_for(size, version) for size in SIZES)}
    if stem.size[0] not in presets:
        what = f"is of no known size: its stem has {stem.size[0]} channels, not one of {', '.join(map(str, sorted(presets)))}"
        raise UserError(what, where=where, remedy=_MODEL)
    return dataclasses.replace(presets[stem.size[0]], text_width=guide.size[1])


def _strictly(state: Stored, config: YoloWorldConfig, archive: Archive) -> dict[str, Tensor]:
    _check_entries({key: value.size for key, value in state.items()}, config, archive.path)
    tensors = _floats(state, archive)
    _check_numbers(tensors, archive.path, AGAIN)
    return tensors


def _check_entries(shapes: Mapping[str, tuple[int, ...]], config: YoloWorldConfig, where: str | Path) -> None:
    """Every entry of the model, of its shape, and no other."""
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in YoloWorld(config).state_dict().items()}
    faults = []
    missing = [key for key in wanted if key not in shapes]
    extra = [key for key in shapes if key not in wanted]
    misshapen = [key for key in wanted if key in shapes and shapes[key] != wanted[key]]
    if missing:
        faults.append(f"{len(missing)} missing ({_first(missing)})")
    if extra:
        faults.append(f"{len(extra)} unknown ({_first(extra)})")
    if misshapen:
        first = misshapen[0]
        faults.append(f"{len(misshapen)} of another shape ({first} is {list(shapes[first])} instead of {list(wanted[first])})")
    if faults:
        model = f"YOLO-World v{config.version}-{(size_of(dataclasses.replace(config, text_width=512)) or 'custom').upper()}"
        raise UserError(f"does not fit {model}: of {len(wanted)} entries {', '.join(faults)}", where=where, remedy=_MODEL)


def _first(keys: list[str]) -> str:
    return ", ".join(shown(key) for key in keys[:2]) + (", ..." if len(keys) > 2 else "")


def _check_numbers(state: Mapping[str, Tensor], where: str | Path, remedy: str) -> None:
    """Every weight finite, and no variance below zero."""
    # by numpy: hundreds of small sums cost torch's threads more than they save
    arrays = {key: (value.float() if value.dtype is torch.bfloat16 else value).numpy() for key, value in state.items()}
    infinite = [key for key, array in arrays.items() if not np.isfinite(array).all()]
    negative = [key for key, array in arrays.items() if key.endswith(".running_var") and (array < 0).any()]
    for fault, broken in (("NaN or infinite weights", infinite), ("negative variances", negative)):
        if broken:
            raise UserError(f"has {fault} in {len(broken)} of {len(state)} entries ({_first(broken)})", where=where, remedy=remedy)


def _floats(state: Stored, archive: Archive) -> dict[str, Tensor]:
    """The tensors, in float32; BatchNorm's counters in int64."""
    return {key: _numbers(value, archive, key) for key, value in state.items()}


def _numbers(stored: StoredTensor, archive: Archive, key: str = "") -> Tensor:
    counts = key.endswith(("num_batches_tracked", "position_ids"))
    if stored.storage.dtype.is_floating_point == counts:
        what = f"{shown(key) or 'its vocabulary'} is of type {str(stored.storage.dtype).removeprefix('torch.')}"
        raise UserError(f"is quantized or damaged: {what}", where=archive.path, remedy="give the checkpoint in floating point")
    return archive.tensor(stored).to(torch.int64 if counts else torch.float32).contiguous()
