"""Model families: what a Hugging Face configuration means for the decoder.

A family is one row of `FAMILIES`: which values of its configuration are supported, what they mean as a
`DecoderConfig`, and its table of weight names. Nothing else in the package knows a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from transformers import PreTrainedConfig

from dpo.huggingface.weight_names import (
    GEMMA2_RULES,
    GPT2_RULES,
    GPT_NEO_RULES,
    GPT_NEOX_RULES,
    HEAD_NORM_RULES,
    LLAMA_RULES,
    MPT_RULES,
    OLMO2_RULES,
    OPT_RULES,
    PHI3_RULES,
    STABLELM_RULES,
    Rule,
    falcon_rules,
)
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder_config import Alibi, DecoderConfig
from dpo.models.rotary import Rope, make_rope, no_rope
from dpo.outcomes import UserError


class Family(NamedTuple):
    """One row of the table."""

    architecture: str
    """Class name in `config.json`."""
    prefix: str
    """What every tensor name but the output head's begins with; some checkpoints leave it out."""
    configure: Callable[[PreTrainedConfig], dict[str, Any]]
    """The configuration as fields of `DecoderConfig`."""
    rules: tuple[Rule, ...] | Callable[[DecoderConfig], tuple[Rule, ...]]
    allowed: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012
    """Values of configuration fields for which the decoder computes the same as transformers."""
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Patterns of tensors that are no parameters."""


def decoder_config(hf: PreTrainedConfig) -> DecoderConfig:
    """Translate a configuration; one `ValueError` lists everything in it that is not supported."""
    family = find_family(hf.model_type)
    problems = [
        f"{name} is {getattr(hf, name)!r}; supported: {', '.join(map(repr, values))}"
        for name, values in family.allowed.items()
        if getattr(hf, name) not in values
    ]
    if not problems:
        try:
            return DecoderConfig(**family.configure(hf))
        except ValueError as error:
            problems = [str(error)]
    raise UserError(f"unsupported {hf.model_type} configuration:\n  " + "\n  ".join(problems))


def find_family(model_type: str) -> Family:
    """The family of a configuration's `model_type`; `ValueError` lists those there are."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def classifier_architecture(model_type: str) -> str | None:
    """Class name of the sequence classifier on a family's decoder; None where transformers has none."""
    stem = find_family(model_type).architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return _CLASSIFIERS.get(model_type, f"{stem}ForSequenceClassification")


def _neutral(hf: PreTrainedConfig, max_positions: int) -> dict[str, Any]:
    """The choices that most families leave alone, and the sizes that all name alike."""
    layers, heads = hf.num_hidden_layers, hf.num_attention_heads
    # transformers' own rule: some configurations have the field, and any may carry it in its JSON
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "residual": "sequential",
        "pre_norm": True,
        "post_norm": False,
        "qk_norm": "none",
        "position_offset": 0,
        "max_positions": max_positions,
        "alibi": None,
        "ropes": (),
        "layer_rope": (0,) * layers,
        "windows": (NO_WINDOW,) * layers,
        "attention_scale": head_dim**-0.5,
        "attention_softcap": None,
        "logit_softcap": None,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
        "tie_embeddings": hf.tie_word_embeddings,
    }


def _rope(hf: PreTrainedConfig, parameters: dict[str, Any], head_dim: int) -> Rope:
    return make_rope(parameters, head_dim, hf.max_position_embeddings)


def _llama(hf: PreTrainedConfig, **choices: Any) -> dict[str, Any]:
    """RMS norms, rotary positions, grouped queries, gated MLP; `choices` are where a family differs."""
    fields = _neutral(hf, hf.max_position_embeddings)
    if "ropes" not in choices:
        choices["ropes"] = (_rope(hf, hf.rope_parameters, fields["head_dim"]),)
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


def _llama_family(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(hf, **_act(hf.hidden_act), **_biases(hf), mlp_bias=hf.mlp_bias)


def _mistral(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(hf, **_act(hf.hidden_act), windows=_uniform_windows(hf))


def _qwen2(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(hf, **_act(hf.hidden_act), qkv_bias=True, windows=_windows(hf))


def _qwen3(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(hf, **_act(hf.hidden_act), **_biases(hf), qk_norm="head", windows=_windows(hf))


def _smollm3(hf: PreTrainedConfig) -> dict[str, Any]:
    fields = _llama_family(hf)
    rope = fields["ropes"][0]
    layer_rope = tuple(0 if has_rope else 1 for has_rope in hf.no_rope_layers)
    return {**fields, "ropes": (rope, no_rope(rope)), "layer_rope": layer_rope, "windows": _windows(hf)}


def _gemma(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(
        hf,
        **_act(hf.hidden_act),
        **_biases(hf),
        norm="rms_offset",
        embedding_scale=float(hf.hidden_size**0.5),
    )


def _gemma2(hf: PreTrainedConfig, **choices: Any) -> dict[str, Any]:
    return _llama(
        hf,
        **_act(hf.hidden_activation),
        **_biases(hf),
        norm="rms_offset",
        post_norm=True,
        embedding_scale=float(hf.hidden_size**0.5),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=_float(hf.attn_logit_softcapping),
        logit_softcap=_float(hf.final_logit_softcapping),
        windows=_windows(hf),
        **choices,
    )


def _gemma3(hf: PreTrainedConfig) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    return _gemma2(
        hf,
        qk_norm="head",
        ropes=tuple(_rope(hf, hf.rope_parameters[kind], hf.head_dim) for kind in kinds),
        layer_rope=tuple(kinds.index(kind) for kind in hf.layer_types),
    )


def _phi3(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(hf, **_act(hf.hidden_act), windows=_uniform_windows(hf))


def _olmo2(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(
        hf, **_act(hf.hidden_act), **_biases(hf), qk_norm="all_heads", pre_norm=False, post_norm=True
    )


def _granite(hf: PreTrainedConfig) -> dict[str, Any]:
    return _llama(
        hf,
        **_act(hf.hidden_act),
        **_biases(hf),
        mlp_bias=hf.mlp_bias,
        attention_scale=float(hf.attention_multiplier),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logit_scale=1 / hf.logits_scaling,
    )


def _stablelm(hf: PreTrainedConfig) -> dict[str, Any]:
    fields = _neutral(hf, hf.max_position_embeddings)
    return {
        **fields,
        **_act(hf.hidden_act),
        "num_kv_heads": hf.num_key_value_heads,
        "intermediate_size": hf.intermediate_size,
        "gated_mlp": True,
        "norm": "layer",
        "norm_eps": hf.layer_norm_eps,
        "residual": "parallel_shared" if hf.use_parallel_residual else "sequential",
        "qk_norm": "per_head" if hf.qk_layernorm else "none",
        "qkv_bias": hf.use_qkv_bias,
        "output_bias": False,
        "mlp_bias": False,
        "position": "rotary",
        "ropes": (_rope(hf, hf.rope_parameters, fields["head_dim"]),),
    }


def _classic(hf: PreTrainedConfig, max_positions: int, **choices: Any) -> dict[str, Any]:
    """GPT-2's skeleton: layer norms, biases, learned positions, a plain MLP."""
    return {
        **_neutral(hf, max_positions),
        "gated_mlp": False,
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "position": "learned",
        **choices,
    }


def _gpt2(hf: PreTrainedConfig) -> dict[str, Any]:
    return _classic(
        hf,
        hf.max_position_embeddings,
        **_act(hf.activation_function),
        intermediate_size=hf.n_inner or 4 * hf.hidden_size,
        norm_eps=hf.layer_norm_epsilon,
    )


def _gpt_neo(hf: PreTrainedConfig) -> dict[str, Any]:
    windows = {"global": NO_WINDOW, "local": hf.window_size}
    return _classic(
        hf,
        hf.max_position_embeddings,
        **_act(hf.activation_function),
        intermediate_size=hf.intermediate_size or 4 * hf.hidden_size,
        norm_eps=hf.layer_norm_epsilon,
        qkv_bias=False,
        attention_scale=1.0,
        windows=tuple(windows[kind] for kind in hf.attention_layers),
    )


def _gpt_neox(hf: PreTrainedConfig) -> dict[str, Any]:
    fields = _classic(
        hf,
        hf.max_position_embeddings,
        **_act(hf.hidden_act),
        intermediate_size=hf.intermediate_size,
        norm_eps=hf.layer_norm_eps,
        residual="parallel" if hf.use_parallel_residual else "sequential",
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        position="rotary",
    )
    return {**fields, "ropes": (_rope(hf, hf.rope_parameters, fields["head_dim"]),)}


def _opt(hf: PreTrainedConfig) -> dict[str, Any]:
    if hf.word_embed_proj_dim != hf.hidden_size:
        raise UserError(
            f"word_embed_proj_dim is {hf.word_embed_proj_dim}; supported: hidden_size, {hf.hidden_size}"
        )
    return _classic(
        hf,
        hf.max_position_embeddings,
        **_act(hf.activation_function),
        intermediate_size=hf.ffn_dim,
        norm_eps=1e-5,  # torch's LayerNorm, the configuration has no field for it
        qkv_bias=hf.enable_bias,
        output_bias=hf.enable_bias,
        mlp_bias=hf.enable_bias,
        position_offset=2,
    )


def _falcon(hf: PreTrainedConfig) -> dict[str, Any]:
    if hf.new_decoder_architecture and not hf.parallel_attn:
        raise UserError("new_decoder_architecture without parallel_attn is not supported")
    heads, head_dim = hf.num_attention_heads, hf.hidden_size // hf.num_attention_heads
    two_norms = hf.new_decoder_architecture and hf.num_ln_in_parallel_attn in (None, 2)
    parallel = "parallel" if two_norms else "parallel_shared"
    slopes = tuple(_bfloat16(slope) for slope in alibi_slopes(heads))
    return _classic(
        hf,
        hf.max_position_embeddings,
        **_act(hf.activation),
        num_kv_heads=hf.num_kv_heads if hf.new_decoder_architecture or not hf.multi_query else 1,
        intermediate_size=hf.ffn_hidden_size,
        norm_eps=hf.layer_norm_epsilon,
        residual=parallel if hf.parallel_attn else "sequential",
        qkv_bias=hf.bias,
        output_bias=hf.bias,
        mlp_bias=hf.bias,
        position="alibi" if hf.alibi else "rotary",
        alibi=Alibi(slopes, scale=head_dim**-0.5, bfloat16=True) if hf.alibi else None,
        ropes=() if hf.alibi else (_rope(hf, hf.rope_parameters, head_dim),),
    )


def _mpt(hf: PreTrainedConfig) -> dict[str, Any]:
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


def _act(name: str) -> dict[str, Any]:
    if name not in ACTIVATIONS:
        raise UserError(f"activation is {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return {"activation": ACTIVATIONS[name]}


def _biases(hf: PreTrainedConfig) -> dict[str, Any]:
    return {"qkv_bias": hf.attention_bias, "output_bias": hf.attention_bias}


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _uniform_windows(hf: PreTrainedConfig) -> tuple[int, ...]:
    return (hf.sliding_window or NO_WINDOW,) * hf.num_hidden_layers


def _windows(hf: PreTrainedConfig) -> tuple[int, ...]:
    kinds = {"full_attention": NO_WINDOW, "sliding_attention": hf.sliding_window}
    unknown = set(hf.layer_types) - set(kinds)
    if unknown:
        raise UserError(f"layer_types has {', '.join(sorted(unknown))}; supported: {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in hf.layer_types)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's names of activations → `DecoderConfig.activation`."""


_CAUSAL = {"use_bidirectional_attention": (None, False)}
_BUFFERS = (
    r"\.rotary_emb\.inv_freq$",
    r"\.attn\.(attention\.)?(masked_)?bias$",
    r"\.attention\.(masked_)?bias$",
)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "model.", _llama_family, LLAMA_RULES),
    "mistral": Family("MistralForCausalLM", "model.", _mistral, LLAMA_RULES),
    "qwen2": Family("Qwen2ForCausalLM", "model.", _qwen2, LLAMA_RULES),
    "qwen3": Family("Qwen3ForCausalLM", "model.", _qwen3, (*LLAMA_RULES, *HEAD_NORM_RULES)),
    "smollm3": Family("SmolLM3ForCausalLM", "model.", _smollm3, LLAMA_RULES),
    "gemma": Family("GemmaForCausalLM", "model.", _gemma, LLAMA_RULES, _CAUSAL),
    "gemma2": Family("Gemma2ForCausalLM", "model.", _gemma2, GEMMA2_RULES, _CAUSAL),
    "gemma3_text": Family("Gemma3ForCausalLM", "model.", _gemma3, (*GEMMA2_RULES, *HEAD_NORM_RULES), _CAUSAL),
    "phi3": Family("Phi3ForCausalLM", "model.", _phi3, PHI3_RULES),
    "olmo2": Family("Olmo2ForCausalLM", "model.", _olmo2, OLMO2_RULES),
    "granite": Family("GraniteForCausalLM", "model.", _granite, LLAMA_RULES),
    "stablelm": Family("StableLmForCausalLM", "model.", _stablelm, STABLELM_RULES),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        _gpt2,
        GPT2_RULES,
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        _BUFFERS,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", _gpt_neox, GPT_NEOX_RULES, {}, _BUFFERS),
    "gpt_neo": Family("GPTNeoForCausalLM", "transformer.", _gpt_neo, GPT_NEO_RULES, {}, _BUFFERS),
    "opt": Family(
        "OPTForCausalLM",
        "model.",
        _opt,
        OPT_RULES,
        {
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
    ),
    "falcon": Family("FalconForCausalLM", "transformer.", _falcon, falcon_rules),
    "mpt": Family("MptForCausalLM", "transformer.", _mpt, MPT_RULES, {"expansion_ratio": (4,)}),
}
"""Every supported `model_type`."""

_CLASSIFIERS = {"gemma3_text": "Gemma3TextForSequenceClassification", "granite": None}
"""Where the name is not the causal model's with another ending."""
