"""What a stranger's model says of itself is checked before anything is made of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import case_config

from dpo.huggingface.adapter_files import AdapterDirectory
from dpo.huggingface.config_rules import MAX_LAYERS, check_config
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.spellings import spelled_for_all
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.huggingface.tokenizer_settings import check_tokenizer_file
from dpo.outcomes import UserError


def nested(depth: int) -> list:
    return json.loads("[" * depth + "]" * depth)


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of a model whose files may be changed."""
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (directory / "SHA256SUMS").unlink(missing_ok=True)
    return directory


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


ROPE = {"rope_theta": 1e4}
WRONG_CONFIGS = [
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": MAX_LAYERS},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 4 * 10**9},
    {"head_dim": 2**14},
    {"hidden_size": True},
    {"vocab_size": 2**24},
    {"max_position_embeddings": 0},
    {"rms_norm_eps": "1e-5"},
    {"rms_norm_eps": float("nan")},
    {"hidden_act": ["silu"]},
    {"hidden_act": None},
    {"hidden_act": "\ud800"},
    {"model_type": ["llama"]},
    {"architectures": 5},
    {"architectures": [1]},
    {"torch_dtype": [1]},
    {"tie_word_embeddings": "yes"},
    {"unknown": nested(900)},
    {"eos_token_id": 2**70},
    {"to_dict": 1},
    {"__class__": "x"},
    {"id2label": [1]},
    {"rope_parameters": [1]},
    {"rope_parameters": {"rope_type": ["yarn"], **ROPE}},
    {"rope_parameters": {"rope_type": "linear", **ROPE}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
    {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 1, **ROPE}},
    {"model_type": "smollm3", "no_rope_layer_interval": 0},
    {"model_type": "gemma2", "query_pre_attn_scalar": 0},
    {"model_type": "granite", "logits_scaling": 0},
    {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
    {"model_type": "gpt_neo", "attention_types": "x"},
    {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2},
    {"model_type": "qwen3", "layer_types": ["full_attention"]},
    {"model_type": "mpt", "attn_config": [1]},
    {"quantization_config": "x"},
]


@pytest.mark.parametrize("wrong", WRONG_CONFIGS, ids=lambda wrong: str(wrong)[:60])
def test_a_configuration_is_refused_by_file_and_field(model, wrong):
    change(model / "config.json", **wrong)
    with pytest.raises(UserError) as refused:
        load_decoder(open_checkpoint(model))
    assert str(model) in str(refused.value)
    if len(wrong) == 1 and next(iter(wrong)) not in ("head_dim", "vocab_size", "num_hidden_layers"):
        assert next(iter(wrong)).strip("_") in str(refused.value)


def test_a_large_or_endless_file_is_not_read(model):
    path = model / "config.json"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(UserError, match=r"config\.json: is 10737418240 bytes long"):
        open_checkpoint(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_checkpoint(model)


@pytest.mark.parametrize("said", ["'bert' is not supported", "is not there"])
def test_a_model_type_that_nothing_reads_is_refused_by_file_and_field(model, said):
    config = json.loads((model / "config.json").read_text()) | {"model_type": "bert"}
    if said == "is not there":
        del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"/config\.json: model_type {said}; supported: llama, mistral"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"eos_token_id": 2**70},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": [[1]]},
        {"bos_token_id": -5},
        {"pad_token_id": True},
        {"temperature": "hot"},
        {"x": nested(900)},
        {"x": "\udc00"},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_a_generation_configuration_is_refused_by_file_and_field(model, wrong):
    change(model / "generation_config.json", **wrong)
    with pytest.raises(UserError, match=rf"generation_config\.json: {next(iter(wrong))}"):
        open_checkpoint(model)


def adapter(directory: Path, *, rank: int = 2, **config: object) -> Path:
    directory.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = np.ones((rank, 32), np.float32), np.zeros((32, rank), np.float32)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "?", "r": 2, "lora_alpha": 4, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings | config))
    return directory


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha_pattern": {"((a|.)*)*x": 8}},
        {"alpha_pattern": {"(?:(?:a+)+)+$": 8}},
        {"alpha_pattern": {".*.*.*.*.*x": 8}},
        {"alpha_pattern": {"a{99999999999}": 8}},
        {"alpha_pattern": {"(" * 500 + ")" * 500: 8}},
        {"alpha_pattern": "x"},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"((a|.)*)*x": 2}},
        {"rank_pattern": {"k_proj": 2}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 8}},
        {"layers_to_transform": [2**70]},
        {"layers_to_transform": -1},
        {"layers_to_transform": [True]},
        {"layers_to_transform": [1]},
        {"layers_pattern": [5]},
        {"layers_pattern": "blocks", "layers_to_transform": 0},
        {"base_model_name_or_path": {"a": 1}},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "~nobody/x"},
        {"base_model_name_or_path": "a\x1b[2J"},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e308},
        {"lora_alpha": 0},
        {"r": 0},
        {"use_dora": "yes"},
        {"target_modules": {"a": {"b": 1}}},
        {"loftq_config": nested(500)},
    ],
    ids=lambda wrong: str(wrong)[:50],
)
def test_an_adapter_is_refused_by_file_and_field(tmp_path, wrong):
    directory = adapter(tmp_path / "adapter", **wrong)
    with pytest.raises(UserError, match=rf"adapter_config\.json[^|]*{next(iter(wrong))}"):
        open_checkpoint(directory)


def test_layers_that_the_base_has_not_are_refused(tmp_path, tiny_model_dir):
    base: dict[str, Any] = {"base_model_name_or_path": str(tiny_model_dir), "layers_pattern": "layers"}
    directory = adapter(tmp_path / "adapter", layers_to_transform=[0, 2], **base)
    with pytest.raises(UserError, match=r"adapter_config\.json: layers_to_transform is \[0, 2\].*0 to 1"):
        load_decoder(open_checkpoint(directory))
    again = adapter(tmp_path / "again", layers_to_transform=[0, 1], **base)
    AdapterDirectory(again).require_layers(f"model.layers.{layer}.mlp.up_proj" for layer in range(2))


def test_an_adapter_of_itself_and_one_of_no_rank_are_refused(tmp_path, tiny_model_dir):
    itself = adapter(tmp_path / "itself", base_model_name_or_path=str(tmp_path / "itself"))
    with pytest.raises(UserError, match="base_model_name_or_path names an adapter"):
        open_checkpoint(itself)
    with pytest.raises(UserError, match="base_model_name_or_path names an adapter"):
        load_tokenizer(itself)
    empty = adapter(tmp_path / "empty", rank=0, base_model_name_or_path=str(tiny_model_dir))
    with pytest.raises(UserError, match="with r above 0"):
        load_decoder(open_checkpoint(empty))


@pytest.mark.parametrize("opens", [open_checkpoint, load_tokenizer])
def test_an_adapter_here_fetches_nothing(tmp_path, monkeypatch, opens):
    """It may be anybody's; the hub would learn of it, and of the token."""
    import huggingface_hub

    asked = []

    def download(hub_id: str, *, local_files_only: bool, **rest: object) -> str:
        asked.append((hub_id, local_files_only))
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    directory = adapter(tmp_path / "adapter", base_model_name_or_path="owner/name", revision="v2")
    with pytest.raises(UserError, match="hf download owner/name --revision v2"):
        opens(directory)
    assert asked == [("owner/name", True)]


# ---- found at the beginning what would fail at the end ----


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "a\x1b[2J"])
def test_a_chat_template_has_a_name_that_a_file_can_have(model, name):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    change(model / "tokenizer_config.json", chat_template=[{"name": name, "template": "x"}])
    with pytest.raises(UserError, match="a chat template is named"):
        load_tokenizer(model)


TOKEN = {"content": "<x>", "lstrip": False}
ADDED_TOKEN = TOKEN | {"__type": "AddedToken"}
WRONG_TOKENIZERS = [
    *[{"chat_template": one} for one in (5, ["x"], [{"nam": "x"}], [{"name": "x"}], {"default": 5})],
    {"chat_template": [{"name": "x", "template": "1"}, {"name": "x", "template": "2"}]},
    *[{"bos_token": one} for one in (5, True, ["a"], TOKEN, ADDED_TOKEN | {"content": 5})],
    {"eos_token": ADDED_TOKEN | {"rstrip": "no"}},
    *[{"added_tokens_decoder": one} for one in (None, {"x": TOKEN}, {"1": "a"}, {"1": {"content": 5}})],
    *[{"model_max_length": one} for one in ("x", [1], float("nan"), True)],
    *[{"extra_special_tokens": one} for one in ([5], [TOKEN], {"a": 5}, "abc")],
    {"model_specific_special_tokens": 5},
    {"additional_special_tokens": [None]},
    {"padding_side": 5},
    {"truncation_side": None},
    {"model_input_names": "abc"},
    {"fast_tokenizer_files": [5]},
    {"split_special_tokens": [1]},
    {"tokenizer_class": ["a"]},
    {"auto_map": {"AutoTokenizer": 5}},
    {"init_inputs": [5]},
    {"gguf_file": "../x.gguf"},
    {"tokenizer_object": 5},
    {"_json_padding": 5},
    {"self": 5},
    {"convert_to_native_format": 5},
]


@pytest.mark.parametrize("wrong", WRONG_TOKENIZERS, ids=lambda wrong: str(wrong)[:60])
def test_a_tokenizers_settings_are_refused_by_file_and_field(tiny_model_dir, wrong):
    path = tiny_model_dir / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    check_tokenizer_file(path, settings)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json: '?{next(iter(wrong))}'? is .*"):
        check_tokenizer_file(path, settings | wrong)


@pytest.mark.parametrize(
    ("name", "values", "field"),
    [
        ("tokenizer_config.json", {"chat_template": [{"nam": "x"}]}, "chat_template"),
        ("special_tokens_map.json", {"bos_token": {"content": 5}}, "bos_token"),
        ("added_tokens.json", {"<x>": "1"}, "<x>"),
    ],
)
def test_each_of_a_tokenizers_files_is_looked_at(model, name, values, field):
    (model / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"{name}: {field} is "):
        load_tokenizer(model)


def test_what_tokenizers_have_is_allowed(tmp_path):
    """As transformers 3 to 5 write it."""
    written = {
        "bos_token": ADDED_TOKEN,
        "eos_token": None,
        "added_tokens_decoder": {"0": TOKEN | {"special": True}},
        "additional_special_tokens": ["<a>", ADDED_TOKEN],
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "chat_template": [{"name": "default", "template": "1"}, {"name": "tool_use", "template": "2"}],
        "model_max_length": int(1e30),
        "auto_map": {"AutoTokenizer": ["a.B", None]},
        "add_bos_token": True,
        "init_inputs": [],
        "sp_model_kwargs": {},
        "tokenizer_file": None,
    }
    check_tokenizer_file(tmp_path / "tokenizer_config.json", written)
    check_tokenizer_file(tmp_path / "special_tokens_map.json", {"bos_token": TOKEN, "pad_token": "<p>"})


def test_half_of_a_pair_in_a_tokenizer_is_refused(model):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "\ud800"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: bos_token is a text with half"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    "matter",
    [
        'license: "\\ud800"',
        'license: "mit\\n# Owned"',
        "a: " + "[" * 900 + "]" * 900,
        "date: 2001-13-45",
        "number: " + "9" * 5000,
    ],
    ids=lambda matter: matter[:20],
)
def test_a_front_matter_is_refused_by_file(model, matter):
    (model / "README.md").write_text(f"---\n{matter}\n---\n")
    with pytest.raises(UserError, match=r"README\.md: "):
        open_checkpoint(model)


@pytest.mark.parametrize("source", ["~nobody-here/x", "a\0b", "a" * 5000, os.sep + "a" * 5000])
def test_what_no_path_can_be_is_refused(source):
    with pytest.raises(UserError):
        open_checkpoint(source)
    with pytest.raises(UserError):
        load_tokenizer(source)


@pytest.mark.parametrize("opens", [open_checkpoint, load_tokenizer])
def test_a_base_that_no_file_can_be_called_is_refused(tmp_path, opens):
    directory = adapter(tmp_path / "adapter", base_model_name_or_path="x" * 900 + "/y", revision="v2")
    with pytest.raises(UserError, match=r"is an adapter of 'xxx.*is no place that can be"):
        opens(directory)


def test_what_an_export_says_of_windows_is_read_again(tmp_path: Path) -> None:
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    config = {**case_config("exaone4"), "layer_types": kinds, "num_hidden_layers": 8}
    written = spelled_for_all(config)
    assert written["sliding_window_pattern"] == "LLLG"
    check_config(tmp_path / "config.json", written)
