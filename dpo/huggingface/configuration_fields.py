"""Fields of `DecoderConfig` that configurations of many families give alike."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dpo.huggingface.foreign_json import JsonObject
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder_config import Activation, DecoderConfig
from dpo.models.rotary import Rope, make_rope
from dpo.outcomes import UserError


def neutral(hf: PreTrainedConfig, max_positions: int, **choices: Any) -> DecoderConfig:
    """A decoder with the sizes that all name alike; `choices` are where a family is not as most are."""
    layers, heads, head_dim = hf.num_hidden_layers, hf.num_attention_heads, head_dim_of(hf)
    fields: dict[str, Any] = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": layers,
        "layer_kinds": ("attention",) * layers,
        "convolution_width": 0,
        "convolution_bias": False,
        "delta": None,
        "num_heads": heads,
        "num_kv_heads": heads,
        "values_are_keys": False,
        "global_heads": None,
        "reader_intermediate_size": 0,
        "per_layer_size": 0,
        "head_dim": head_dim,
        "residual": "sequential",
        "pre_norm": True,
        "post_norm": False,
        "qk_norm": "none",
        "value_norm": False,
        "embedding_norm": False,
        "gated_attention": "none",
        "position_offset": 0,
        "max_positions": max_positions,
        "alibi": None,
        "ropes": (),
        "layer_rope": (0,) * layers,
        "windows": (NO_WINDOW,) * layers,
        "attention_scale": head_dim**-0.5,
        "attention_softcap": None,
        "query_growth": None,
        "logit_softcap": None,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
        "tie_embeddings": hf.tie_word_embeddings,
    }
    return DecoderConfig(**fields | choices)


def head_dim_of(hf: PreTrainedConfig) -> int:
    """By transformers' own rule: some configurations have the field, and any may carry it in its JSON."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rope_of(hf: PreTrainedConfig, parameters: JsonObject, head_dim: int) -> Rope:
    """The rotation that a configuration's rotary parameters describe, to the family's own code."""
    if parameters["rope_type"] == "default" and hf.model_type not in _TURN_IN_PART:
        parameters = {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}
    return make_rope(parameters, head_dim, hf.max_position_embeddings)


_TURN_IN_PART = ("phi3", "qwen3_5_text", "qwen3_next", "stablelm", "gpt_neox")
"""Families that read which share of a head turns where nothing is scaled; others turn all of it."""


def act(name: str) -> Activation:
    """The activation, by Hugging Face's name of it."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation is {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def biases(hf: PreTrainedConfig) -> dict[str, bool]:
    """Biases of all projections of attention, or of none."""
    return {"qkv_bias": hf.attention_bias, "output_bias": hf.attention_bias}


def optional_float(value: float | None) -> float | None:
    """A number that JSON may hold as a whole one."""
    return None if value is None else float(value)


def uniform_windows(hf: PreTrainedConfig) -> tuple[int, ...]:
    """One window for all layers, where there is one."""
    return (hf.sliding_window or NO_WINDOW,) * hf.num_hidden_layers


def layer_windows(hf: PreTrainedConfig) -> tuple[int, ...]:
    """The window of each layer by its type."""
    kinds = {"full_attention": NO_WINDOW, "sliding_attention": hf.sliding_window}
    unknown = set(hf.layer_types) - set(kinds)
    if unknown:
        raise UserError(f"layer_types has {', '.join(sorted(unknown))}; supported: {', '.join(kinds)}")
    if "sliding_attention" in hf.layer_types and not hf.sliding_window:
        raise UserError(f"sliding_window is {hf.sliding_window!r}, and layer_types has sliding_attention")
    return tuple(kinds[kind] for kind in hf.layer_types)


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}
"""Hugging Face's names of activations → `DecoderConfig.activation`."""
