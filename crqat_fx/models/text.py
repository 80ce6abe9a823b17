"""CLIP's text encoder, through transformers: names in, a vocabulary out.

    name -> prompt -> tokens -> encoder -> the state at the end-of-text token -> projection -> length 1

The weights come from a folder as transformers writes it, or from an official YOLO-World `.pth` that carries the encoder; the tokenizer from
a folder. Everything is local: the files are read here and handed to transformers' classes, so nothing is looked up on a network and no code
that a folder may carry is run. transformers is an extra: it is imported when it is needed.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crqat_fx.checkpoint import read_checkpoint
from crqat_fx.errors import UserError
from crqat_fx.progress import Progress
from crqat_fx.unpickle import StoredTensor, opened
from crqat_fx.vocabulary import Vocabulary, checked_names, prompt

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

logger = logging.getLogger(__name__)

HEAD_DIM = 64  # of every published CLIP's attention: what an official `.pth` does not say
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"
PROJECTION = "text_projection.weight"
START, END = "<|startoftext|>", "<|endoftext|>"
ENCODER_FOLDER = "give a folder of CLIPTextModelWithProjection or CLIPModel: config.json and model.safetensors"
TOKENIZER_FOLDER = "give a folder with CLIP's tokenizer.json, or vocab.json and merges.txt"


def embed(
    names: Sequence[str],
    encoder: str | Path,
    tokenizer: str | Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> Vocabulary:
    """The vocabulary of `names`. Without `tokenizer` its files are looked for in the encoder's folder.

    `prompts` are what CLIP reads for each name, where that is not the bare name, first synonym.
    """
    if batch < 1:
        raise UserError(f"a batch of {batch}", remedy="give at least 1")
    checked = checked_names(names, "names")
    _require_transformers()
    source = Path(encoder)
    try:
        if tokenizer is None and source.is_file():
            raise UserError("carries no tokenizer", where=source, remedy=f"{TOKENIZER_FOLDER}, with --tokenizer")
        words = _tokenizer(Path(tokenizer) if tokenizer is not None else source)
        model = _model(source)
    except OSError as error:  # of a look at a path that may not be looked at, or cannot be one
        raise UserError(f"cannot be read ({error.strerror or error})", where=error.filename or source, remedy=ENCODER_FOLDER) from error
    if len(words) != model.config.vocab_size:
        raise UserError(
            f"the tokenizer knows {len(words)} tokens, the encoder {model.config.vocab_size}", where=source, remedy="give the encoder's own"
        )
    prompts = [prompt(name) for name in checked] if prompts is None else prompts
    for shared, count in Counter(prompts).items():
        if count > 1:
            logger.warning("%d names share the prompt %r and so their embedding", count, shared)
    rows: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        rows.append(_encoded(prompts[start : start + batch], words, model))
        if progress is not None:
            progress(min(start + batch, len(prompts)), len(prompts), "names embedded")
    return Vocabulary(checked, torch.cat(rows).numpy())


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "embedding names needs transformers, which is not installed", remedy="run `pip install 'crqat-fx[clip]'`"
        ) from error


@torch.inference_mode()
def _encoded(prompts: Sequence[str], words: "CLIPTokenizer", model: "CLIPTextModelWithProjection") -> Tensor:
    """Rows of length 1. The padding that follows the end-of-text token cannot be seen from it: the attention is causal."""
    tokens = words(list(prompts), padding=True, return_tensors="pt")
    ends = tokens["attention_mask"].sum(1) - 1
    limit = model.config.max_position_embeddings
    for text, end in zip(prompts, ends.tolist(), strict=True):
        if end >= limit:
            raise UserError(f"{text[:60]!r} has {end + 1} tokens, the encoder reads {limit}", remedy="shorten the name")
    first_ends = (tokens["input_ids"] == words.eos_token_id).int().argmax(1)
    for text, end, first in zip(prompts, ends.tolist(), first_ends.tolist(), strict=True):
        if end != first:
            raise UserError(f"the tokenizer cannot read all of {text[:60]!r}", remedy="spell the name in its alphabet")
    states = model.text_model(**tokens).last_hidden_state
    rows: Tensor = model.text_projection(states[torch.arange(len(ends)), ends])
    return torch.nn.functional.normalize(rows, dim=1)


# --- weights ---


def _model(source: Path) -> "CLIPTextModelWithProjection":
    from transformers import CLIPTextModelWithProjection

    if source.is_dir():
        settings = _read_settings(source)
        state = _text_part(_read_weights(source), source)
        config = _configuration(settings, _shape_of(state, source), source)
    else:
        carried = read_checkpoint(source).text_model
        if not carried:
            raise UserError("carries no text encoder", where=source, remedy=ENCODER_FOLDER)
        state = _text_part(carried, source)
        shape = _shape_of(state, source)
        if shape["hidden_size"] % HEAD_DIM:
            raise UserError(
                f"its text encoder is {shape['hidden_size']} wide: not a multiple of CLIP's {HEAD_DIM}", where=source, remedy=ENCODER_FOLDER
            )
        config = _configuration({"num_attention_heads": shape["hidden_size"] // HEAD_DIM, **shape}, shape, source)
    with torch.device("meta"):  # the tensors at hand become the model's: nothing is allocated or drawn at random
        model = CLIPTextModelWithProjection(config)
    _check_names_and_shapes(model.state_dict(), state, source)
    model.load_state_dict(state, strict=True, assign=True)
    model.text_model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    torch.nn.Module.eval(model)
    return model


def _text_part(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The text encoder's tensors as float32, under transformers' names: whatever stands before them is found and taken off."""
    prefixes = [name.removesuffix(TOKEN_EMBEDDING) for name in tensors if name.endswith(TOKEN_EMBEDDING)]
    if len(prefixes) != 1:
        found = "no" if not prefixes else "more than one"
        raise UserError(f"holds {found} CLIP text encoder (`{TOKEN_EMBEDDING}`)", where=source, remedy=ENCODER_FOLDER)
    part = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(prefixes[0])
        if not name.startswith(prefixes[0]) or not bare.startswith(("text_model.", PROJECTION)) or bare.endswith(".position_ids"):
            continue
        part[bare] = tensor.detach().float()
        if not torch.isfinite(part[bare]).all():
            raise UserError(f"`{name}` holds values that are not finite", where=source, remedy="get the file again")
    return part


def _shape_of(state: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    """What the tensors' shapes say of the configuration."""
    first = "text_model.encoder.layers.0.mlp.fc1.weight"
    position = "text_model.embeddings.position_embedding.weight"
    for name in (TOKEN_EMBEDDING, position, first, PROJECTION):
        if name not in state:
            raise UserError(f"the text encoder lacks `{name}`", where=source, remedy=ENCODER_FOLDER)
        if state[name].ndim != 2:
            raise UserError(f"`{name}` is of shape {list(state[name].shape)}, not a matrix", where=source, remedy=ENCODER_FOLDER)
    layers = {int(match[1]) for name in state if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    return {
        "vocab_size": state[TOKEN_EMBEDDING].shape[0],
        "hidden_size": state[TOKEN_EMBEDDING].shape[1],
        "intermediate_size": state[first].shape[0],
        "projection_dim": state[PROJECTION].shape[0],
        "num_hidden_layers": max(layers) + 1,
        "max_position_embeddings": state[position].shape[0],
    }


def _configuration(settings: Mapping[str, Any], shape: Mapping[str, int], source: Path) -> "CLIPTextConfig":
    """The settings that decide the numbers, transformers' defaults for the rest; the sizes must be those of the tensors."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPTextConfig
    from transformers.activations import ACT2FN

    wanted = [*shape, "num_attention_heads", "hidden_act", "layer_norm_eps"]
    try:
        known = {name: settings[name] for name in wanted if name in settings}
        config = CLIPTextConfig(**known, bos_token_id=0, eos_token_id=0)  # not used: `_encoded` asks the tokenizer
    except (StrictDataclassError, ArithmeticError) as error:
        raise UserError(f"config.json is not sound ({error})", where=source, remedy=ENCODER_FOLDER) from error
    config.projection_dim = shape["projection_dim"]  # a whole CLIP keeps it one level up and leaves this one as it was
    for name, size in shape.items():
        if getattr(config, name) != size:
            raise UserError(
                f"config.json says {name} {getattr(config, name)}, the weights {size}", where=source, remedy="get the files again"
            )
    if config.hidden_act not in ACT2FN:
        raise UserError(f"config.json names an unknown activation {config.hidden_act!r}", where=source, remedy=ENCODER_FOLDER)
    return config


def _check_names_and_shapes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path) -> None:
    for fault, names in (("lacks", expected.keys() - state.keys()), ("has in excess", state.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the text encoder {fault} `{min(names)}`{more}", where=source, remedy="get the file again")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"`{name}` is of shape {list(state[name].shape)}, not {list(tensor.shape)}", where=source, remedy="get the file again"
            )


# --- files ---


def _read_settings(folder: Path) -> Mapping[str, Any]:
    """The text encoder's part of a folder's config.json."""
    settings = _read_json(folder / "config.json", ENCODER_FOLDER)
    kind = settings.get("model_type")
    if kind == "clip":
        settings = settings.get("text_config", {})
        if not isinstance(settings, dict):
            raise UserError("its `text_config` is no mapping", where=folder / "config.json", remedy=ENCODER_FOLDER)
    elif kind != "clip_text_model":
        raise UserError(f"describes a {kind!r}, not a CLIP", where=folder / "config.json", remedy=ENCODER_FOLDER)
    return settings


def _read_weights(folder: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        try:
            with safe_open(safe, framework="pt") as file:  # a whole CLIP's picture half stays on the disk
                return {name: file.get_tensor(name) for name in file.keys() if "text_" in name}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot be read ({error})", where=safe, remedy="get the file again") from error
    if not pickled.is_file():
        raise UserError("holds no weights: no model.safetensors and no pytorch_model.bin", where=folder, remedy=ENCODER_FOLDER)
    with opened(pickled) as archive:
        contents = archive.contents
        if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
            raise UserError("holds something other than named tensors", where=pickled, remedy="give model.safetensors")
        return {name: archive.tensor(value) for name, value in contents.items() if "text_" in name and isinstance(value, StoredTensor)}


def _tokenizer(folder: Path) -> "CLIPTokenizer":
    """CLIP's tokenizer from the two tables it consists of; no other setting of the folder is read."""
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise UserError("is no folder", where=folder, remedy=TOKENIZER_FOLDER)
    whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if whole.is_file():
        tables = _read_json(whole, TOKENIZER_FOLDER).get("model")
        if not isinstance(tables, dict) or not isinstance(tables.get("vocab"), dict) or not isinstance(tables.get("merges"), list):
            raise UserError("is no byte-pair tokenizer", where=whole, remedy=TOKENIZER_FOLDER)
        tokens, lines = tables["vocab"], tables["merges"]
    elif vocabulary.is_file() and merges.is_file():
        tokens = _read_json(vocabulary, TOKENIZER_FOLDER)
        lines = [line for line in _read_text(merges, TOKENIZER_FOLDER).split("\n") if line.strip() and not line.startswith("#version")]
    else:
        raise UserError("holds no tokenizer", where=folder, remedy=TOKENIZER_FOLDER)
    if START not in tokens or END not in tokens:
        raise UserError(f"its tokenizer lacks {START} or {END}: not CLIP's", where=folder, remedy=TOKENIZER_FOLDER)
    try:
        pairs: Any = [tuple(line.split() if isinstance(line, str) else line) for line in lines]
        return CLIPTokenizer(vocab=tokens, merges=pairs)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"its tokenizer is not sound ({error})", where=folder, remedy=TOKENIZER_FOLDER) from error


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        loaded = json.loads(_read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON ({error})", where=path, remedy=remedy) from error
    if not isinstance(loaded, dict):
        raise UserError("is no JSON mapping", where=path, remedy=remedy)
    return loaded


def _read_text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=path, remedy=remedy) from error
