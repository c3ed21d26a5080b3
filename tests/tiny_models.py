"""Tiny random checkpoints of every family, made without torch: the cases that parity tests share.

Weights are a function of (tensor name, shape), so a stored oracle needs only a configuration and numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from dpo.huggingface.binding import bind, constants
from dpo.huggingface.families import FAMILIES, classifier_architecture
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.text_models import read_config
from dpo.models.classifier import SequenceClassifier
from dpo.models.decoder import Decoder
from dpo.models.decoder_config import DecoderConfig
from dpo.models.parts import WEIGHTS

ORACLES = Path(__file__).with_name("huggingface") / "oracles.json"


def tokens_of(seed: int) -> np.ndarray:
    """Two prompts; longer than the windows and the original lengths of the cases."""
    return (np.arange(48).reshape(2, 24) * (29 + seed) + 5 * (seed + 1)) % 89


TOKENS = tokens_of(0)
SEQUENCES = [TOKENS[0].tolist(), TOKENS[1, :17].tolist(), [*TOKENS[0, :20].tolist(), 0, 0]]
"""For classifiers; the last ends with what most cases call padding, as a response does where that is EOS."""

_SIZES = {
    "vocab_size": 89,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CLASSIC = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
_DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 12, "linear_value_head_dim": 7, "head_dim": 16},
}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [2.0, 3.0, 4.0],
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


CASES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama-untied-biases": {
        **_SIZES,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
    },
    "llama-llama3": {
        **_SIZES,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    },
    "llama-linear": {**_SIZES, **_rope("linear", factor=4.0)},
    "llama-dynamic": {**_SIZES, "max_position_embeddings": 16, **_rope("dynamic", factor=2.0)},
    "llama-yarn": {**_SIZES, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    "mistral": {**_SIZES, "sliding_window": 7, "head_dim": 12},
    "qwen2": {**_SIZES, "tie_word_embeddings": True},
    "qwen2-window": {
        **_SIZES,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        **_rope("yarn", factor=2.0, original_max_position_embeddings=32),
    },
    "qwen3": {**_SIZES, "head_dim": 12, "tie_word_embeddings": True},
    "smollm3": {**_SIZES, "no_rope_layers": [1, 0, 1]},
    "smollm3-window": {
        **_SIZES,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "gemma": {**_SIZES, "head_dim": 12, "num_key_value_heads": 1},
    "gemma2": {
        **_SIZES,
        "head_dim": 12,
        "sliding_window": 6,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_SIZES,
        "head_dim": 12,
        "sliding_window": 6,
        "query_pre_attn_scalar": 20,
        "layer_types": _LOCAL_GLOBAL,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma4_text": {
        **_SIZES,
        **{"num_hidden_layers": 7, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 6},
        **{"head_dim": 6, "global_head_dim": 10, "num_global_key_value_heads": 3, "attention_k_eq_v": True},
        **{"sliding_window": 5, "final_logit_softcapping": 3.0, "use_bidirectional_attention": "vision"},
        **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "attention_bias": True},
        **{"hidden_size_per_layer_input": 7, "vocab_size_per_layer_input": 89},
        "layer_types": [*_LOCAL_GLOBAL[:1], *_LOCAL_GLOBAL, *_LOCAL_GLOBAL[1:], "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        },
    },
    "gemma4_text-dense": {
        **_SIZES,
        **{"num_hidden_layers": 5, "hidden_size": 40, "num_attention_heads": 4, "sliding_window": 7},
        **{"head_dim": 10, "global_head_dim": 18, "hidden_size_per_layer_input": 0},
        "layer_types": [*_LOCAL_GLOBAL, *_LOCAL_GLOBAL[:2]],
        "tie_word_embeddings": False,
    },
    "phi3": {**_SIZES, "sliding_window": 9},
    "phi3-longrope": {
        **_SIZES,
        "original_max_position_embeddings": 16,
        "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75},
    },
    "phi3-longrope-short": {
        **_SIZES,
        "original_max_position_embeddings": 32,
        "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75},
    },
    "olmo2": {**_SIZES},
    "olmo3": {
        **_SIZES,
        "sliding_window": 6,
        "layer_types": _LOCAL_GLOBAL,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "arcee": {**_SIZES, "head_dim": 12, "mlp_bias": True},
    "seed_oss": {**_SIZES, "head_dim": 12, "attention_out_bias": False},
    "ministral": {**_SIZES, "sliding_window": 7, "layer_types": _LOCAL_GLOBAL, "head_dim": 12},
    "ministral3": {
        **_SIZES,
        "head_dim": 12,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=8,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
            llama_4_scaling_beta=0.4,
        ),
    },
    "exaone4": {**_SIZES, "head_dim": 12, "sliding_window": 5, "layer_types": _LOCAL_GLOBAL},
    "exaone4-full": {
        **_SIZES,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {**_SIZES, "head_dim": 12, **_rope("dynamic", alpha=50.0, factor=1.0)},
    "ernie4_5": {**_SIZES, "head_dim": 12, "use_bias": True},
    "nanochat": {**_SIZES, "final_logit_softcapping": 3.0, "pad_token_id": None},
    "apertus": {**_SIZES},
    "granitemoehybrid": {
        **_SIZES,
        "shared_intermediate_size": 40,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid-unplaced": {
        **_SIZES,
        "shared_intermediate_size": 40,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * 3,
        "mamba_n_heads": 4,
        "attention_multiplier": 0.4,
    },
    "phi3-phi4_mini": {
        **_SIZES,
        "hidden_size": 96,
        "original_max_position_embeddings": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 6,
            "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0],
        },
    },
    "granite": {
        **_SIZES,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "lfm2": {
        **_SIZES,
        **{"num_hidden_layers": 6, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        "layer_types": [*["conv", "full_attention"] * 2, "conv", "conv"],
    },
    "lfm2-adjusted": {
        **_SIZES,
        **{"num_hidden_layers": 5, "intermediate_size": 60, "block_multiple_of": 16, "conv_L_cache": 4},
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "tie_word_embeddings": False,
    },
    "lfm2-attention": {**_SIZES, "block_auto_adjust_ff_dim": False},
    "lfm2-biases": {
        **_SIZES,
        **{"num_hidden_layers": 2, "conv_bias": True, "conv_L_cache": 2, "head_dim": 10},
        "layer_types": ["full_attention", "conv"],
    },
    "lfm3": {
        **_SIZES,
        **{"num_hidden_layers": 6, "conv_L_cache": 5, "head_dim": 12, "sliding_window": 6},
        "layer_types": ["conv", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e5,
                "partial_rotary_factor": 0.5,
            },
        },
    },
    "lfm3-plain": {
        **_SIZES,
        **{"num_hidden_layers": 4, "conv_L_cache": 2, "head_dim": 8, "sliding_window": None},
        **{"use_sandwich_norm": False, "use_attention_gate": False, "conv_bias": True},
        **{"attention_bias": True, "tie_word_embeddings": False},
        "layer_types": ["full_attention", "conv", "conv", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    },
    "lfm3-attention": {
        **_SIZES,
        **{"head_dim": 12, "sliding_window": 7, "attention_bias": True},
        "layer_types": _LOCAL_GLOBAL,
    },
    "qwen3_5_text": {
        **_SIZES,
        **_DELTA,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "tie_word_embeddings": True,
        **_rope("default", partial_rotary_factor=0.25, mrope_section=[1, 1, 0], mrope_interleaved=True),
    },
    "qwen3_5_text-biases": {
        **_SIZES,
        **_DELTA,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        **{"linear_num_value_heads": 2, "linear_conv_kernel_dim": 2},
        **{"attention_bias": True, "tie_word_embeddings": False, "head_dim": 8},
        **_rope("default", partial_rotary_factor=0.5),
    },
    "qwen3_5_text-attention": {
        **_SIZES,
        **_DELTA,
        "layer_types": ["full_attention"] * 3,
        **_rope("default", partial_rotary_factor=0.25),
    },
    "qwen3_next": {
        **_SIZES,
        **_DELTA,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "num_experts": 0,
        "tie_word_embeddings": False,
        **_rope("default", partial_rotary_factor=0.25),
    },
    "stablelm": {**_SIZES, "use_qkv_bias": True, **_rope("default", partial_rotary_factor=0.25)},
    "stablelm-parallel": {
        **_SIZES,
        "use_parallel_residual": True,
        "qk_layernorm": True,
        **_rope("default", partial_rotary_factor=0.5),
    },
    "gpt2": {
        **{"vocab_size": 89, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "n_inner": 40},
        **{"bos_token_id": 1, "eos_token_id": 2},
    },
    "gpt_neox": {**_CLASSIC, **_rope("default", partial_rotary_factor=0.5)},
    "gpt_neox-sequential": {
        **_CLASSIC,
        "use_parallel_residual": False,
        "attention_bias": False,
        **_rope("default", partial_rotary_factor=1.0),
    },
    "gpt_neo": {
        **{"vocab_size": 89, "hidden_size": 48, "num_layers": 3, "num_heads": 6, "window_size": 5},
        **{"max_position_embeddings": 64, "attention_types": [[["global", "local", "local"], 1]]},
        **{"bos_token_id": 1, "eos_token_id": 2},
    },
    "opt": {**_CLASSIC, "ffn_dim": 40},
    "falcon": {**_CLASSIC, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon-multi-query": {**_CLASSIC, "multi_query": True, "parallel_attn": True},
    "falcon-grouped": {**_CLASSIC, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {
        **{"vocab_size": 89, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 64},
        **{"bos_token_id": 1, "eos_token_id": 2},
    },
}
"""Name, `model_type` and optionally a variant, → configuration."""
CLASSIFIERS = [name for name in FAMILIES if classifier_architecture(name) is not None]
"""Families with a sequence classifier."""


def case_config(case: str) -> dict[str, Any]:
    return {"model_type": case.split("-")[0], **CASES[case]}


def tensor_values(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights large enough that attention is far from uniform and every part matters."""
    noise = np.random.default_rng(zlib.crc32(name.encode()) + seed).normal(size=shape).astype(np.float32)
    if name.endswith("bias"):
        return 0.1 * noise
    return 1 + 0.2 * noise if len(shape) == 1 else 0.25 * noise


def write_checkpoint(directory: Path, case: str | dict[str, Any], seed: int = 0, **choices: Any) -> Path:
    """A model directory of a case (or configuration), by our own weight-name table; `choices` change it."""
    config = (case_config(case) if isinstance(case, str) else case) | choices
    return _write(directory, config, lambda decoder: Decoder(decoder, rngs=nnx.Rngs(0)), seed)


def write_classifier(directory: Path, case: str, num_labels: int = 1) -> Path:
    """The same decoder with a head for sequence classification."""
    config = case_config(case) | {
        "architectures": [classifier_architecture(case.split("-")[0])],
        "id2label": {str(i): f"LABEL_{i}" for i in range(num_labels)},
    }

    def make(decoder: DecoderConfig) -> SequenceClassifier:
        return SequenceClassifier(decoder, num_labels=num_labels, pad_token_id=None, rngs=nnx.Rngs(0))

    return _write(directory, config, make)


def _write(
    directory: Path, config: dict[str, Any], make: Callable[[DecoderConfig], Decoder], seed: int = 0
) -> Path:
    family, decoder = read_config(config)
    model = nnx.eval_shape(lambda: make(decoder))
    shapes = {
        ".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, WEIGHTS))
    }
    tensors = {
        name: tensor_values(name, binding.shape, seed)
        for binding in bind(family, model.config, shapes)
        for name in binding.names
    }
    tensors |= {name: np.asarray(value, np.float32) for name, value in constants(family, decoder).items()}
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def batch_arrays(tokens: np.ndarray) -> tuple[jnp.ndarray, ...]:
    """Tokens, positions, group and branch of rows that hold one sequence each."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    return jnp.asarray(tokens), positions, jnp.ones_like(positions), jnp.zeros_like(positions)


def load_case(directory: Path, case: str, seed: int = 0, **choices: Any) -> Decoder:
    return load_decoder(open_checkpoint(write_checkpoint(directory, case, seed)), **choices)
