"""The CLIP text encoder against transformers' own forward, on a tiny random CLIP that the tests make; nothing here touches a network."""

import importlib.util
import json
import logging
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sets import write_coco, write_data
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from crqat_fx.data.config import texts_needed
from crqat_fx.errors import UserError
from crqat_fx.models import text
from crqat_fx.models.text import embed
from crqat_fx.models.yolo_world import build

NAMES = ("cat", "striped red star", "alarm_clock", "Zebra", "bow_(weapon)", "赤い星")
PROMPTS = ["cat", "striped red star", "alarm clock", "Zebra", "bow", "赤い星"]
MERGES = [("c", "a"), ("ca", "t</w>"), ("s", "t"), ("st", "a"), ("sta", "r</w>")]


def write_tokenizer(folder: Path) -> int:
    """CLIP's byte-pair layout with five merges; the number of its tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in MERGES), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]), encoding="utf-8")
    return len(tokens)


def sizes(tokens: int) -> dict[str, int]:
    return {
        "vocab_size": tokens,
        "hidden_size": 128,
        "intermediate_size": 96,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": tokens - 1,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text encoder and its tokenizer. Use it as it is, or a copy."""
    folder = tmp_path_factory.mktemp("clip")
    tokens = write_tokenizer(folder)
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**sizes(tokens), initializer_factor=5.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(made: Path) -> np.ndarray:
    """What transformers itself computes, prompt by prompt."""
    model = CLIPTextModelWithProjection.from_pretrained(made, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(made, local_files_only=True)
    with torch.no_grad():
        rows = torch.cat([model(**tokenizer([prompt], return_tensors="pt")).text_embeds for prompt in PROMPTS])
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def test_prompts_of_the_callers_own_take_the_place_of_the_names(made: Path, expected: np.ndarray) -> None:
    vocabulary = embed(("first", "second"), made, prompts=[PROMPTS[4], PROMPTS[0]])
    assert vocabulary.names == ("first", "second")
    np.testing.assert_allclose(vocabulary.embeddings, expected[[4, 0]], atol=2e-6)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "clip"))


def official_file(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """An official checkpoint of the smallest detector that carries the text encoder, as the published full files do."""
    detector = build("pico", 2).state_dict()
    carried = {f"backbone.text_model.model.{name}": tensor for name, tensor in state.items()}
    torch.save({"meta": {}, "state_dict": {**detector, **carried}}, path)
    return path


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).state_dict()


# --- numbers ---


def test_embeds_names_as_transformers_does(made, expected, caplog):
    vocabulary = embed(NAMES, made)
    assert not [record for record in caplog.records if record.name.startswith("crqat_fx")]
    assert vocabulary.names == NAMES
    assert np.abs(vocabulary.embeddings - expected).max() < 2e-6
    assert np.abs(expected[:, None] - expected).max() > 0.1, "the encoder tells no prompts apart: the test would prove nothing"


def test_batches_do_not_change_the_numbers_and_report_progress(made, expected):
    seen = []
    vocabulary = embed(NAMES, made, batch=4, progress=lambda done, total, said: seen.append((done, total, said)))
    assert np.abs(vocabulary.embeddings - expected).max() < 2e-6
    assert seen == [(4, 6, "names embedded"), (6, 6, "names embedded")]


def test_an_official_file_gives_the_numbers_of_the_folder(made, expected, tmp_path):
    checkpoint = official_file(tmp_path / "full.pth", state_of(made))
    assert np.array_equal(embed(NAMES, checkpoint, made).embeddings, embed(NAMES, made).embeddings)


def test_a_pickled_weights_file_and_a_tokenizer_of_one_file_give_the_same_numbers(copy, expected):
    torch.save({**state_of(copy), "text_model.embeddings.position_ids": torch.arange(24)[None]}, copy / "pytorch_model.bin")
    CLIPTokenizer.from_pretrained(copy, local_files_only=True).save_pretrained(copy)
    for name in ("model.safetensors", "vocab.json", "merges.txt"):
        (copy / name).unlink(missing_ok=True)
    assert (copy / "tokenizer.json").is_file()
    assert np.abs(embed(NAMES, copy).embeddings - expected).max() < 2e-6


def test_a_whole_clip_serves_as_its_text_half(made, tmp_path):
    tokens = len(json.loads((made / "vocab.json").read_text(encoding="utf-8")))
    torch.manual_seed(1)
    picture_half = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32}
    whole = CLIPModel(CLIPConfig(text_config={**sizes(tokens), "projection_dim": 7}, vision_config=picture_half, projection_dim=48)).eval()
    whole.save_pretrained(tmp_path)
    inputs = CLIPTokenizer.from_pretrained(made, local_files_only=True)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        rows = whole.text_projection(whole.text_model(**inputs).pooler_output)
    vocabulary = embed(NAMES, tmp_path, made)
    assert vocabulary.width == 48
    assert np.abs(vocabulary.embeddings - torch.nn.functional.normalize(rows, dim=1).numpy()).max() < 2e-6


def test_half_precision_weights_are_computed_in_float32(copy, made):
    halved = CLIPTextModelWithProjection.from_pretrained(made, local_files_only=True).half()
    halved.save_pretrained(copy)
    widened = halved.float().eval()
    tokens = CLIPTokenizer.from_pretrained(made, local_files_only=True)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        rows = torch.nn.functional.normalize(widened(**tokens).text_embeds, dim=1).numpy()
    assert np.abs(embed(NAMES, copy).embeddings - rows).max() < 2e-6


def test_names_that_share_a_prompt_are_warned_about(made, caplog):
    vocabulary = embed(["bow_(weapon)", "cat", "bow_(ribbon)"], made)
    assert np.allclose(vocabulary.embeddings[0], vocabulary.embeddings[2], rtol=0, atol=1e-6)
    assert [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "crqat_fx.models.text"] == [
        (logging.WARNING, "2 names share the prompt 'bow' and so their embedding")
    ]


# --- what a folder cannot do ---


def test_nothing_in_a_folder_is_run_or_looked_up_on_a_network(copy, expected, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (copy / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    settings = json.loads((copy / "config.json").read_text())
    settings |= {
        "auto_map": {"AutoModel": "own.Model"},
        "attn_implementation": "someone/kernels",
        "quantization_config": {"quant_method": "x"},
    }
    (copy / "config.json").write_text(json.dumps(settings))
    tokenizer = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "gguf_file": "x.gguf", "name_or_path": "someone/else"}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert np.abs(embed(NAMES, copy).embeddings - expected).max() < 2e-6
    assert not (copy / "ran").exists()


# --- messages ---


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def break_folder(folder: Path, fault: str) -> None:
    config, weights, tokens, merges = (folder / name for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt"))
    match fault:
        case "no tokenizer":
            merges.unlink()
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "config is no json":
            config.write_text("{")
        case "config is a list":
            config.write_text("[]")
        case "another model":
            edit_json(config, model_type="bert")
        case "another size":
            edit_json(config, num_hidden_layers=3)
        case "a size that is text":
            edit_json(config, hidden_size="wide")
        case "no heads":
            edit_json(config, num_attention_heads=0)
        case "odd heads":
            edit_json(config, num_attention_heads=3)
        case "activation":
            edit_json(config, hidden_act="magic")
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "text for weights":
            weights.write_text("weights")
        case "hostile pickle":
            weights.unlink()
            torch.save({"text_model.x": break_folder}, folder / "pytorch_model.bin")
        case "a list for weights":
            weights.unlink()
            torch.save([1, 2], folder / "pytorch_model.bin")
        case "tokens are a list":
            tokens.write_text("[]")
        case "fewer tokens":
            held = json.loads(tokens.read_text(encoding="utf-8"))
            tokens.write_text(json.dumps({token: number for token, number in held.items() if token != "!"}), encoding="utf-8")
        case "no start":
            held = json.loads(tokens.read_text(encoding="utf-8"))
            tokens.write_text(json.dumps({token: number for token, number in held.items() if "start" not in token}), encoding="utf-8")
        case "negative token":
            edit_json(tokens, a=-1)
        case "merge of three":
            merges.write_text("a b c\n")
        case "unknown merge":
            merges.write_text("q q\n")
        case "word pieces":
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no tokenizer", "clip: holds no tokenizer; give a folder with CLIP's tokenizer.json"),
        ("no config", r"config.json: cannot be read \(No such file"),
        ("no weights", "clip: holds no weights"),
        ("config is no json", "config.json: is no JSON"),
        ("config is a list", "config.json: is no JSON mapping"),
        ("another model", "config.json: describes a 'bert', not a CLIP"),
        ("another size", "config.json says num_hidden_layers 3, the weights 2"),
        ("a size that is text", "config.json is not sound .*hidden_size"),
        ("no heads", "config.json is not sound"),
        ("odd heads", "config.json is not sound .*multiple"),
        ("activation", "unknown activation 'magic'"),
        ("cut weights", "model.safetensors: cannot be read"),
        ("text for weights", "model.safetensors: cannot be read"),
        ("hostile pickle", "pytorch_model.bin: .*break_folder"),
        ("a list for weights", "pytorch_model.bin: holds something other than named tensors"),
        ("tokens are a list", "vocab.json: is no JSON mapping"),
        ("fewer tokens", "the tokenizer knows 518 tokens, the encoder 519"),
        ("no start", r"its tokenizer lacks <\|startoftext\|>"),
        ("negative token", "its tokenizer is not sound"),
        ("merge of three", "its tokenizer is not sound"),
        ("unknown merge", "its tokenizer is not sound"),
        ("word pieces", "tokenizer.json: is no byte-pair tokenizer"),
    ],
)
def test_an_unsound_folder_is_refused_in_one_line(copy, fault, message):
    break_folder(copy, fault)
    with pytest.raises(UserError, match=message) as caught:
        embed(NAMES, copy)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "what to do is missing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("text_model.final_layer_norm.weight"), "lacks `text_model.final_layer_norm.weight`"),
        (lambda state: state.pop("text_projection.weight"), "lacks `text_projection.weight`"),
        (lambda state: state.pop("text_model.embeddings.token_embedding.weight"), "holds no CLIP text encoder"),
        (lambda state: state.update({"text_model.lora.weight": torch.ones(1)}), "has in excess `text_model.lora.weight`"),
        (
            lambda state: state.update({"text_model.final_layer_norm.bias": torch.zeros(5)}),
            r"`text_model.final_layer_norm.bias` is of shape \[5\], not \[128\]",
        ),
        (lambda state: state["text_projection.weight"].fill_(float("nan")), "text_projection.weight` holds values that are not finite"),
        (lambda state: state.clear(), "carries no text encoder"),
    ],
)
def test_an_official_file_whose_encoder_is_not_whole_is_refused(made, tmp_path, change, message):
    state = {name: tensor.clone() for name, tensor in state_of(made).items()}
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        embed(NAMES, official_file(tmp_path / "full.pth", state), made)
    assert str(caught.value).startswith(f"{tmp_path / 'full.pth'}: ")


def test_an_official_file_needs_a_tokenizer(made, tmp_path):
    with pytest.raises(UserError, match=r"carries no tokenizer; .* with --tokenizer"):
        embed(NAMES, official_file(tmp_path / "full.pth", state_of(made)))


def test_a_path_longer_than_any_is_refused_in_one_line(made, tmp_path):
    for encoder, tokenizer in ((tmp_path / ("x" * 300), None), (tmp_path / ("x" * 300), made), (made, tmp_path / ("x" * 300))):
        with pytest.raises(UserError, match=r"x{300}: (cannot be read|is no folder|does not exist)") as raised:
            embed(["cat"], encoder, tokenizer)
        assert "\n" not in str(raised.value)


def test_an_encoder_that_is_not_there_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        embed(NAMES, tmp_path / "none.pth", made)


def test_a_name_longer_than_the_encoder_reads_is_refused(made):
    with pytest.raises(UserError, match="'zzzzzzzzzzzzzzzzzzzzzzz' has 25 tokens, the encoder reads 24; shorten the name"):
        embed(["cat", "z" * 23], made)
    assert len(embed(["z" * 22], made)) == 1


def test_a_name_that_the_tokenizer_cannot_read_is_refused(copy):
    tokens = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    tokens["unused"] = tokens.pop("z</w>")
    (copy / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer cannot read all of 'fizz'"):
        embed(["cat", "fizz"], copy)


def test_names_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="'cat' stands at 1 and 2"):
        embed(["cat", "cat"], tmp_path)


def test_without_transformers_the_message_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("text_without_transformers", text.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(UserError, match=r"needs transformers.*; run `pip install 'crqat-fx\[clip\]'`"):
        fresh.embed(NAMES, made)


def test_the_padding_of_a_data_yaml_is_embedded_as_the_empty_text(made, tmp_path):
    write_coco(tmp_path, 1)
    sets = {"annotations": "annotations.json", "pictures": "pictures"}
    needed = texts_needed(write_data(tmp_path, padding="(empty)", train=sets))
    vocabulary = embed(tuple(needed), made, prompts=list(needed.values()))
    model = CLIPTextModelWithProjection.from_pretrained(made, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(made, local_files_only=True)
    with torch.no_grad():
        rows = {text: model(**tokenizer([text], return_tensors="pt")).text_embeds for text in ("", "(empty)")}
    expected, other = (torch.nn.functional.normalize(rows[text], dim=1).numpy()[0] for text in ("", "(empty)"))
    found = vocabulary.embeddings[vocabulary.names.index("(empty)")]
    assert np.abs(found - expected).max() < 2e-6
    assert np.abs(found - other).max() > 0.01
