"""What configurations of Llama's descendants mean: RMS norms, rotary positions, grouped queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

from transformers import PreTrainedConfig

from dpo.huggingface.configuration_fields import (
    act,
    biases,
    head_dim_of,
    layer_windows,
    neutral,
    optional_float,
    rope_of,
    uniform_windows,
)
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder_config import DecoderConfig, DeltaRule, GlobalHeads, LayerKind, QueryGrowth
from dpo.models.rotary import Rope, no_rope, reversed_rope
from dpo.outcomes import UserError


class _TypedRopes(TypedDict):
    """Two of `DecoderConfig`'s fields."""

    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]


def _llama(hf: PreTrainedConfig, **choices: Any) -> DecoderConfig:
    """RMS norms, rotary positions, grouped queries, gated MLP; `choices` are where a family differs."""
    if "norm_eps" not in choices:
        choices["norm_eps"] = hf.rms_norm_eps
    if "ropes" not in choices:
        choices["ropes"] = (rope_of(hf, hf.rope_parameters, head_dim_of(hf)),)
    fields: dict[str, Any] = {
        "num_kv_heads": hf.num_key_value_heads,
        "intermediate_size": hf.intermediate_size,
        "gated_mlp": True,
        "norm": "rms",
        "position": "rotary",
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
    }
    return neutral(hf, hf.max_position_embeddings, **fields | choices)


def llama_family(hf: PreTrainedConfig) -> DecoderConfig:
    """Llama's own configuration."""
    return _llama(hf, activation=act(hf.hidden_act), **biases(hf), mlp_bias=hf.mlp_bias)


def mistral(hf: PreTrainedConfig) -> DecoderConfig:
    """One window for all layers."""
    return _llama(hf, activation=act(hf.hidden_act), windows=uniform_windows(hf))


def qwen2(hf: PreTrainedConfig) -> DecoderConfig:
    """Biases of queries, keys and values."""
    return _llama(hf, activation=act(hf.hidden_act), qkv_bias=True, windows=layer_windows(hf))


def qwen3(hf: PreTrainedConfig) -> DecoderConfig:
    """Norms of the heads of queries and keys."""
    return _llama(hf, activation=act(hf.hidden_act), **biases(hf), qk_norm="head", windows=layer_windows(hf))


def smollm3(hf: PreTrainedConfig) -> DecoderConfig:
    """Some layers have no positions."""
    config = llama_family(hf)
    rope = config.ropes[0]
    layer_rope = tuple(0 if has_rope else 1 for has_rope in hf.no_rope_layers)
    ropes = (rope, no_rope(rope))
    return replace(config, ropes=ropes, layer_rope=layer_rope, windows=layer_windows(hf))


def gemma(hf: PreTrainedConfig) -> DecoderConfig:
    """Norms that multiply by 1 + scale, scaled embeddings."""
    return _llama(
        hf,
        activation=act(hf.hidden_act),
        **biases(hf),
        norm="rms_offset",
        embedding_scale=float(hf.hidden_size**0.5),
    )


def gemma2(hf: PreTrainedConfig, **choices: Any) -> DecoderConfig:
    """Norms of outputs, soft-capping, windows in turn."""
    return _llama(
        hf,
        activation=act(hf.hidden_activation),
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


def gemma3(hf: PreTrainedConfig) -> DecoderConfig:
    """Two rotations, by the type of layer; scores are not capped, whatever the configuration says."""
    return replace(gemma2(hf, qk_norm="head", **_typed_ropes(hf)), attention_softcap=None)


def gemma4(hf: PreTrainedConfig) -> DecoderConfig:
    """Heads of another size, and one projection of keys and values, where a layer sees all before it.

    Its last layers may read the keys and values of others, and each layer a table of its own.
    """
    different = (hf.per_layer_attributes or set()) - {"head_dim", "num_key_value_heads"}
    if different:
        raise UserError(f"per_layer_config has {', '.join(sorted(different))}; supported: {_GEMMA4_SIZES}")
    beside = hf.hidden_size_per_layer_input or 0
    if beside and hf.vocab_size_per_layer_input != hf.vocab_size:
        raise UserError(
            f"vocab_size_per_layer_input is {hf.vocab_size_per_layer_input}; supported: vocab_size, "
            f"{hf.vocab_size}"
        )
    types = list(dict.fromkeys(hf.layer_types))
    sizes = {kind: hf.per_layer_config[kind] for kind in types}  # refuses those that differ within a type
    local = sizes.get("sliding_attention", hf.per_layer_config[0])
    wide = sizes.get("full_attention", local)
    reader_size = hf.intermediate_size * (2 if hf.use_double_wide_mlp else 1)
    return _llama(
        local,
        layer_kinds=_gemma4_kinds(hf),
        reader_intermediate_size=reader_size if hf.num_kv_shared_layers else 0,
        per_layer_size=beside,
        global_heads=GlobalHeads(wide.num_key_value_heads, wide.head_dim, hf.attention_k_eq_v),
        activation=act(hf.hidden_activation),
        **biases(hf),
        residual="sequential_scaled",
        post_norm=True,
        qk_norm="head",
        value_norm=True,
        embedding_scale=float(hf.hidden_size**0.5),
        attention_scale=1.0,
        logit_softcap=optional_float(hf.final_logit_softcapping),
        windows=layer_windows(hf),
        ropes=tuple(rope_of(hf, hf.rope_parameters[kind], sizes[kind].head_dim) for kind in types),
        layer_rope=tuple(types.index(kind) for kind in hf.layer_types),
    )


def _gemma4_kinds(hf: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """The last layers read keys and values of the last of their type before them, which are kept."""
    kinds = _kinds(hf, {"sliding_attention": "attention", "full_attention": "global"})
    first = max(hf.num_hidden_layers - hf.num_kv_shared_layers, 0)
    own, readers = list(kinds[:first]), kinds[first:]
    for kind in dict.fromkeys(readers):
        if kind not in own:
            raise UserError(
                f"num_kv_shared_layers is {hf.num_kv_shared_layers}; supported: at least one layer of each "
                "type before those that share"
            )
        own[len(own) - 1 - own[::-1].index(kind)] = _KEPT[kind]
    return (*own, *(_READER[kind] for kind in readers))


_KEPT: Mapping[LayerKind, LayerKind] = {"attention": "attention_kept", "global": "global_kept"}
_READER: Mapping[LayerKind, LayerKind] = {"attention": "attention_reader", "global": "global_reader"}
_GEMMA4_SIZES = "head_dim and num_key_value_heads, alike in all layers of a type"


def _typed_ropes(hf: PreTrainedConfig) -> _TypedRopes:
    """A rotation for each type of layer."""
    kinds = [kind for kind in ("full_attention", "sliding_attention") if kind in hf.layer_types]
    return {
        "ropes": tuple(rope_of(hf, hf.rope_parameters[kind], head_dim_of(hf)) for kind in kinds),
        "layer_rope": tuple(kinds.index(kind) if kind in kinds else 0 for kind in hf.layer_types),
    }


def phi3(hf: PreTrainedConfig) -> DecoderConfig:
    """Fused projections; LongRoPE and partial rotation are in the rotary parameters (Phi-4-mini)."""
    return _llama(hf, activation=act(hf.hidden_act), windows=uniform_windows(hf))


def olmo2(hf: PreTrainedConfig) -> DecoderConfig:
    """Norms of outputs only, and of all heads together."""
    return _olmo(hf)


def _olmo(hf: PreTrainedConfig, **choices: Any) -> DecoderConfig:
    return _llama(
        hf,
        activation=act(hf.hidden_act),
        **biases(hf),
        qk_norm="all_heads",
        pre_norm=False,
        post_norm=True,
        **choices,
    )


def granite(hf: PreTrainedConfig) -> DecoderConfig:
    """Multipliers of embeddings, residuals, scores and logits."""
    return _granite(hf, mlp_bias=hf.mlp_bias)


def _granite(hf: PreTrainedConfig, **choices: Any) -> DecoderConfig:
    return _llama(
        hf,
        activation=act(hf.hidden_act),
        **biases(hf),
        attention_scale=float(hf.attention_multiplier),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logit_scale=1 / hf.logits_scaling,
        **choices,
    )


def arcee(hf: PreTrainedConfig) -> DecoderConfig:
    """A plain MLP with the square of ReLU."""
    return replace(llama_family(hf), gated_mlp=False)


def seed_oss(hf: PreTrainedConfig) -> DecoderConfig:
    """A bias of the output projection that is chosen apart."""
    return replace(llama_family(hf), output_bias=hf.attention_out_bias)


def ministral(hf: PreTrainedConfig) -> DecoderConfig:
    """A window in some layers."""
    return _llama(hf, activation=act(hf.hidden_act), windows=layer_windows(hf))


def ministral3(hf: PreTrainedConfig) -> DecoderConfig:
    """Queries that grow with their position, as in Llama 4."""
    parameters = hf.rope_parameters
    beta = parameters.get("llama_4_scaling_beta")
    length = parameters.get("original_max_position_embeddings")
    if beta is None or length is None:
        raise UserError(
            "rope_parameters has no llama_4_scaling_beta or no original_max_position_embeddings; both are "
            "needed"
        )
    return replace(mistral(hf), query_growth=QueryGrowth(float(beta), int(length)))


def exaone4(hf: PreTrainedConfig) -> DecoderConfig:
    """Norms of outputs only; where some layers have a window, the others have no positions."""
    rope = rope_of(hf, hf.rope_parameters, head_dim_of(hf))
    has_none = [hf.sliding_window is not None and kind == "full_attention" for kind in hf.layer_types]
    return _llama(
        hf,
        activation=act(hf.hidden_act),
        qk_norm="head",
        pre_norm=False,
        post_norm=True,
        windows=layer_windows(hf),
        ropes=(rope, no_rope(rope)),
        layer_rope=tuple(map(int, has_none)),
    )


def olmo3(hf: PreTrainedConfig) -> DecoderConfig:
    """OLMo 2 with windows, and a rotation for each type of layer."""
    return _olmo(hf, windows=layer_windows(hf), **_typed_ropes(hf))


def hunyuan(hf: PreTrainedConfig) -> DecoderConfig:
    """Norms of queries and keys after they are turned, and a base stretched once for all lengths."""
    parameters, dim = hf.rope_parameters, head_dim_of(hf)
    alpha = parameters.get("alpha")
    if parameters["rope_type"] == "dynamic" and alpha:
        theta = parameters["rope_theta"] * alpha ** (dim / (dim - 2))
        parameters = {"rope_type": "default", "rope_theta": theta}
    return _llama(
        hf,
        activation=act(hf.hidden_act),
        **biases(hf),
        qk_norm="turned_head",
        ropes=(rope_of(hf, parameters, dim),),
    )


def ernie(hf: PreTrainedConfig) -> DecoderConfig:
    """Biases everywhere or nowhere; its interleaved rotation is in the order of its weights."""
    has_bias = bool(hf.use_bias)
    names = ("qkv_bias", "output_bias", "mlp_bias")
    return _llama(hf, activation=act(hf.hidden_act), **dict.fromkeys(names, has_bias))


def granite_hybrid(hf: PreTrainedConfig) -> DecoderConfig:
    """Granite 4's dense models: all layers attend, and the shared expert is the only one."""
    kinds = set(hf.layer_types)
    if kinds != {"full_attention"}:
        raise UserError(f"layer_types has {', '.join(sorted(kinds))}; supported: full_attention alone")
    turns = hf.position_embedding_type == "rope"
    placed = {} if turns else {"position": "none", "ropes": ()}
    return _granite(hf, **placed, intermediate_size=hf.shared_intermediate_size)


def nanochat(hf: PreTrainedConfig) -> DecoderConfig:
    """Norms without scales, one of the embeddings too; heads turn the other way, then are normed."""
    rope = rope_of(hf, hf.rope_parameters, head_dim_of(hf))
    return _llama(
        hf,
        activation=act(hf.hidden_act),
        **biases(hf),
        gated_mlp=False,
        norm="rms_unscaled",
        qk_norm="turned_head",
        embedding_norm=True,
        ropes=(reversed_rope(rope),),
        logit_softcap=optional_float(hf.final_logit_softcapping),
    )


def apertus(hf: PreTrainedConfig) -> DecoderConfig:
    """A plain MLP whose activation, xIELU, is learned; norms of the heads of queries and keys."""
    return _llama(hf, activation=act(hf.hidden_act), **biases(hf), gated_mlp=False, qk_norm="head")


def lfm2(hf: PreTrainedConfig) -> DecoderConfig:
    """Layers of attention among layers of gated short convolutions; norms of heads."""
    layers = _kinds(hf, {"full_attention": "attention", "conv": "convolution"})
    return _lfm(hf, layers, intermediate_size=_lfm2_intermediate_size(hf))


def lfm3(hf: PreTrainedConfig) -> DecoderConfig:
    """LFM2 with windows, a rotation for each type of layer, gates of heads, and norms of outputs."""
    kinds: dict[str, LayerKind] = {"full_attention": "attention", "sliding_attention": "attention"}
    return _lfm(
        hf,
        _kinds(hf, {**kinds, "conv": "convolution"}),
        **biases(hf),
        **_typed_ropes(hf),
        post_norm=hf.use_sandwich_norm,
        gated_attention="head" if hf.use_attention_gate else "none",
        windows=tuple(
            hf.sliding_window if kind == "sliding_attention" else NO_WINDOW for kind in hf.layer_types
        ),
    )


def _lfm(hf: PreTrainedConfig, layers: tuple[LayerKind, ...], **choices: Any) -> DecoderConfig:
    has_convolutions = "convolution" in layers
    return _llama(
        hf,
        layer_kinds=layers,
        convolution_width=hf.conv_L_cache if has_convolutions else 0,
        convolution_bias=has_convolutions and hf.conv_bias,
        activation="silu",
        norm_eps=hf.norm_eps,
        qk_norm="head",
        **choices,
    )


def _kinds(hf: PreTrainedConfig, kinds: Mapping[str, LayerKind]) -> tuple[LayerKind, ...]:
    """What mixes the positions in each layer, by the configuration's name of it."""
    unknown = set(hf.layer_types) - set(kinds)
    if unknown:
        raise UserError(f"layer_types has {', '.join(sorted(unknown))}; supported: {', '.join(kinds)}")
    return tuple(kinds[name] for name in hf.layer_types)


def qwen35(hf: PreTrainedConfig) -> DecoderConfig:
    """Layers of gated attention among layers of linear attention by the gated delta rule."""
    layers = _kinds(hf, {"full_attention": "attention", "linear_attention": "delta"})
    has_delta = "delta" in layers
    if has_delta and hf.linear_num_value_heads % hf.linear_num_key_heads:
        raise UserError(
            f"linear_num_value_heads is {hf.linear_num_value_heads}; supported: a multiple of "
            f"linear_num_key_heads, {hf.linear_num_key_heads}"
        )
    sizes = DeltaRule(
        num_key_heads=hf.linear_num_key_heads,
        num_value_heads=hf.linear_num_value_heads,
        key_dim=hf.linear_key_head_dim,
        value_dim=hf.linear_value_head_dim,
    )
    return _llama(
        hf,
        layer_kinds=layers,
        convolution_width=hf.linear_conv_kernel_dim if has_delta else 0,
        delta=sizes if has_delta else None,
        activation=act(hf.hidden_act),
        **biases(hf),
        norm="rms_offset",
        qk_norm="head",
        gated_attention="channel",
    )


def qwen3_next(hf: PreTrainedConfig) -> DecoderConfig:
    """Qwen3-Next without experts: its layers are Qwen3.5's, with projections fused by key head."""
    sparse = [
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in hf.mlp_only_layers
        and hf.num_experts > 0
        and (layer + 1) % hf.decoder_sparse_step == 0
    ]
    if sparse:
        raise UserError(
            f"layers {', '.join(map(str, sparse[:8]))} have experts (num_experts is {hf.num_experts}); "
            "supported: num_experts 0, or all layers in mlp_only_layers"
        )
    return qwen35(hf)


def _lfm2_intermediate_size(hf: PreTrainedConfig) -> int:
    """Two thirds of what is configured, times a factor, rounded up to a multiple."""
    if not hf.block_auto_adjust_ff_dim:
        return hf.intermediate_size
    size = int(2 * hf.intermediate_size / 3)
    if hf.block_ffn_dim_multiplier is None:
        return size
    multiple = hf.block_multiple_of
    return -(-int(hf.block_ffn_dim_multiplier * size) // multiple) * multiple
