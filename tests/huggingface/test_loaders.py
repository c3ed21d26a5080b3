"""What vLLM and mlx-lm read of a directory is there with the model's value: a test for each line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import byte_tokenizer, write_tiny_model
from tiny_models import CASES, case_config
from transformers import CONFIG_MAPPING, AutoTokenizer

from dpo.huggingface.pretrained import load_pretrained
from dpo.huggingface.saving import save_pretrained, written_config
from dpo.huggingface.text_models import family_of

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"

_GENERAL = "model_type hidden_size num_hidden_layers num_attention_heads vocab_size"
_LLAMA = (
    f"{_GENERAL} intermediate_size rms_norm_eps head_dim max_position_embeddings num_key_value_heads "
    "attention_bias mlp_bias tie_word_embeddings"
)
_QWEN = f"{_GENERAL} intermediate_size rms_norm_eps num_key_value_heads max_position_embeddings"
_GEMMA = f"{_GENERAL} intermediate_size rms_norm_eps num_key_value_heads head_dim"
_GRANITE = (
    f"{_QWEN} logits_scaling attention_multiplier embedding_multiplier residual_multiplier attention_bias "
    "tie_word_embeddings"
)
MLX_READS = {
    "llama": f"{_LLAMA} layer_types sliding_window",
    "mistral": f"{_LLAMA} layer_types sliding_window",
    "smollm3": f"{_LLAMA} no_rope_layers",
    "ministral3": f"{_LLAMA} layer_types sliding_window",
    "olmo2": _LLAMA,
    "olmo3": f"{_LLAMA} layer_types sliding_window",
    "seed_oss": f"{_LLAMA} attention_out_bias",
    "apertus": _LLAMA,
    "exaone4": f"{_LLAMA} sliding_window",
    "qwen2": f"{_QWEN} tie_word_embeddings",
    "qwen3": f"{_QWEN} tie_word_embeddings head_dim",
    "hunyuan_v1_dense": f"{_QWEN} attention_bias tie_word_embeddings",
    "ernie4_5": f"{_QWEN} head_dim use_bias tie_word_embeddings",
    "phi3": f"{_QWEN} tie_word_embeddings",
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA} query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping",
    "gemma3_text": f"{_GEMMA} query_pre_attn_scalar sliding_window",
    "granite": f"{_GRANITE} mlp_bias",
    "granitemoehybrid": f"{_GRANITE} layer_types position_embedding_type shared_intermediate_size",
    "nanochat": f"{_GENERAL} intermediate_size num_key_value_heads max_position_embeddings",
    "lfm2": (
        f"{_GENERAL} intermediate_size num_key_value_heads max_position_embeddings norm_eps conv_bias "
        "conv_L_cache block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim layer_types"
    ),
    "stablelm": (
        f"{_GENERAL} intermediate_size num_key_value_heads use_qkv_bias layer_norm_eps qk_layernorm "
        "use_parallel_residual"
    ),
    "gpt2": "model_type n_embd n_head n_layer n_positions layer_norm_epsilon vocab_size",
    "gpt_neox": f"{_GENERAL} max_position_embeddings layer_norm_eps",
}
"""Of its `ModelArgs`, fields that it ends without, or has a default of its own for; the rotary ones apart."""

NEWER = ("lfm3", "gemma4_text")
"""Of transformers 5 alone: the older names of a rotation are not written."""


@cache
def written(case: str) -> dict[str, Any]:
    """config.json of an export of a tiny model of this family."""
    config = case_config(case)
    found = written_config(config, architecture=family_of(config).architecture, dtype=np.dtype(np.float16))
    return json.loads(json.dumps(found))


@cache
def parsed(case: str) -> Any:
    config = case_config(case)
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def rope(case: str) -> dict[str, Any]:
    """Rotary parameters of the layers that see all; empty where positions are learned."""
    found = getattr(parsed(case), "rope_parameters", None) or {}
    return found.get("full_attention", found)


def check_architectures(case: str) -> None:
    (name,) = written(case)["architectures"]
    assert name == family_of(case_config(case)).architecture
    assert name.endswith(("ForCausalLM", "LMHeadModel"))


def check_fields(case: str) -> None:
    config, expected, source = written(case), parsed(case), case_config(case)
    names = MLX_READS.get(config["model_type"], "model_type vocab_size").split()
    found = {name: source.get(name, getattr(expected, name, None)) for name in names}
    lacking = [name for name, value in found.items() if value is not None and config.get(name) != value]
    assert not lacking


def check_rope_parameters(case: str) -> None:
    if rope(case):
        found, expected = written(case)["rope_parameters"], parsed(case).rope_parameters
        assert found == json.loads(json.dumps(expected))
    else:
        assert "rope_parameters" not in written(case)


def check_older_rope(case: str) -> None:
    config, expected = written(case), rope(case)
    if not expected or config["model_type"] in NEWER:
        return
    assert config["rope_theta"] == expected["rope_theta"]
    scaling, kind = config["rope_scaling"], expected["rope_type"]
    # Sections of a rotation, by the three axes of an image's positions, are told there whatever the kind.
    assert (scaling is None) == (kind == "default" and "mrope_section" not in expected)
    if scaling is None:
        return
    assert (scaling.get("type") or scaling["rope_type"]) == kind
    asked = {
        "phi3": {"long_factor", "short_factor", "type"},
        "hunyuan_v1_dense": {"alpha", "factor", "type"},
    }
    assert asked.get(config["model_type"], set()) <= scaling.keys()
    for name in ("factor", "low_freq_factor", "high_freq_factor", "long_factor", "short_factor"):
        assert scaling.get(name) == expected.get(name)


def check_partial_rotation(case: str) -> None:
    share = rope(case).get("partial_rotary_factor")
    if share is not None and written(case)["model_type"] not in NEWER:
        assert written(case)["partial_rotary_factor"] == share
    if written(case)["model_type"] == "gpt_neox":
        assert written(case)["rotary_pct"] == (1.0 if share is None else share)
        assert written(case)["rotary_emb_base"] == rope(case)["rope_theta"]


def check_local_rope(case: str) -> None:
    local = (getattr(parsed(case), "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None and written(case)["model_type"] not in NEWER:
        assert written(case)["rope_local_base_freq"] == local["rope_theta"]


def check_window_pattern(case: str) -> None:
    """As mlx-lm reads it: a number in Gemma 3, a text in EXAONE 4."""
    config = written(case)
    if config["model_type"] == "gemma3_text":
        period = config["sliding_window_pattern"]
        windows = [(layer + 1) % period != 0 for layer in range(config["num_hidden_layers"])]
        assert windows == [kind == "sliding_attention" for kind in config["layer_types"]]


def check_length(case: str) -> None:
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    assert [written(case)[name] for name in names if name in written(case)][:1] == [
        next(getattr(parsed(case), name) for name in names if hasattr(parsed(case), name))
    ]


def check_dtype(case: str) -> None:
    assert written(case)["dtype"] == written(case)["torch_dtype"] == "float16"


def check_no_code(case: str) -> None:
    config = case_config(case) | {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    found = written_config(config, architecture="X", dtype=np.dtype(np.float32))
    assert not {"auto_map", "model_file", "quantization", "quantization_config"} & found.keys()


def check_context(case: str) -> None:
    if written(case)["model_type"] == "gpt2":
        assert written(case)["n_ctx"] == written(case)["n_positions"]


BY_CONFIG: Mapping[str, Callable[[str], None]] = {
    "`architectures`": check_architectures,
    "the fields of a family": check_fields,
    "`rope_parameters`": check_rope_parameters,
    "`rope_theta`, `rope_scaling`": check_older_rope,
    "`partial_rotary_factor`, `rotary_pct`, `rotary_emb_base`": check_partial_rotation,
    "`rope_local_base_freq`": check_local_rope,
    "`sliding_window_pattern`": check_window_pattern,
    "`n_ctx`": check_context,
    "`max_position_embeddings`": check_length,
    "`dtype`, `torch_dtype`": check_dtype,
    "no `auto_map`, `quantization_config`": check_no_code,
}
"""Line of the page → its check, for every family."""


@pytest.mark.parametrize("line", BY_CONFIG)
def test_a_line_holds_for_every_family(line: str) -> None:
    for case in CASES:
        BY_CONFIG[line](case)


@pytest.mark.parametrize(
    ("kinds", "pattern"), [("LLLGLLLG", "LLLG"), ("LGLG", "LG"), ("LLG", "LL"), ("LGL", None)]
)
def test_windows_of_exaone_4_are_a_text_where_one_says_them(kinds: str, pattern: str | None) -> None:
    """mlx-lm repeats it, and lets the last layer see all whatever it says."""
    names = {"L": "sliding_attention", "G": "full_attention"}
    config = case_config("exaone4") | {
        "num_hidden_layers": len(kinds),
        "layer_types": [names[kind] for kind in kinds],
    }
    found = written_config(config, architecture="X", dtype=np.dtype(np.float32))["sliding_window_pattern"]
    if pattern is None:
        assert not isinstance(found, str)
        return
    read = [found[layer % len(found)] for layer in range(len(kinds) - 1)] + ["G"]
    assert "".join(read) == kinds


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose turns end with tokens 1 and 2, in two files."""
    source = load_pretrained(write_tiny_model(tmp_path_factory.mktemp("loaders") / "in"))
    return save_pretrained(
        source.model,
        tmp_path_factory.mktemp("loaders") / "out",
        hf_config=source.config,
        tokenizer=source.tokenizer,
        generation_config={"eos_token_id": [1, 2]},
        max_shard_size=2**14,
    )


def read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def check_ends(directory: Path) -> None:
    assert read(directory, "generation_config.json")["eos_token_id"] == [1, 2]


def check_weights(directory: Path) -> None:
    named = set(read(directory, "model.safetensors.index.json")["weight_map"].values())
    assert named == {path.name for path in directory.glob("model*.safetensors")}
    assert named == {path.name for path in directory.glob("*.safetensors")}
    assert len(named) > 1


def check_tokenizer(directory: Path) -> None:
    assert {"model", "decoder", "added_tokens"} <= read(directory, "tokenizer.json").keys()
    assert read(directory, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    opened = AutoTokenizer.from_pretrained(directory)
    assert opened.eos_token_id == byte_tokenizer().eos_token_id


def check_template(directory: Path) -> None:
    template = byte_tokenizer().chat_template
    assert read(directory, "tokenizer_config.json")["chat_template"] == template
    assert (directory / "chat_template.jinja").read_text(encoding="utf-8") == template


def check_vocabulary(directory: Path) -> None:
    ids = AutoTokenizer.from_pretrained(directory).get_vocab().values()
    assert max(ids) < read(directory, "config.json")["vocab_size"]


BY_DIRECTORY: Mapping[str, Callable[[Path], None]] = {
    "`eos_token_id`": check_ends,
    "`model*.safetensors`": check_weights,
    "`tokenizer.json`, `tokenizer_class`": check_tokenizer,
    "`chat_template`, `chat_template.jinja`": check_template,
    "`vocab_size`": check_vocabulary,
}
"""Line of the page → its check, on what is the same code for every family."""


@pytest.mark.parametrize("line", BY_DIRECTORY)
def test_a_line_holds_for_a_directory(line: str, directory: Path) -> None:
    BY_DIRECTORY[line](directory)


def test_every_line_of_the_page_has_a_check() -> None:
    table = PAGE.read_text(encoding="utf-8").split("What their loaders read")[1].split("\n\n")[2]
    lines = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert lines == [*BY_CONFIG, *BY_DIRECTORY]


def test_mlx_lm_has_these_families() -> None:
    """Those of the page are those of the table above."""
    text = PAGE.read_text(encoding="utf-8").split("mlx-lm has ")[1].split(".")[0]
    assert set(re.findall(r"`([^`]+)`", text)) == MLX_READS.keys()
