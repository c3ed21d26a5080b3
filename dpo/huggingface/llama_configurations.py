"""What configurations of Llama's descendants mean: RMS norms, rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dpo.huggingface.configuration_fields import (
    act,
    biases,
    layer_windows,
    neutral,
    optional_float,
    rope_of,
    uniform_windows,
)
from dpo.models.decoder_config import QueryGrowth
from dpo.models.rotary import no_rope, reversed_rope
from dpo.outcomes import UserError


def _llama(hf: PreTrainedConfig, **choices: Any) -> dict[str, Any]:
    """RMS norms, rotary positions, grouped queries, gated MLP; `choices` are where a family differs."""
    fields = neutral(hf, hf.max_position_embeddings)
    if "ropes" not in choices:
        choices["ropes"] = (rope_of(hf, hf.rope_parameters, fields["head_dim"]),)
    return {
        **fields,
        "num_kv_heads": hf.num_key_value_heads,
        "intermediate_size": hf.intermediate_size,
        "gated_mlp": True,
        "norm": "rms",
        "norm_eps": hf.rms_norm_eps,
        "position": "rotary",
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        **choices,
    }


def llama_family(hf: PreTrainedConfig) -> dict[str, Any]:
    """Llama's own configuration."""
    return _llama(hf, **act(hf.hidden_act), **biases(hf), mlp_bias=hf.mlp_bias)


def mistral(hf: PreTrainedConfig) -> dict[str, Any]:
    """One window for all layers."""
    return _llama(hf, **act(hf.hidden_act), windows=uniform_windows(hf))


def qwen2(hf: PreTrainedConfig) -> dict[str, Any]:
    """Biases of queries, keys and values."""
    return _llama(hf, **act(hf.hidden_act), qkv_bias=True, windows=layer_windows(hf))


def qwen3(hf: PreTrainedConfig) -> dict[str, Any]:
    """Norms of the heads of queries and keys."""
    return _llama(hf, **act(hf.hidden_act), **biases(hf), qk_norm="head", windows=layer_windows(hf))


def smollm3(hf: PreTrainedConfig) -> dict[str, Any]:
    """Some layers have no positions."""
    fields = llama_family(hf)
    rope = fields["ropes"][0]
    layer_rope = tuple(0 if has_rope else 1 for has_rope in hf.no_rope_layers)
    return {**fields, "ropes": (rope, no_rope(rope)), "layer_rope": layer_rope, "windows": layer_windows(hf)}


def gemma(hf: PreTrainedConfig) -> dict[str, Any]:
    """Norms that multiply by 1 + scale, scaled embeddings."""
    return _llama(
        hf,
        **act(hf.hidden_act),
        **biases(hf),
        norm="rms_offset",
        embedding_scale=float(hf.hidden_size**0.5),
    )


def gemma2(hf: PreTrainedConfig, **choices: Any) -> dict[str, Any]:
    """Norms of outputs, soft-capping, windows in turn."""
    return _llama(
        hf,
        **act(hf.hidden_activation),
        **biases(hf),
        norm="rms_offset",
        post_norm=True,
        embedding_scale=float(hf.hidden_size**0.5),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=optional_float(hf.attn_logit_softcapping),
        logit_softcap=optional_float(hf.final_logit_softcapping),
        windows=layer_windows(hf),
        **choices,
    )


def gemma3(hf: PreTrainedConfig) -> dict[str, Any]:
    """Two rotations, by the type of layer."""
    return gemma2(hf, qk_norm="head", **_typed_ropes(hf))


def _typed_ropes(hf: PreTrainedConfig) -> dict[str, Any]:
    """A rotation for each type of layer."""
    kinds, head_dim = ("full_attention", "sliding_attention"), neutral(hf, 0)["head_dim"]
    return {
        "ropes": tuple(rope_of(hf, hf.rope_parameters[kind], head_dim) for kind in kinds),
        "layer_rope": tuple(kinds.index(kind) for kind in hf.layer_types),
    }


def phi3(hf: PreTrainedConfig) -> dict[str, Any]:
    """Fused projections; LongRoPE and partial rotation are in the rotary parameters (Phi-4-mini)."""
    return _llama(hf, **act(hf.hidden_act), windows=uniform_windows(hf))


def olmo2(hf: PreTrainedConfig) -> dict[str, Any]:
    """Norms of outputs only, and of all heads together."""
    return _olmo(hf)


def _olmo(hf: PreTrainedConfig, **choices: Any) -> dict[str, Any]:
    return _llama(
        hf,
        **act(hf.hidden_act),
        **biases(hf),
        qk_norm="all_heads",
        pre_norm=False,
        post_norm=True,
        **choices,
    )


def granite(hf: PreTrainedConfig) -> dict[str, Any]:
    """Multipliers of embeddings, residuals, scores and logits."""
    return _granite(hf, mlp_bias=hf.mlp_bias)


def _granite(hf: PreTrainedConfig, **choices: Any) -> dict[str, Any]:
    return _llama(
        hf,
        **act(hf.hidden_act),
        **biases(hf),
        attention_scale=float(hf.attention_multiplier),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logit_scale=1 / hf.logits_scaling,
        **choices,
    )


def arcee(hf: PreTrainedConfig) -> dict[str, Any]:
    """A plain MLP with the square of ReLU."""
    return llama_family(hf) | {"gated_mlp": False}


def seed_oss(hf: PreTrainedConfig) -> dict[str, Any]:
    """A bias of the output projection that is chosen apart."""
    return llama_family(hf) | {"output_bias": hf.attention_out_bias}


def ministral(hf: PreTrainedConfig) -> dict[str, Any]:
    """A window in some layers."""
    return _llama(hf, **act(hf.hidden_act), windows=layer_windows(hf))


def ministral3(hf: PreTrainedConfig) -> dict[str, Any]:
    """Queries that grow with their position, as in Llama 4."""
    parameters = hf.rope_parameters
    beta = parameters.get("llama_4_scaling_beta")
    length = parameters.get("original_max_position_embeddings")
    if beta is None or length is None:
        raise UserError(
            "rope_parameters has no llama_4_scaling_beta or no original_max_position_embeddings; both are "
            "needed"
        )
    return mistral(hf) | {"query_growth": QueryGrowth(float(beta), int(length))}


def exaone4(hf: PreTrainedConfig) -> dict[str, Any]:
    """Norms of outputs only; where some layers have a window, the others have no positions."""
    rope = rope_of(hf, hf.rope_parameters, neutral(hf, 0)["head_dim"])
    has_none = [hf.sliding_window is not None and kind == "full_attention" for kind in hf.layer_types]
    return _llama(
        hf,
        **act(hf.hidden_act),
        qk_norm="head",
        pre_norm=False,
        post_norm=True,
        windows=layer_windows(hf),
        ropes=(rope, no_rope(rope)),
        layer_rope=tuple(map(int, has_none)),
    )


def olmo3(hf: PreTrainedConfig) -> dict[str, Any]:
    """OLMo 2 with windows, and a rotation for each type of layer."""
    return _olmo(hf, windows=layer_windows(hf), **_typed_ropes(hf))


def hunyuan(hf: PreTrainedConfig) -> dict[str, Any]:
    """Norms of queries and keys after they are turned, and a base stretched once for all lengths."""
    fields, parameters = neutral(hf, 0), hf.rope_parameters
    alpha, dim = parameters.get("alpha"), fields["head_dim"]
    if parameters["rope_type"] == "dynamic" and alpha:
        theta = parameters["rope_theta"] * alpha ** (dim / (dim - 2))
        parameters = {"rope_type": "default", "rope_theta": theta}
    return _llama(
        hf,
        **act(hf.hidden_act),
        **biases(hf),
        qk_norm="turned_head",
        ropes=(rope_of(hf, parameters, dim),),
    )


def ernie(hf: PreTrainedConfig) -> dict[str, Any]:
    """Biases everywhere or nowhere; its interleaved rotation is in the order of its weights."""
    has_bias = bool(hf.use_bias)
    names = ("qkv_bias", "output_bias", "mlp_bias")
    return _llama(hf, **act(hf.hidden_act), **dict.fromkeys(names, has_bias))


def granite_hybrid(hf: PreTrainedConfig) -> dict[str, Any]:
    """Granite 4's dense models: all layers attend, and the shared expert is the only one."""
    kinds = set(hf.layer_types)
    if kinds != {"full_attention"}:
        raise UserError(f"layer_types has {', '.join(sorted(kinds))}; supported: full_attention alone")
    turns = hf.position_embedding_type == "rope"
    placed = {} if turns else {"position": "none", "ropes": ()}
    return _granite(hf, **placed) | {"intermediate_size": hf.shared_intermediate_size}


def nanochat(hf: PreTrainedConfig) -> dict[str, Any]:
    """Norms without scales, one of the embeddings too; heads turn the other way, then are normed."""
    rope = rope_of(hf, hf.rope_parameters, neutral(hf, 0)["head_dim"])
    return _llama(
        hf,
        **act(hf.hidden_act),
        **biases(hf),
        gated_mlp=False,
        norm="rms_unscaled",
        qk_norm="turned_head",
        embedding_norm=True,
        ropes=(reversed_rope(rope),),
        logit_softcap=optional_float(hf.final_logit_softcapping),
    )


def apertus(hf: PreTrainedConfig) -> dict[str, Any]:
    """A plain MLP whose activation, xIELU, is learned; norms of the heads of queries and keys."""
    return _llama(hf, **act(hf.hidden_act), **biases(hf), gated_mlp=False, qk_norm="head")
