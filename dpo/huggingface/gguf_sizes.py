"""What a GGUF file says of a decoder in numbers: sizes, rotation, and divisors of its frequencies."""

from __future__ import annotations

import numpy as np
from transformers import CONFIG_MAPPING

from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.gguf_changes import STILL
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder_config import DecoderConfig, split_kind
from dpo.outcomes import UserError


def size_fields(config: DecoderConfig, hf_config: JsonObject) -> JsonObject:
    """Numbers under the architecture's name."""
    is_rms = config.norm.startswith("rms")
    window = min(config.windows)
    has_granite_scales = hf_config["model_type"].startswith("granite")
    found: JsonObject = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.layer_norm_{'rms_' if is_rms else ''}epsilon": float(config.norm_eps),
        "attention.sliding_window": None if window == NO_WINDOW else window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "shortconv.l_cache": max(config.convolution_width, 1) if hf_config["model_type"] == "lfm2" else None,
        "use_parallel_residual": config.residual != "sequential"
        if hf_config["model_type"] == "stablelm"
        else None,
        "attention.scale": config.attention_scale if has_granite_scales else None,
        "embedding_scale": config.embedding_scale if has_granite_scales else None,
        "residual_scale": config.residual_scale if has_granite_scales else None,
        "logit_scale": 1 / config.logit_scale if has_granite_scales else None,
        **(_rotation(config, hf_config) if config.ropes else {}),
        **(_delta_rule(config) if config.delta is not None else {}),
        **(_two_sizes(config, hf_config) if config.global_heads is not None else {}),
    }
    return {key: value for key, value in found.items() if value is not None}


def _delta_rule(config: DecoderConfig) -> JsonObject:
    """Sizes of linear attention, and every how many layers there is attention."""
    delta = config.delta
    assert delta is not None
    if delta.key_dim != delta.value_dim:
        raise UserError(
            f"linear_key_head_dim is {delta.key_dim} and linear_value_head_dim {delta.value_dim}; llama.cpp "
            "computes the delta rule where they are equal"
        )
    attending = config.layers_of("attention")
    pairs = len(config.ropes[0].inv_freq)
    return {
        "ssm.conv_kernel": config.convolution_width,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.num_key_heads,
        "ssm.time_step_rank": delta.num_value_heads,
        "ssm.inner_size": delta.num_value_heads * delta.value_dim,
        "full_attention_interval": 1 + (attending[0] if attending else config.num_layers),
        # Pairs of channels by the axis of an image's position that turns them; of text all are equal.
        "rope.dimension_sections": [-(-pairs // 3), -(-(pairs - 1) // 3), pairs // 3, 0],
    }


def _two_sizes(config: DecoderConfig, hf_config: JsonObject) -> JsonObject:
    """Layers of sliding and of global attention, and those that read the keys and values of others."""
    wide, kinds = config.of_kind("global"), config.layer_kinds
    return {
        "feed_forward_length": [config.of_kind(kind).intermediate_size for kind in kinds],
        "attention.head_count_kv": [config.of_kind(kind).num_kv_heads for kind in kinds],
        "attention.key_length": wide.head_dim,
        "attention.value_length": wide.head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": hf_config["sliding_window"],
        "attention.sliding_window_pattern": [split_kind(kind)[0] == "attention" for kind in kinds],
        "attention.shared_kv_layers": sum(kind.endswith("_reader") for kind in kinds),
        "embedding_length_per_layer_input": config.per_layer_size,
        "final_logit_softcapping": config.logit_softcap or 0.0,
        "rope.dimension_count": wide.head_dim,
        "rope.dimension_count_swa": config.head_dim,
    }


def _kv_heads(config: DecoderConfig) -> int | list[int]:
    """One number, or one a layer with 0 for those that do not attend; of Qwen3.5 one number."""
    if config.is_uniform or config.delta is not None:
        return config.num_kv_heads
    return [config.num_kv_heads if kind == "attention" else 0 for kind in config.layer_kinds]


def _rotation(config: DecoderConfig, hf_config: JsonObject) -> JsonObject:
    """Base, channels that turn, and scaling by a rule; Llama 3's and LongRoPE's divisors are tensors."""
    rope = _rope_parameters(hf_config)
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    theta = float(rope["rope_theta"])
    if rope.get("alpha"):  # Hunyuan's stretch of the base, which the file has once and for all
        theta *= rope["alpha"] ** (config.head_dim / (config.head_dim - 2))
    found: JsonObject = {
        "rope.freq_base": theta,
        "rope.dimension_count": 2 * len(config.ropes[0].inv_freq),
        "rope.freq_base_swa": None if local is None else float(local["rope_theta"]),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = float(config.ropes[0].attention_factor)
    growth = config.query_growth
    if growth is not None:
        found["attention.temperature_scale"] = growth.beta
        magnitude = float(rope.get("mscale_all_dim") or 0.0) if rope.get("mscale") else 0.0
        found["rope.scaling.yarn_log_multiplier"] = magnitude
        for name in ("beta_fast", "beta_slow"):
            found[f"rope.scaling.yarn_{name}"] = None if rope.get(name) is None else float(rope[name])
    original = rope.get("original_max_position_embeddings")
    if (growth is not None or kind in ("yarn", "longrope", "llama3")) and original:
        found["rope.scaling.original_context_length"] = int(original)
    return found


def _rope_parameters(hf_config: JsonObject) -> JsonObject:
    return CONFIG_MAPPING[hf_config["model_type"]].from_dict(hf_config).rope_parameters


def rope_tensors(config: DecoderConfig, hf_config: JsonObject) -> dict[str, np.ndarray]:
    """Divisors of the frequencies."""
    if not config.ropes:
        return {}
    if config.global_heads is not None:
        layer = next(layer for layer, kind in enumerate(config.layer_kinds) if kind.startswith("global"))
        turns = np.asarray(config.ropes[config.layer_rope[layer]].inv_freq) != 0
        return {"rope_freqs.weight": np.where(turns, np.float32(1), STILL)}
    rope = _rope_parameters(hf_config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") == "llama3":
        n = len(config.ropes[0].inv_freq)
        plain = 1 / rope["rope_theta"] ** (np.arange(0, 2 * n, 2) / (2 * n))
        return {"rope_freqs.weight": (plain / np.asarray(config.ropes[0].inv_freq)).astype(np.float32)}
    return {}
