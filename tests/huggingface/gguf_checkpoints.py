"""Tiny GGUF files, written as llama.cpp's conversion script would from a Hugging Face directory.

What the script does to each family (names, permutations, transposes, offsets) is written here from its side,
and undone in `dpo/huggingface/gguf_files.py` from the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from tiny_models import write_checkpoint

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 6, "tie_word_embeddings": True}

CASES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, **_ROPE, "head_dim": 16, "tie_word_embeddings": False},
    "qwen2": {**_SIZES, **_ROPE, "tie_word_embeddings": True},
    "qwen3": {**_SIZES, **_ROPE, "head_dim": 128, "tie_word_embeddings": False},
    "gemma2": {**_SIZES, **_ROPE, **_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        **_SIZES,
        **_GEMMA,
        "layer_types": ["sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {**_SIZES, **_ROPE, "sliding_window": None, "tie_word_embeddings": False},
    "stablelm": {
        **_SIZES,
        "use_qkv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
    "gpt2": {
        **{"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_inner": 256},
        **{"bos_token_id": 1, "eos_token_id": 2},
    },
    "falcon": {
        **{name: value for name, value in _SIZES.items() if name != "num_key_value_heads"},
        **_ROPE,
        **{"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False},
        **{"ffn_hidden_size": 256, "tie_word_embeddings": True},
    },
}
"""Sizes that fit blocks of 32, and the values that transformers assumes where it reads none from a file."""

BEYOND: dict[str, dict[str, Any]] = {
    "llama-biases": {**CASES["llama"], "attention_bias": True},
    "falcon-grouped": {
        **CASES["falcon"],
        **{"new_decoder_architecture": True, "num_kv_heads": 2},
    },
    "stablelm-norms": {
        **CASES["stablelm"],
        **{"use_qkv_bias": False, "use_parallel_residual": True, "qk_layernorm": True},
    },
    "gemma2-caps": {
        **CASES["gemma2"],
        "attn_logit_softcapping": 2.0,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    },
    "phi3-window": {**CASES["phi3"], "sliding_window": 9},
    "qwen2-yarn": {
        **CASES["qwen2"],
        "rope_parameters": {
            **_ROPE["rope_parameters"],
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    },
    "llama-llama3": {
        **CASES["llama"],
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
    },
    "phi3-longrope": {
        **CASES["phi3"],
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16},
            **{"short_factor": [1.0, 1.25, 1.5, 1.75] * 2, "long_factor": [2.0, 3.0, 4.0, 5.0] * 2},
        },
    },
}
"""What transformers (5.23) does not read from a file, and this project does."""


def write_pair(directory: Path, case: str, *, kind: str = "F32", seed: int = 0) -> tuple[Path, Path]:
    """The same model as a directory and as a GGUF file; matrices are stored as `kind`."""
    config = {"model_type": case.split("-")[0], **(CASES | BEYOND)[case]}
    source = write_checkpoint(directory / "source", config, seed)
    path = directory / "model.gguf"
    write_gguf(source, path, kind)
    return source, path


def write_gguf(source: Path, path: Path, kind: str = "F32") -> None:
    config = json.loads((source / "config.json").read_text())
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    model_type = config["model_type"]
    architecture = "gemma3" if model_type == "gemma3_text" else model_type
    names = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _metadata(config, tensors).items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_string if isinstance(value, str) else add
        add = writer.add_bool if isinstance(value, bool) else add
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges([])
    layers = config.get("num_hidden_layers") or config["n_layer"]
    name_map = gguf.get_tensor_name_map(names, layers)
    for name, tensor in (_stack_head_norms(tensors) | _rope_tensors(config)).items():
        own = (
            name if name.startswith("rope_f") else name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        )
        assert own is not None, name
        values = np.ascontiguousarray(_CONVERT.get(model_type, _keep)(config, own, tensor))
        if values.ndim == 2 and min(values.shape) > 4 and kind != "F32":
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(own, gguf.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    if config["model_type"] == "gpt2":
        sizes = {"embedding_length": "n_embd", "block_count": "n_layer", "feed_forward_length": "n_inner"}
        sizes |= {"attention.head_count": "n_head", "context_length": "n_positions"}
        return {key: config[name] for key, name in sizes.items()} | {"attention.layer_norm_epsilon": 1e-5}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    epsilon = "layer_norm" if config["model_type"] in ("stablelm", "falcon") else "layer_norm_rms"
    kv_heads = config.get("num_key_value_heads", config.get("num_kv_heads", 1))
    found = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config.get("ffn_hidden_size", config.get("intermediate_size")),
        "context_length": config["max_position_embeddings"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        f"attention.{epsilon}_epsilon": 1e-5 if epsilon == "layer_norm" else 1e-6,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "attention.key_length": head_dim,
        "attention.sliding_window": config.get("sliding_window"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "use_parallel_residual": config.get("use_parallel_residual"),
    }
    if rope["rope_type"] in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
    return {key: value for key, value in found.items() if value is not None}


def _rope_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = config.get("rope_parameters", {"rope_type": "default"})
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    divisors = []
    for frequency in 1 / rope["rope_theta"] ** (np.arange(0, 16, 2) / 16):
        wavelength, length = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
        if wavelength < length / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > length / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.asarray(divisors, np.float32)}


def _stack_head_norms(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """StableLM's norms of single heads become one tensor a layer."""
    stacked: dict[str, list[tuple[int, np.ndarray]]] = {}
    others = {}
    for name, tensor in tensors.items():
        head = re.fullmatch(r"(.*)\.norms\.(\d+)\.weight", name)
        if head:
            stacked.setdefault(f"{head[1]}.weight", []).append((int(head[2]), tensor))
        else:
            others[name] = tensor
    return others | {name: np.stack([t for _, t in sorted(parts)]) for name, parts in stacked.items()}


def _keep(config: dict[str, Any], name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor


def _permute(config: dict[str, Any], name: str, tensor: np.ndarray) -> np.ndarray:
    heads: dict[str, Any] = {
        "attn_q": config.get("num_attention_heads"),
        "attn_k": config.get("num_key_value_heads"),
    }
    kind = name.split(".")[-2]
    if kind not in heads:
        return tensor
    return tensor.reshape(heads[kind], 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _offset(config: dict[str, Any], name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor + 1 if name.endswith("norm.weight") else tensor


def _transpose(config: dict[str, Any], name: str, tensor: np.ndarray) -> np.ndarray:
    turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return tensor.T if name.endswith(turned) else tensor


def _ungroup(config: dict[str, Any], name: str, tensor: np.ndarray) -> np.ndarray:
    if not name.endswith("attn_qkv.weight"):
        return tensor
    heads, groups = config["num_attention_heads"], config.get("num_kv_heads", 1)
    rows = tensor.reshape(groups, heads // groups + 2, -1, tensor.shape[-1])
    parts = rows[:, :-2], rows[:, [-2]], rows[:, [-1]]
    return np.concatenate([part.reshape(-1, tensor.shape[-1]) for part in parts])


_CONVERT: dict[str, Callable[[dict[str, Any], str, np.ndarray], np.ndarray]] = {
    "llama": _permute,
    "gemma2": _offset,
    "gemma3_text": _offset,
    "gpt2": _transpose,
    "falcon": _ungroup,
}
