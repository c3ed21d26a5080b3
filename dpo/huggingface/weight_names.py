"""Which Hugging Face tensors hold which of our modules: one table of rules a family, read both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo.models.decoder_config import ATTENTION, DecoderConfig, DeltaRule


class Fusion(NamedTuple):
    """Several of our projections in one tensor, along its output (last) axis."""

    split: Callable[[np.ndarray, DecoderConfig], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]


class Rule(NamedTuple):
    """Our modules and the Hugging Face module that holds them; `{layer}` and `{head}` become leading axes."""

    ours: tuple[str, ...]
    theirs: str
    fusion: Fusion | None = None
    transposed: bool = True
    """Linear weights are stored [out, in], as torch's Linear does (GPT-2's Conv1D does not)."""
    module: str | None = None
    """The last part of the name of transformers' module, as adapters have it, where files have another."""

    def module_of(self, tensor: str) -> str:
        """The name of transformers' module of a tensor of this rule."""
        name = tensor.removesuffix(".weight")
        return name if self.module is None else f"{name.rpartition('.')[0]}.{self.module}"


class Spelling(NamedTuple):
    """How tensors of a text model are named in a model that has more."""

    body: str
    """What stands where the text model's own prefix does."""
    head: str
    """The same of its output head."""


SPELLINGS = (
    Spelling("model.language_model.", "lm_head."),
    Spelling("language_model.model.", "language_model.lm_head."),
    Spelling("model.", "lm_head."),
)
"""The names of transformers' modules first; then what other versions wrote. The first that fits is meant."""


def find_spelling(names: Iterable[str]) -> Spelling | None:
    """The spelling of tensors' names; None where they have no text model."""
    names = list(names)
    return next((each for each in SPELLINGS if any(name.startswith(each.body) for name in names)), None)


def _split_concatenated(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return np.split(tensor, [queries, queries + keys], axis=-1)


def _split_grouped(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    """Each key/value head comes with the query heads that read it: [q … q k v] for every one."""
    groups, size = config.num_kv_heads, config.num_heads // config.num_kv_heads
    parts = tensor.reshape(*tensor.shape[:-1], groups, size + 2, config.head_dim)
    split = np.split(parts, [size, size + 1], axis=-2)
    return [part.reshape(*tensor.shape[:-1], -1) for part in split]


def _join_grouped(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    lead = parts[0].shape[:-1]
    heads = [part.reshape(*lead, config.num_kv_heads, -1, config.head_dim) for part in parts]
    return np.concatenate(heads, axis=-2).reshape(*lead, -1)


def _join_concatenated(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


def _swapped(tensor: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """The channels of every head seen as two axes, which are swapped."""
    heads = tensor.reshape(*tensor.shape[:-1], -1, *axes)
    return heads.swapaxes(-1, -2).reshape(tensor.shape)


_CONCATENATED = Fusion(_split_concatenated, _join_concatenated)
_GROUPED = Fusion(_split_grouped, _join_grouped)
_INTERLEAVED = Fusion(
    lambda tensor, config: [_swapped(tensor, (config.head_dim // 2, 2))],
    lambda parts, config: _swapped(parts[0], (2, config.head_dim // 2)),
)
"""Heads whose channels 2j and 2j + 1 turn together, where ours are j and j + n."""
_HALVES = Fusion(lambda tensor, config: np.split(tensor, 2, axis=-1), _join_concatenated)

_PATHS = {
    name: f"layers.{parent}{name}"
    for parent, names in {
        "": ("input_layernorm", "attention_output_norm", "post_attention_layernorm", "mlp_output_norm"),
        "self_attn.": (
            "q_proj",
            "g_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "q_norm",
            "k_norm",
            "q_head_norm",
            "k_head_norm",
            "q_turned_norm",
            "k_turned_norm",
        ),
        "mlp.": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    }.items()
    for name in names
}
"""Last part of the path of one of our modules → the path."""
_QKV = (_PATHS["q_proj"], _PATHS["k_proj"], _PATHS["v_proj"])
_GATE_UP = (_PATHS["gate_proj"], _PATHS["up_proj"])


def _rules(at: str, **names: str) -> tuple[Rule, ...]:
    """Rules of unfused modules: the last part of our path = their module, under `at`."""
    return tuple(Rule((_PATHS.get(ours, ours),), at + theirs) for ours, theirs in names.items())


_LAYER = "model.layers.{layer}."
_ENDS = _rules("", embed_tokens="model.embed_tokens", norm="model.norm", lm_head="lm_head")
_PROJECTIONS = _rules(
    _LAYER + "self_attn.", q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", o_proj="o_proj"
)
_GATED_MLP = _rules(_LAYER + "mlp.", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")
_PRE_NORMS = _rules(
    _LAYER, input_layernorm="input_layernorm", post_attention_layernorm="post_attention_layernorm"
)
_POST_NORMS = _rules(
    _LAYER,
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
SCORE_RULES = _rules("", score="score")
"""The head of a sequence classifier, the same in all families."""
HEAD_NORM_RULES = _rules(_LAYER + "self_attn.", q_head_norm="q_norm", k_head_norm="k_norm")
LLAMA_RULES = (*_ENDS, *_PROJECTIONS, *_GATED_MLP, *_PRE_NORMS)
_GEMMA2_NORMS = (
    *_POST_NORMS,
    *_rules(
        _LAYER,
        input_layernorm="input_layernorm",
        post_attention_layernorm="pre_feedforward_layernorm",
    ),
)
GEMMA2_RULES = (*_ENDS, *_PROJECTIONS, *_GATED_MLP, *_GEMMA2_NORMS)
PHI3_RULES = (
    *_ENDS,
    *_PRE_NORMS,
    Rule(_QKV, _LAYER + "self_attn.qkv_proj", _CONCATENATED),
    Rule(_GATE_UP, _LAYER + "mlp.gate_up_proj", _HALVES),
    *_rules(_LAYER, o_proj="self_attn.o_proj", down_proj="mlp.down_proj"),
)
HUNYUAN_RULES = (
    *LLAMA_RULES,
    *_rules(_LAYER + "self_attn.", q_turned_norm="query_layernorm", k_turned_norm="key_layernorm"),
)
EXAONE_RULES = (*_ENDS, *_PROJECTIONS, *_GATED_MLP, *_POST_NORMS, *HEAD_NORM_RULES)
ERNIE_RULES = (
    *(Rule((_PATHS[name],), f"{_LAYER}self_attn.{name}", _INTERLEAVED) for name in ("q_proj", "k_proj")),
    *(rule for rule in LLAMA_RULES if rule.ours[0] not in (_PATHS["q_proj"], _PATHS["k_proj"])),
)
NANOCHAT_RULES = (*_ENDS, *_PROJECTIONS, *_rules(_LAYER + "mlp.", up_proj="fc1", down_proj="fc2"))
APERTUS_RULES = (
    *_ENDS,
    *_PROJECTIONS,
    *_rules(_LAYER + "mlp.", up_proj="up_proj", down_proj="down_proj", act_fn="act_fn"),
    *_rules(_LAYER, input_layernorm="attention_layernorm", post_attention_layernorm="feedforward_layernorm"),
    *HEAD_NORM_RULES,
)
GRANITE_HYBRID_RULES = (
    *_ENDS,
    *_PROJECTIONS,
    *_PRE_NORMS,
    Rule(_GATE_UP, _LAYER + "shared_mlp.input_linear", _HALVES),
    *_rules(_LAYER, down_proj="shared_mlp.output_linear"),
)
OLMO2_RULES = (
    *_ENDS,
    *_PROJECTIONS,
    *_GATED_MLP,
    *_POST_NORMS,
    *_rules(_LAYER + "self_attn.", q_norm="q_norm", k_norm="k_norm"),
)
_THIRDS = Fusion(lambda tensor, config: np.split(tensor, 3, axis=-1), _join_concatenated)


def _of_kind(kind: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules of layers that are stacked by kind; those of the whole model stay."""
    return tuple(
        rule._replace(ours=tuple(re.sub(r"^layers\b", f"layers.{kind}", name) for name in rule.ours))
        for rule in rules
    )


_GEMMA4_LAYERS = (
    *_PROJECTIONS,
    *_GATED_MLP,
    *_GEMMA2_NORMS,
    *HEAD_NORM_RULES,
    Rule(("layers",), _LAYER.removesuffix(".")),
    Rule(("layers.per_layer.gate_proj",), _LAYER + "per_layer_input_gate"),
    Rule(("layers.per_layer.o_proj",), _LAYER + "per_layer_projection"),
    Rule(("layers.per_layer.norm",), _LAYER + "post_per_layer_input_norm"),
)
GEMMA4_RULES = (
    *_ENDS,
    Rule(("per_layer_inputs.embed_tokens",), "model.embed_tokens_per_layer"),
    Rule(("per_layer_inputs.x_proj",), "model.per_layer_model_projection"),
    Rule(("per_layer_inputs.norm",), "model.per_layer_projection_norm"),
    *(rule for kind in ATTENTION for rule in _of_kind(kind, _GEMMA4_LAYERS)),
)


def unread_of_readers(config: DecoderConfig) -> tuple[str, ...]:
    """Keys and values in files of layers that read those of another; transformers leaves them out as well."""
    readers = [str(n) for n, kind in enumerate(config.layer_kinds) if kind.endswith("_reader")]
    return (rf"\.layers\.({'|'.join(readers)})\.self_attn\.[kv]_(proj|norm)\.",) if readers else ()


_LFM2_LAYERS = (
    *_rules(_LAYER, input_layernorm="operator_norm", post_attention_layernorm="ffn_norm"),
    *_rules(_LAYER + "feed_forward.", gate_proj="w1", up_proj="w3", down_proj="w2"),
)
_LFM2_ATTENTION = (
    *_LFM2_LAYERS,
    *_rules(_LAYER + "self_attn.", q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", o_proj="out_proj"),
    *_rules(_LAYER + "self_attn.", q_head_norm="q_layernorm", k_head_norm="k_layernorm"),
)
_LFM2_CONVOLUTION = (
    *_LFM2_LAYERS,
    Rule(tuple(f"layers.mixer.{name}_proj" for name in "bcx"), _LAYER + "conv.in_proj", _THIRDS),
    Rule(("layers.mixer.o_proj",), _LAYER + "conv.out_proj"),
    Rule(("layers.mixer.convolution",), _LAYER + "conv.conv"),
)
_LFM_ENDS = _rules("", embed_tokens="model.embed_tokens", norm="model.embedding_norm", lm_head="lm_head")
LFM2_RULES = (
    *_LFM_ENDS,
    *_LFM2_ATTENTION,
    *_of_kind("attention", _LFM2_ATTENTION),
    *_of_kind("convolution", _LFM2_CONVOLUTION),
)
"""A model of attention alone has one stack, under no kind's name."""
_LFM3_ATTENTION = (
    *_LFM2_LAYERS,
    *_PROJECTIONS,
    *HEAD_NORM_RULES,
    Rule((_PATHS["g_proj"],), _LAYER + "self_attn.gate_proj", module="g_proj"),
    *_rules(_LAYER, attention_output_norm="post_operator_norm", mlp_output_norm="post_ffn_norm"),
)
_LFM3_CONVOLUTION = (
    *_LFM2_CONVOLUTION,
    Rule(("layers.mixer_output_norm",), _LAYER + "post_operator_norm"),
    *_rules(_LAYER, mlp_output_norm="post_ffn_norm"),
)
LFM3_RULES = (
    *_LFM_ENDS,
    *_LFM3_ATTENTION,
    *_of_kind("attention", _LFM3_ATTENTION),
    *_of_kind("convolution", _LFM3_CONVOLUTION),
)


def _split_queries_gates(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    """Each query head comes with its gate."""
    heads = tensor.reshape(*tensor.shape[:-1], -1, 2, config.head_dim)
    return [heads[..., place, :].reshape(*tensor.shape[:-1], -1) for place in (0, 1)]


def _join_queries_gates(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    heads = [part.reshape(*part.shape[:-1], -1, config.head_dim) for part in parts]
    return np.stack(heads, axis=-2).reshape(*parts[0].shape[:-1], -1)


def _delta_of(config: DecoderConfig) -> DeltaRule:
    assert config.delta is not None
    return config.delta


def _split_delta(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    keys = _delta_of(config).num_key_heads * _delta_of(config).key_dim
    return np.split(tensor, [keys, 2 * keys], axis=-1)


def _by_key_head(sizes: Callable[[DeltaRule], Sequence[int]]) -> Fusion:
    """Each key head comes with what belongs to it; `sizes` are its channels of every part."""

    def split(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
        delta = _delta_of(config)
        heads = tensor.reshape(*tensor.shape[:-1], delta.num_key_heads, -1)
        parts = np.split(heads, np.cumsum(sizes(delta))[:-1], axis=-1)
        return [part.reshape(*tensor.shape[:-1], -1) for part in parts]

    def join(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
        lead = (*parts[0].shape[:-1], _delta_of(config).num_key_heads)
        return np.concatenate([part.reshape(*lead, -1) for part in parts], -1).reshape(*lead[:-1], -1)

    return Fusion(split, join)


def _serves(delta: DeltaRule) -> int:
    """Value heads that a key head serves."""
    return delta.num_value_heads // delta.num_key_heads


def _mixers(names: str) -> tuple[str, ...]:
    return tuple(f"layers.mixer.{name}_proj" for name in names)


_QWEN_LAYERS = (*_GATED_MLP, *_PRE_NORMS)
_QWEN_ATTENTION = (
    *_QWEN_LAYERS,
    Rule(
        (_PATHS["q_proj"], _PATHS["g_proj"]),
        _LAYER + "self_attn.q_proj",
        Fusion(_split_queries_gates, _join_queries_gates),
    ),
    *(rule for rule in _PROJECTIONS if rule.ours[0] != _PATHS["q_proj"]),
    *HEAD_NORM_RULES,
)
_DELTA = (
    *_QWEN_LAYERS,
    Rule(("layers.mixer.convolution",), _LAYER + "linear_attn.conv1d"),
    Rule(("layers.mixer.norm",), _LAYER + "linear_attn.norm"),
    Rule(("layers.mixer.o_proj",), _LAYER + "linear_attn.out_proj"),
    Rule(("layers.mixer",), _LAYER + "linear_attn"),
)
_QWEN35_DELTA = (
    *_DELTA,
    Rule(_mixers("qkv"), _LAYER + "linear_attn.in_proj_qkv", Fusion(_split_delta, _join_concatenated)),
    *(Rule(_mixers(name), f"{_LAYER}linear_attn.in_proj_{name}") for name in "zba"),
)
_QWEN3_NEXT_DELTA = (
    *_DELTA,
    Rule(
        _mixers("qkvz"),
        _LAYER + "linear_attn.in_proj_qkvz",
        _by_key_head(lambda delta: [delta.key_dim] * 2 + [delta.value_dim * _serves(delta)] * 2),
    ),
    Rule(_mixers("ba"), _LAYER + "linear_attn.in_proj_ba", _by_key_head(lambda delta: [_serves(delta)] * 2)),
)
QWEN35_RULES, QWEN3_NEXT_RULES = (
    (*_ENDS, *_QWEN_ATTENTION, *_of_kind("attention", _QWEN_ATTENTION), *_of_kind("delta", delta))
    for delta in (_QWEN35_DELTA, _QWEN3_NEXT_DELTA)
)
STABLELM_RULES = (
    *LLAMA_RULES,
    *_rules(
        _LAYER + "self_attn.",
        q_head_norm="q_layernorm.norms.{head}",
        k_head_norm="k_layernorm.norms.{head}",
    ),
)
GPT2_RULES = (
    *_rules("transformer.", embed_tokens="wte", embed_positions="wpe", norm="ln_f"),
    *_rules("", lm_head="lm_head"),
    *_rules("transformer.h.{layer}.", input_layernorm="ln_1", post_attention_layernorm="ln_2"),
    Rule(_QKV, "transformer.h.{layer}.attn.c_attn", _CONCATENATED, transposed=False),
    Rule((_PATHS["o_proj"],), "transformer.h.{layer}.attn.c_proj", transposed=False),
    Rule((_PATHS["up_proj"],), "transformer.h.{layer}.mlp.c_fc", transposed=False),
    Rule((_PATHS["down_proj"],), "transformer.h.{layer}.mlp.c_proj", transposed=False),
)
GPT_NEO_RULES = (
    *_rules("transformer.", embed_tokens="wte", embed_positions="wpe", norm="ln_f"),
    *_rules("", lm_head="lm_head"),
    *_rules("transformer.h.{layer}.", input_layernorm="ln_1", post_attention_layernorm="ln_2"),
    *_rules(
        "transformer.h.{layer}.attn.attention.",
        q_proj="q_proj",
        k_proj="k_proj",
        v_proj="v_proj",
        o_proj="out_proj",
    ),
    *_rules("transformer.h.{layer}.mlp.", up_proj="c_fc", down_proj="c_proj"),
)
GPT_NEOX_RULES = (
    *_rules("", embed_tokens="gpt_neox.embed_in", norm="gpt_neox.final_layer_norm", lm_head="embed_out"),
    Rule(_QKV, "gpt_neox.layers.{layer}.attention.query_key_value", _GROUPED),
    *_rules(
        "gpt_neox.layers.{layer}.",
        input_layernorm="input_layernorm",
        post_attention_layernorm="post_attention_layernorm",
        o_proj="attention.dense",
        up_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
    ),
)
OPT_RULES = (
    *_rules(
        "model.decoder.",
        embed_tokens="embed_tokens",
        embed_positions="embed_positions",
        norm="final_layer_norm",
    ),
    *_rules("", lm_head="lm_head"),
    *_rules(
        "model.decoder.layers.{layer}.",
        input_layernorm="self_attn_layer_norm",
        post_attention_layernorm="final_layer_norm",
        q_proj="self_attn.q_proj",
        k_proj="self_attn.k_proj",
        v_proj="self_attn.v_proj",
        o_proj="self_attn.out_proj",
        up_proj="fc1",
        down_proj="fc2",
    ),
)
FALCON_ENDS = _rules(
    "", embed_tokens="transformer.word_embeddings", norm="transformer.ln_f", lm_head="lm_head"
)
_FALCON_RULES = (
    *FALCON_ENDS,
    Rule(_QKV, "transformer.h.{layer}.self_attention.query_key_value", _GROUPED),
    *_rules(
        "transformer.h.{layer}.",
        o_proj="self_attention.dense",
        up_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
    ),
)
MPT_RULES = (
    *_rules("", embed_tokens="transformer.wte", norm="transformer.norm_f", lm_head="lm_head"),
    Rule(_QKV, "transformer.blocks.{layer}.attn.Wqkv", _CONCATENATED),
    *_rules(
        "transformer.blocks.{layer}.",
        input_layernorm="norm_1",
        post_attention_layernorm="norm_2",
        o_proj="attn.out_proj",
        up_proj="ffn.up_proj",
        down_proj="ffn.down_proj",
    ),
)


def falcon_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The 40B layout names its two norms after what they feed."""
    names = ("ln_attn", "ln_mlp") if config.residual == "parallel" else _FALCON_NORMS
    norms = dict(zip(("input_layernorm", "post_attention_layernorm"), names, strict=True))
    return (*_FALCON_RULES, *_rules("transformer.h.{layer}.", **norms))


_FALCON_NORMS = ("input_layernorm", "post_attention_layernorm")
