"""What a configuration may say before anything is made from it: types and ranges of every field that is read.

Names are those of all families together: a field means the same wherever it is. Ranges are some ten times
what any model has; whether sizes are those of the weights shows when they are compared, before any is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dpo.huggingface.foreign_json import (
    Rule,
    check_fields,
    either,
    flag,
    list_of,
    mapping_of,
    optional,
    real,
    show,
    text,
    whole,
)
from dpo.outcomes import UserError

MAX_LAYERS = 1000
_LAYERS, _HEADS, _WIDTH = whole(1, MAX_LAYERS), whole(1, 4096), whole(1, 1 << 17)
_INNER, _POSITIONS = whole(1, 1 << 20), whole(1, (1 << 31) - 1)
_POSITIVE, _SHARE = real(0, 1e6, above=True), real(0, 1)
_ID = whole(-1, (1 << 31) - 1)


def _rules(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


TOKEN_IDS: dict[str, Rule] = {
    **_rules(optional(_ID), "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    "eos_token_id": optional(either(_ID, list_of(_ID, 1000))),
}

CONFIG: dict[str, Rule] = {
    **_rules(_LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    **_rules(_HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads"),
    **_rules(
        optional(_HEADS), "num_global_key_value_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv"
    ),
    **_rules(_WIDTH, "hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    **_rules(optional(_INNER), "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    **_rules(optional(whole(1, 1 << 14)), "head_dim", "global_head_dim", "rotary_dim"),
    **_rules(whole(0, 1 << 14), "hidden_size_per_layer_input"),
    **_rules(whole(0, MAX_LAYERS), "num_kv_shared_layers"),
    **_rules(flag, "attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block"),
    **_rules(whole(1, 1 << 24), "vocab_size", "vocab_size_per_layer_input"),
    **_rules(_POSITIONS, "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "window_size"),
    **_rules(optional(_POSITIONS), "sliding_window", "original_max_position_embeddings"),
    **_rules(optional(whole(0, 1 << 20)), "max_window_layers"),
    **_rules(optional(_LAYERS), "no_rope_layer_interval", "_sliding_window_pattern"),
    "sliding_window_pattern": optional(either(_LAYERS, text)),
    **_rules(real(0, 1, above=True), "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    **_rules(real(1, 1e15, above=True), "rope_theta", "rotary_emb_base", "rope_local_base_freq"),
    **_rules(real(0, 1, above=True), "partial_rotary_factor", "rotary_pct", "embedding_fraction"),
    **_rules(_POSITIVE, "query_pre_attn_scalar", "logits_scaling", "expansion_ratio"),
    **_rules(real(-1e6, 1e6), "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    **_rules(optional(_POSITIVE), "final_logit_softcapping", "attn_logit_softcapping"),
    **_rules(optional(_SHARE), "attention_dropout", "hidden_dropout", "classifier_dropout", "dropout"),
    **_rules(_SHARE, "resid_pdrop", "embd_pdrop", "attn_pdrop", "layerdrop", "emb_pdrop"),
    **_rules(optional(whole(1, 2)), "num_ln_in_parallel_attn"),
    **_rules(flag, "attention_bias", "mlp_bias", "tie_word_embeddings", "alibi", "bias", "multi_query"),
    **_rules(flag, "new_decoder_architecture", "parallel_attn", "use_parallel_residual", "qk_layernorm"),
    **_rules(flag, "use_qkv_bias", "enable_bias", "do_layer_norm_before", "layer_norm_elementwise_affine"),
    **_rules(flag, "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    **_rules(optional(flag), "use_bias", "attention_out_bias", "use_qk_norm"),
    **_rules(optional(_INNER), "shared_intermediate_size", "block_ff_dim", "block_multiple_of"),
    **_rules(optional(_POSITIVE), "block_ffn_dim_multiplier"),
    **_rules(whole(2, 64), "conv_L_cache", "linear_conv_kernel_dim"),
    **_rules(_INNER, "linear_key_head_dim", "linear_value_head_dim"),
    **_rules(_HEADS, "linear_num_key_heads", "linear_num_value_heads"),
    **_rules(optional(whole(0, 10_000)), "num_experts"),
    **_rules(optional(whole(1, MAX_LAYERS)), "decoder_sparse_step", "full_attention_interval"),
    "mlp_only_layers": optional(list_of(whole(0, MAX_LAYERS), MAX_LAYERS)),
    **_rules(flag, "conv_bias", "block_auto_adjust_ff_dim", "tie_embedding"),
    **_rules(flag, "use_sandwich_norm", "use_attention_gate"),
    "full_attn_idxs": optional(list_of(whole(0, MAX_LAYERS), MAX_LAYERS)),
    **_rules(optional(text), "position_embedding_type"),
    **_rules(optional(flag), "use_sliding_window", "use_cache"),
    **_rules(optional(either(flag, text)), "use_bidirectional_attention"),
    **_rules(text, "model_type", "hidden_act", "activation_function", "activation"),
    **_rules(optional(text), "hidden_activation", "transformers_version", "_name_or_path"),
    **_rules(optional(text), "dtype", "torch_dtype"),
    **_rules(optional(list_of(text, 16)), "architectures"),
    **_rules(optional(list_of(text, MAX_LAYERS)), "layer_types", "attention_layers"),
    "no_rope_layers": optional(list_of(either(flag, whole(0, 1)), MAX_LAYERS)),
    "id2label": optional(mapping_of(text, 10_000)),
    "label2id": optional(mapping_of(whole(0, 10_000), 10_000)),
    "num_labels": whole(1, 10_000),
    **TOKEN_IDS,
}

_ROPE: dict[str, Rule] = {
    **_rules(text, "rope_type", "type"),
    "rope_theta": real(1, 1e15, above=True),
    **_rules(optional(_POSITIVE), "factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    **_rules(optional(_POSITIVE), "beta_fast", "beta_slow"),
    **_rules(optional(real(0, 1e6)), "mscale", "mscale_all_dim"),
    "partial_rotary_factor": real(0, 1, above=True),
    "original_max_position_embeddings": optional(_POSITIONS),
    **_rules(optional(list_of(_POSITIVE, 1 << 14)), "short_factor", "long_factor"),
    **_rules(optional(_POSITIVE), "alpha", "llama_4_scaling_beta"),
    "truncate": flag,
}

_PARTS = ("text_config", "vision_config")
"""Configurations inside one, which have none inside."""

_MPT_ATTENTION: dict[str, Rule] = {
    **_rules(text, "attn_type"),
    **_rules(flag, "alibi"),
    "alibi_bias_max": _POSITIVE,
    **_rules(optional(_POSITIVE), "softmax_scale", "clip_qkv"),
}

GENERATION: dict[str, Rule] = {
    **TOKEN_IDS,
    **_rules(optional(real(0, 1e9)), "temperature", "top_p", "min_p", "repetition_penalty", "typical_p"),
    **_rules(optional(whole(0, (1 << 31) - 1)), "top_k", "max_length", "max_new_tokens", "num_beams"),
    **_rules(optional(flag), "do_sample", "use_cache"),
    **_rules(optional(text), "transformers_version"),
}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """A `config.json` before transformers or this project makes anything from it.

    Raises:
      UserError: with the path, every field whose value is not allowed, and what is.
    """
    for name in config:
        if name.startswith("__") or callable(getattr(PreTrainedConfig, name, None)):
            raise UserError(f"{path}: {show(name)} is no field of a configuration")
    check_fields(path, config, CONFIG)
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(path, name, config.get(name))
    attention = config.get("attn_config")
    if attention is not None:
        _require_object(path, "attn_config", attention)
        check_fields(path, attention, _MPT_ATTENTION, group="attn_config.")
    if config.get("quantization_config") is not None:
        _require_object(path, "quantization_config", config["quantization_config"])
    for name in _PARTS:
        if config.get(name) is not None:
            _require_object(path, name, config[name])
            part = {key: value for key, value in config[name].items() if key not in _PARTS}
            check_config(Path(f"{path}: {name}"), part)
    if "attention_types" in config:
        _check_attention_types(path, config["attention_types"])


def check_generation_config(path: Path, config: Mapping[str, Any]) -> None:
    """A `generation_config.json`, of which token ids are used and all is handed on."""
    check_fields(path, config, GENERATION)


def _check_rope(path: Path, name: str, value: Any) -> None:
    """One kind of rotary positions, or one for each type of layer."""
    if value is None:
        return
    _require_object(path, name, value)
    if value and all(isinstance(inner, dict) for inner in value.values()):
        for kind, inner in value.items():
            check_fields(path, inner, _ROPE, group=f"{name}.{kind}.")
    else:
        check_fields(path, value, _ROPE, group=f"{name}.")
        low, high = value.get("low_freq_factor"), value.get("high_freq_factor")
        if low is not None and high is not None and not low < high:
            raise UserError(
                f"{path}: {name}.high_freq_factor is {high}; allowed is above low_freq_factor, {low}"
            )


def _check_attention_types(path: Path, value: Any) -> None:
    """GPT-Neo's list of [[types], repetitions]."""
    total = 0
    parts: list[Any] = value if isinstance(value, list) and len(value) <= MAX_LAYERS else [None]
    for part in parts:
        fits = isinstance(part, list) and len(part) == 2 and list_of(text, MAX_LAYERS)(part[0]) is None
        if fits and _LAYERS(part[1]) is None:
            total += len(part[0]) * part[1]
        else:
            total = MAX_LAYERS + 1
    if total > MAX_LAYERS:
        raise UserError(
            f"{path}: attention_types is {show(value)}; allowed is a list of [[types], repetitions] for at "
            f"most {MAX_LAYERS} layers"
        )


def _require_object(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {show(value)}; allowed is an object, or null")
