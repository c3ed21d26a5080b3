"""What configurations of GPT-2's descendants mean: layer norms, biases, learned positions or ALiBi."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from transformers import PreTrainedConfig

from dpo.huggingface.configuration_fields import act, head_dim_of, neutral, rope_of
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder_config import Alibi, DecoderConfig
from dpo.outcomes import UserError


def stablelm(hf: PreTrainedConfig) -> DecoderConfig:
    """Layer norms, rotary positions, a gated MLP."""
    return neutral(
        hf,
        hf.max_position_embeddings,
        activation=act(hf.hidden_act),
        num_kv_heads=hf.num_key_value_heads,
        intermediate_size=hf.intermediate_size,
        gated_mlp=True,
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        residual="parallel_shared" if hf.use_parallel_residual else "sequential",
        qk_norm="per_head" if hf.qk_layernorm else "none",
        qkv_bias=hf.use_qkv_bias,
        output_bias=False,
        mlp_bias=False,
        position="rotary",
        ropes=(rope_of(hf, hf.rope_parameters, head_dim_of(hf)),),
    )


def _classic(hf: PreTrainedConfig, max_positions: int, **choices: Any) -> DecoderConfig:
    """GPT-2's skeleton: layer norms, biases, learned positions, a plain MLP."""
    fields: dict[str, Any] = {
        "gated_mlp": False,
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "position": "learned",
    }
    return neutral(hf, max_positions, **fields | choices)


def gpt2(hf: PreTrainedConfig) -> DecoderConfig:
    """GPT-2's own configuration."""
    return _classic(
        hf,
        hf.max_position_embeddings,
        activation=act(hf.activation_function),
        intermediate_size=hf.n_inner or 4 * hf.hidden_size,
        norm_eps=hf.layer_norm_epsilon,
    )


def gpt_neo(hf: PreTrainedConfig) -> DecoderConfig:
    """Unscaled scores, and windows in some layers."""
    windows = {"global": NO_WINDOW, "local": hf.window_size}
    return _classic(
        hf,
        hf.max_position_embeddings,
        activation=act(hf.activation_function),
        intermediate_size=hf.intermediate_size or 4 * hf.hidden_size,
        norm_eps=hf.layer_norm_epsilon,
        qkv_bias=False,
        attention_scale=1.0,
        windows=tuple(windows[kind] for kind in hf.attention_layers),
    )


def gpt_neox(hf: PreTrainedConfig) -> DecoderConfig:
    """Rotary positions, attention and MLP in parallel."""
    return _classic(
        hf,
        hf.max_position_embeddings,
        activation=act(hf.hidden_act),
        intermediate_size=hf.intermediate_size,
        norm_eps=hf.layer_norm_eps,
        residual="parallel" if hf.use_parallel_residual else "sequential",
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        position="rotary",
        ropes=(rope_of(hf, hf.rope_parameters, head_dim_of(hf)),),
    )


def opt(hf: PreTrainedConfig) -> DecoderConfig:
    """Learned positions from row 2."""
    if hf.word_embed_proj_dim != hf.hidden_size:
        raise UserError(
            f"word_embed_proj_dim is {hf.word_embed_proj_dim}; supported: hidden_size, {hf.hidden_size}"
        )
    return _classic(
        hf,
        hf.max_position_embeddings,
        activation=act(hf.activation_function),
        intermediate_size=hf.ffn_dim,
        norm_eps=1e-5,  # torch's LayerNorm, the configuration has no field for it
        qkv_bias=hf.enable_bias,
        output_bias=hf.enable_bias,
        mlp_bias=hf.enable_bias,
        position_offset=2,
    )


def falcon(hf: PreTrainedConfig) -> DecoderConfig:
    """Falcon's three layouts: alone, multi-query, 40B's."""
    if hf.new_decoder_architecture and not hf.parallel_attn:
        raise UserError("new_decoder_architecture without parallel_attn is not supported")
    heads, head_dim = hf.num_attention_heads, hf.hidden_size // hf.num_attention_heads
    two_norms = hf.new_decoder_architecture and hf.num_ln_in_parallel_attn in (None, 2)
    parallel = "parallel" if two_norms else "parallel_shared"
    slopes = tuple(_bfloat16(slope) for slope in alibi_slopes(heads))
    return _classic(
        hf,
        hf.max_position_embeddings,
        activation=act(hf.activation),
        num_kv_heads=hf.num_kv_heads if hf.new_decoder_architecture or not hf.multi_query else 1,
        intermediate_size=hf.ffn_hidden_size,
        norm_eps=hf.layer_norm_epsilon,
        residual=parallel if hf.parallel_attn else "sequential",
        qkv_bias=hf.bias,
        output_bias=hf.bias,
        mlp_bias=hf.bias,
        position="alibi" if hf.alibi else "rotary",
        alibi=Alibi(slopes, scale=head_dim**-0.5, bfloat16=True) if hf.alibi else None,
        ropes=() if hf.alibi else (rope_of(hf, hf.rope_parameters, head_dim),),
    )


def mpt(hf: PreTrainedConfig) -> DecoderConfig:
    """ALiBi, no biases."""
    attention = hf.attn_config
    heads, head_dim = hf.num_attention_heads, hf.hidden_size // hf.num_attention_heads
    for name, allowed in (("attn_type", "multihead_attention"), ("clip_qkv", None), ("alibi", True)):
        if getattr(attention, name) != allowed:
            raise UserError(f"attn_config.{name} is {getattr(attention, name)!r}; supported: {allowed!r}")
    return _classic(
        hf,
        hf.max_seq_len,
        activation="gelu",  # the modelling code's own; the configuration has no field for it
        intermediate_size=hf.expansion_ratio * hf.hidden_size,
        norm="layer_no_bias",
        norm_eps=hf.layer_norm_epsilon,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        position="alibi",
        alibi=Alibi(_mpt_slopes(heads, attention.alibi_bias_max), scale=1.0, bfloat16=False),
        attention_scale=attention.softmax_scale or head_dim**-0.5,
    )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8h/H) for a power of two; the missing heads take every other slope of twice as many."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    more = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * (num_heads - power), 2)]
    return tuple(slopes + more)


def _mpt_slopes(num_heads: int, bias_max: int) -> tuple[float, ...]:
    """MPT takes them from the next power of two instead, odd ones first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-bias_max * (head + 1) / power) for head in range(power)]
    return tuple(slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


def _bfloat16(value: float) -> float:
    return float(np.asarray(value, ml_dtypes.bfloat16))
