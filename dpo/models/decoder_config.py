"""Everything that decides what a decoder computes; `huggingface.families` makes it from a `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from dpo.models.rotary import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"]
"""`relu2` is the square of ReLU; `xielu` has parameters (Huang and Schlag 2024)."""


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): slope * key position is added to a head's scores.

    The bias of the query's own position is the same for all keys, so softmax does not need it.
    """

    slopes: tuple[float, ...]
    """One a head."""
    scale: float
    bfloat16: bool
    """The bias is rounded to bfloat16 before it is scaled, as Falcon does."""


@dataclass(frozen=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + beta log(1 + floor(p / length)), as in Llama 4."""

    beta: float
    length: int


@dataclass(frozen=True)
class DeltaRule:
    """Sizes of linear attention by the gated delta rule; each key head serves several value heads."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Of queries, keys and values together."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


LayerKind = Literal[
    "attention",
    "attention_kept",
    "attention_reader",
    "global",
    "global_kept",
    "global_reader",
    "convolution",
    "delta",
]
"""What mixes the positions in a layer; `global` is attention with heads of other sizes (`GlobalHeads`).

Readers have queries alone: they attend to the keys and values of the layer of their heads that is kept.
"""
ATTENTION: tuple[LayerKind, ...] = get_args(LayerKind)[:6]


def split_kind(kind: str) -> tuple[str, str]:
    """Of a kind of attention, whose heads it has, and its role: kept, reader, or none."""
    which, _, role = kind.partition("_")
    return which, role


@dataclass(frozen=True)
class GlobalHeads:
    """Attention in layers of kind `global`."""

    num_kv_heads: int
    head_dim: int
    values_are_keys: bool
    """Whether values are what keys are before they are normed and turned: one projection makes both."""


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the computation. No defaults: `dpo.huggingface.families` states every value."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_kinds: tuple[LayerKind, ...]
    convolution_width: int
    """Positions that a convolution reads, its own included; 0 where there is none."""
    convolution_bias: bool
    """Of gated short convolutions, and of the projections around them."""
    delta: DeltaRule | None
    """Of layers of kind `delta`."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    values_are_keys: bool
    """Whether one projection makes keys and values."""
    global_heads: GlobalHeads | None
    """Of layers of kind `global`."""
    intermediate_size: int
    reader_intermediate_size: int
    """The same of layers that read the keys and values of another; 0 where there are none."""
    per_layer_size: int
    """Channels that each layer is handed of a token beside the residual stream; 0 where there are none."""
    activation: Activation
    gated_mlp: bool
    """act(gate x) * up x, instead of act(up x)."""
    norm: Literal["rms", "rms_offset", "rms_unscaled", "layer", "layer_no_bias"]
    """`rms_offset` multiplies by 1 + scale, `rms_unscaled` by nothing."""
    norm_eps: float
    residual: Literal["sequential", "parallel", "parallel_shared", "sequential_scaled"]
    """Attention then MLP; both from the same input with a norm each; both from one norm; attention then MLP,
    and what comes out times a number of the layer's that is not learned."""
    pre_norm: bool
    post_norm: bool
    """Norms of the inputs, and of the outputs, of attention and MLP."""
    qk_norm: Literal["none", "head", "per_head", "all_heads", "turned_head"]
    """Norm of q and k over a head (one scale, or one a head), over all heads together, or over a head after
    it was turned to its position."""
    value_norm: bool
    """Whether the values of a head are divided by the root of their mean square."""
    embedding_norm: bool
    """Whether the embedded tokens are normed before the first layer."""
    gated_attention: Literal["none", "channel", "head"]
    """Whether what is attended to is multiplied by sigmoid(g x) before the output projection, and whether g
    has a number for each channel or one for each head."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    position: Literal["rotary", "learned", "alibi", "none"]
    alibi: Alibi | None
    position_offset: int
    """Row of the learned table that holds position 0."""
    max_positions: int
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]
    """Which of `ropes` each layer uses."""
    windows: tuple[int, ...]
    """Positions that each layer sees back, itself included; `NO_WINDOW` is all."""
    attention_scale: float
    attention_softcap: float | None
    query_growth: QueryGrowth | None
    logit_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    """Multiplies the final hidden states, so that callers need not know it."""
    tie_embeddings: bool

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are attention, and one stack."""
        return set(self.layer_kinds) == {"attention"}

    @property
    def num_attending(self) -> int:
        """Layers of attention, of whatever kind."""
        return sum(kind in ATTENTION for kind in self.layer_kinds)

    @property
    def kv_head_counts(self) -> tuple[int, ...]:
        """Of each kind of attention that there is."""
        heads = dict.fromkeys(split_kind(kind)[0] for kind in self.layer_kinds if kind in ATTENTION)
        return tuple(self.of_kind(each).num_kv_heads for each in heads)

    def of_kind(self, kind: str) -> DecoderConfig:
        """The same with the sizes of heads and MLPs in layers of a kind."""
        which, role = split_kind(kind)
        config = self
        if role == "reader":
            config = replace(config, intermediate_size=self.reader_intermediate_size)
        if which != "global":
            return config
        heads = self.global_heads
        assert heads is not None
        return replace(
            config,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            values_are_keys=heads.values_are_keys,
        )

    @property
    def convolved_channels(self) -> int:
        """Channels that the layers with convolutions convolve."""
        return self.hidden_size if self.delta is None else self.delta.channels

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Numbers of the layers of a kind, in the order in which their parameters are stacked."""
        return tuple(number for number, each in enumerate(self.layer_kinds) if each == kind)
