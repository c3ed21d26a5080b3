"""A written model is opened by others as what it is: same bytes as the library's, all spellings, own head."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny_model import byte_tokenizer, write_tiny_model
from tiny_models import CASES, case_config, write_checkpoint
from transformers import CONFIG_MAPPING, AutoTokenizer

from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder, load_pretrained
from dpo.huggingface.saving import begin_safetensors, save_pretrained, write_at
from dpo.huggingface.spellings import NEWER, spelled_for_all
from dpo.huggingface.text_models import read_config


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_streamed_safetensors_are_the_librarys_bytes(dtype, tmp_path: Path) -> None:
    tensors = {
        "b.weight": np.arange(12, dtype=np.float32).reshape(4, 3).astype(dtype),
        "a.ü": np.ones(5, dtype),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    names = sorted(tensors)
    shapes = {name: tensors[name].shape for name in names}
    places = begin_safetensors(tmp_path / "own", shapes, np.dtype(dtype))
    for name in reversed(names):
        write_at(places[name], [tensors[name][:1], tensors[name][1:]], np.dtype(dtype))
    assert (tmp_path / "own").read_bytes() == path.read_bytes()


BASE_IS_LOST = {"olmo3"}
"""transformers 5 gives an older file's base to layers that see all, and 500,000 to those with a window."""


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_are_one_decoder(case: str) -> None:
    """With rotary parameters in both spellings, and from the older one alone."""
    config = case_config(case)
    spelled = json.loads(json.dumps(spelled_for_all(config)))
    assert read_config(spelled)[1] == read_config(config)[1]
    if config["model_type"] in NEWER:
        assert "rope_theta" not in spelled, "there is no older spelling of these"
        return
    older = {key: value for key, value in spelled.items() if key != "rope_parameters"}
    if case not in BASE_IS_LOST:
        assert read_config(older)[1] == read_config(config)[1]
    if getattr(CONFIG_MAPPING[config["model_type"]].from_dict(config), "rope_parameters", None):
        assert "rope_theta" in spelled
        assert "rope_scaling" in spelled


def test_an_export_names_what_others_read(tmp_path: Path) -> None:
    """Fields that transformers 4, vLLM and mlx-lm read, with the model's values."""
    directory = write_tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    assert tokenizer["chat_template"] == (directory / "chat_template.jinja").read_text()
    opened = AutoTokenizer.from_pretrained(directory)
    text = "three:\n\n1. Apples </s><s>"
    assert opened(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    assert opened.chat_template == byte_tokenizer().chat_template


SPELLED = {
    "rope_parameters": ("llama", {"rope_theta": 10000.0, "rope_type": "default"}),
    "rope_theta": ("gemma3_text", 1000000.0),
    "rope_scaling": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    "rope_local_base_freq": ("gemma3_text", 10000.0),
    "partial_rotary_factor": ("phi3-longrope", 0.75),
    "rotary_pct": ("gpt_neox", 0.5),
    "rotary_emb_base": ("gpt_neox", 10000.0),
    "tie_word_embeddings": ("llama-untied-biases", False),
}
"""Field of config.json → family, and the value that `tiny_models` gave it, in whatever spelling."""

WRITTEN = {
    "dtype": ("config.json", "float32"),
    "torch_dtype": ("config.json", "float32"),
    "architectures": ("config.json", ["LlamaForCausalLM"]),
    "eos_token_id": ("generation_config.json", [1, 2]),
    "tokenizer_class": ("tokenizer_config.json", "PreTrainedTokenizerFast"),
    "chat_template": ("tokenizer_config.json", byte_tokenizer().chat_template),
}
"""Field → file of an export, and its value for a tiny Llama whose turns end with tokens 1 and 2."""

ELSEWHERE = {"generation_config.json", "tokenizer_config.json", "chat_template.jinja", "format: pt"}
"""What the table names and is no field: files, and a mark that the test of streamed bytes holds."""


@pytest.mark.parametrize("field", SPELLED)
def test_a_field_that_others_read_has_the_models_value(field: str) -> None:
    family, value = SPELLED[field]
    assert spelled_for_all(case_config(family))[field] == value


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rotations_by_type_of_layer_in_a_family_that_has_none_are_written_as_they_were(family: str) -> None:
    by_type = {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}
    written = spelled_for_all(case_config(family) | {"rope_parameters": by_type})
    assert written["rope_parameters"]["full_attention"] == by_type["full_attention"]


def test_a_file_that_others_read_has_the_models_value(tmp_path: Path) -> None:
    source, out = load_pretrained(write_tiny_model(tmp_path / "in")), tmp_path / "out"
    save_pretrained(
        source.model,
        out,
        hf_config=source.config,
        tokenizer=source.tokenizer,
        generation_config={"eos_token_id": [1, 2]},
    )
    found = {field: json.loads((out / name).read_text())[field] for field, (name, _) in WRITTEN.items()}
    assert found == {field: value for field, (_, value) in WRITTEN.items()}
    assert (out / "chat_template.jinja").read_text() == byte_tokenizer().chat_template


def test_every_field_of_the_page_has_a_test() -> None:
    page = Path(__file__).with_name("models_page.md").read_text(encoding="utf-8")
    table = page.split("What its readers look for")[1].split("\n\n")[1]
    named = set(re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert named - ELSEWHERE == SPELLED.keys() | WRITTEN.keys()


def test_a_head_that_differs_from_the_embedding_is_the_models(tmp_path: Path) -> None:
    """Although the configuration says that they are tied: so transformers 5 reads it."""
    directory = write_checkpoint(tmp_path / "in", "llama-untied-biases")
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    head = tensors["lm_head.weight"]
    assert not np.array_equal(head, tensors["model.embed_tokens.weight"])
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config["tie_word_embeddings"] is False
    model = load_decoder(checkpoint)
    np.testing.assert_array_equal(np.asarray(model.lm_head.embedding[...]), head)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    assert open_checkpoint(directory).config["tie_word_embeddings"] is True


def test_writing_a_model_copies_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_pretrained(write_tiny_model(tmp_path))
    from dpo.huggingface import saving

    largest = 0
    taken = saving.take

    def take(leaf, index, num_leading):
        nonlocal largest
        found = taken(leaf, index, num_leading)
        largest = max(largest, found.nbytes if num_leading else 0)
        return found

    monkeypatch.setattr(saving, "take", take)
    save_pretrained(source.model, tmp_path / "out", hf_config=source.config, tokenizer=None)
    layers = nnx.to_pure_dict(nnx.state(source.model, nnx.Param))["layers"]
    assert largest == jnp.asarray(layers["mlp"]["up_proj"]["kernel"])[0].nbytes
