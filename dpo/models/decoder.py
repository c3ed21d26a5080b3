"""A Hugging Face causal language model: one decoder for all families.

A family's differences are values of `DecoderConfig`; they choose sub-modules in `__init__`, and no `__call__`
asks which family it is. Layers are stacked along a leading L axis and scanned, so compile time does not grow
with depth. Norms, softmax and logits are float32; the residual stream has the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpo.models.attention import (
    NO_WINDOW,
    Implementation,
    attend,
    attend_cached,
    check_implementation,
    visible_in_cache,
)
from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.linear import PRODUCT, Linear, Rounds
from dpo.models.partition import DATA, FSDP, ONE_DEVICE, ROWS, TENSOR, Partition
from dpo.models.rotary import Rope, cos_sin, rotate

Remat = Literal["none", "dots", "full"]


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
class DecoderConfig:
    """Everything that decides the computation. No defaults: `families.py` states every value."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated_mlp: bool
    """act(gate x) * up x, instead of act(up x)."""
    norm: Literal["rms", "rms_offset", "layer", "layer_no_bias"]
    """`rms_offset` multiplies by 1 + scale."""
    norm_eps: float
    residual: Literal["sequential", "parallel", "parallel_shared"]
    """Attention then MLP; both from the same input with a norm each; both from one norm."""
    pre_norm: bool
    post_norm: bool
    """Norms of the inputs, and of the outputs, of attention and MLP."""
    qk_norm: Literal["none", "head", "per_head", "all_heads"]
    """Norm of q and k over a head (one scale, or one a head), or over all heads together."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    position: Literal["rotary", "learned", "alibi"]
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
    logit_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    """Multiplies the final hidden states, so that callers need not know it."""
    tie_embeddings: bool


class Cache(NamedTuple):
    """Keys and values of decoded positions; slot s holds position s of its row."""

    keys: Float[Array, "L R G C S"]
    values: Float[Array, "L R G S C"]


class Decoder(nnx.Module):
    """Token ids to hidden states. Attribute names are Hugging Face's; linear kernels are [in, out]."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = "full",
        attention: Implementation = "auto",
        partition: Partition = ONE_DEVICE,
    ):
        self.config = config
        self.partition = partition
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat: Remat = remat
        self.rounds: Rounds = "both" if self.compute_dtype == jnp.bfloat16 else "neither"
        """Of linears; the output projection then rounds in the backward pass alone."""
        check_implementation(
            attention,
            partition=partition,
            dtype=self.compute_dtype,
            softcap=config.attention_softcap,
            has_key_bias=config.alibi is not None,
        )
        self.attention: Implementation = attention
        make = _Maker(config, rngs, self.compute_dtype, jnp.dtype(param_dtype))
        self.embed_tokens = make.embedding(config.vocab_size)
        if config.position == "learned":
            self.embed_positions = make.embedding(config.max_positions + config.position_offset)
        self.layers = _stack(make, config.num_layers)
        self.norm = make.norm(config.hidden_size)
        if not config.tie_embeddings:
            self.lm_head = make.embedding(config.vocab_size)

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits."""
        return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).embedding[...]

    def hidden(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        group: Int[Array, "R T"],
        branch: Int[Array, "R T"],
    ) -> Float[Array, "R T D"]:
        """Final-normed hidden states of packed rows; logits are `hidden @ output_embedding.T`."""
        layout = {"positions": positions, "group": group, "branch": branch}
        key_bias = self._key_bias(positions)
        ropes = self._ropes(positions, group)
        graphdef, layers = nnx.split(self.layers)

        def block(h: Array, layer: _Layer) -> tuple[Array, None]:
            core = partial(self._attend, **layout, key_bias=key_bias, window=layer.window)
            h = nnx.merge(graphdef, layer.state)(h, ropes(layer.rope), core)[0]
            return self.partition.constrain(h, ROWS), None

        h, _ = jax.lax.scan(
            _rematerialised(block, self.remat), self._embed(tokens, positions), self._xs(layers)
        )
        return self._final(h)

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Float32 logits with the family's soft-capping; for few positions, [..., V] is large."""
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.output_embedding.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(self, rows: int, length: int) -> Cache:
        """An empty cache for positions below `length`."""
        config = self.config
        stack = (config.num_layers, rows, config.num_kv_heads)
        keys = jnp.zeros((*stack, config.head_dim, length), self.compute_dtype)
        values = jnp.zeros((*stack, length, config.head_dim), self.compute_dtype)
        return Cache(*(self.partition.constrain(x, None, ROWS, TENSOR) for x in (keys, values)))

    def decode(
        self,
        tokens: Int[Array, "R S"],
        positions: Int[Array, "R S"],
        cache: Cache,
        group: Int[Array, "R S"] | None = None,
    ) -> tuple[Float[Array, "R S D"], Cache]:
        """Hidden states of further tokens of each row, which see the cached positions up to their own.

        Positions are consecutive in a row and a later call may overwrite them, so prompts are padded on the
        right and decoding starts at each row's own length. `group` is 0 at padding, so that rope scaling by
        length does not count it.
        """
        ropes = self._ropes(positions, jnp.ones_like(positions) if group is None else group)
        graphdef, layers = nnx.split(self.layers)
        rows = jnp.arange(tokens.shape[0])[:, None]
        slots = jnp.arange(cache.values.shape[3])[None, :]
        key_bias = self._key_bias(jnp.broadcast_to(slots, (tokens.shape[0], slots.shape[1])))

        def block(carry: tuple[Array, Cache], layer: _Layer) -> tuple[tuple[Array, Cache], None]:
            h, cache = carry

            def core(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
                keys = cache.keys.at[layer.index, rows, :, :, positions].set(k.astype(cache.keys.dtype))
                values = cache.values.at[layer.index, rows, :, positions].set(v.astype(cache.values.dtype))
                mask = visible_in_cache(positions, keys.shape[-1], layer.window)
                at = (keys[layer.index], values[layer.index])
                out = attend_cached(q, *at, mask, key_bias=key_bias, **self._scoring)
                return out, Cache(keys, values)

            return nnx.merge(graphdef, layer.state)(h, ropes(layer.rope), core), None

        start = (self._embed(tokens, positions), cache)
        (h, cache), _ = jax.lax.scan(block, start, self._xs(layers))
        return self._final(h), cache

    @property
    def _scoring(self) -> dict[str, Any]:
        return {"scale": self.config.attention_scale, "softcap": self.config.attention_softcap}

    def _key_bias(self, positions: Int[Array, "R S"]) -> Float[Array, "R S H"] | None:
        alibi = self.config.alibi
        if alibi is None:
            return None
        dtype = jnp.bfloat16 if alibi.bfloat16 else jnp.float32
        bias = positions.astype(dtype)[:, :, None] * jnp.asarray(alibi.slopes, dtype)[None, None, :]
        return bias.astype(jnp.float32) * alibi.scale

    def _attend(self, q: Array, k: Array, v: Array, **layout: Any) -> tuple[Array, None]:
        how = {"implementation": self.attention, "partition": self.partition}
        return attend(q, k, v, **layout, **self._scoring, **how), None

    def _embed(self, tokens: Int[Array, "R T"], positions: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        h = self._look_up(self.embed_tokens, tokens)
        h = h * jnp.asarray(self.config.embedding_scale, self.compute_dtype)
        if self.config.position == "learned":
            h = h + self._look_up(self.embed_positions, positions + self.config.position_offset)
        return h

    def _look_up(self, table: Embedding, index: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        """On a mesh every device looks up its columns for the rows of its whole `fsdp` group, and then
        columns are exchanged for rows: the table itself is never gathered.
        """
        index = self.partition.constrain(index, DATA)
        columns = self.partition.constrain(table(index), DATA, None, FSDP)
        return self.partition.constrain(columns, ROWS)

    def _final(self, h: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.norm(h) * jnp.asarray(self.config.logit_scale, self.compute_dtype)

    def _ropes(self, positions: Array, group: Array) -> Callable[[Array | None], tuple[Array, Array] | None]:
        """Cosines and sines of every kind, computed once and picked by each layer."""
        tables = [cos_sin(rope, positions, group) for rope in self.config.ropes]
        if len(tables) < 2:
            return lambda _: tables[0] if tables else None
        cos, sin = (jnp.stack(part) for part in zip(*tables, strict=True))
        return lambda kind: (cos[kind], sin[kind])

    def _xs(self, layers: nnx.State) -> _Layer:
        config = self.config
        windowed = min(config.windows) < NO_WINDOW
        return _Layer(
            state=layers,
            index=jnp.arange(config.num_layers),
            window=jnp.asarray(config.windows, jnp.int32) if windowed else None,
            rope=jnp.asarray(config.layer_rope, jnp.int32) if len(config.ropes) > 1 else None,
        )


class _Layer(NamedTuple):
    """What the scan hands to one layer."""

    state: nnx.State
    index: Int[Array, "*n"]
    window: Int[Array, "*n"] | None
    rope: Int[Array, "*n"] | None


class Block(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h)), with norms of the outputs where a family has them."""

    def __init__(self, make: _Maker):
        config, D = make.config, make.config.hidden_size
        self.residual_scale = config.residual_scale
        self.input_layernorm = make.norm(D) if config.pre_norm else _identity
        self.self_attn = Attention(make)
        self.attention_output_norm = make.norm(D) if config.post_norm else _identity
        self.post_attention_layernorm = make.norm(D) if config.pre_norm else _identity
        self.mlp = make.mlp()
        self.mlp_output_norm = make.norm(D) if config.post_norm else _identity

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        attended, extra = self.self_attn(self.input_layernorm(h), rope, core)
        h = h + self.attention_output_norm(attended) * self.residual_scale
        h = h + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(h))) * self.residual_scale
        return h, extra


class ParallelBlock(nnx.Module):
    """h += attention(norm(h)) + mlp(norm'(h))."""

    def __init__(self, make: _Maker):
        self.input_layernorm = make.norm(make.config.hidden_size)
        self.self_attn = Attention(make)
        self.post_attention_layernorm = make.norm(make.config.hidden_size)
        self.mlp = make.mlp()

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        attended, extra = self.self_attn(self.input_layernorm(h), rope, core)
        return h + attended + self.mlp(self.post_attention_layernorm(h)), extra


class SharedParallelBlock(nnx.Module):
    """x = norm(h); h += attention(x) + mlp(x)."""

    def __init__(self, make: _Maker):
        self.input_layernorm = make.norm(make.config.hidden_size)
        self.self_attn = Attention(make)
        self.mlp = make.mlp()

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        x = self.input_layernorm(h)
        attended, extra = self.self_attn(x, rope, core)
        return h + attended + self.mlp(x), extra


class Attention(nnx.Module):
    """Projections around `core(q, k, v)`, which attends within rows or over a cache."""

    def __init__(self, make: _Maker):
        config = make.config
        D, H, G, C = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim = C
        self.q_proj = make.linear(D, H * C, config.qkv_bias)
        self.k_proj = make.linear(D, G * C, config.qkv_bias)
        self.v_proj = make.linear(D, G * C, config.qkv_bias)
        self.o_proj = make.linear(H * C, D, config.output_bias)
        self.q_norm, self.q_head_norm = make.qk_norms(H)
        self.k_norm, self.k_head_norm = make.qk_norms(G)
        self.place = make.placement()

    def __call__(
        self, x: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        q = self.q_head_norm(self._heads(self.q_norm(self.q_proj(x))))
        k = self.k_head_norm(self._heads(self.k_norm(self.k_proj(x))))
        v = self._heads(self.v_proj(x))
        out, extra = core(self.place(q, rope), self.place(k, rope), v)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), extra

    def _heads(self, x: Float[Array, "R T HC"]) -> Float[Array, "R T H C"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class GatedMLP(nnx.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, make: _Maker):
        config = make.config
        self.act = _ACTIVATIONS[config.activation]
        self.gate_proj = make.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = make.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = make.linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MLP(nnx.Module):
    """down(act(up x))."""

    def __init__(self, make: _Maker):
        config = make.config
        self.act = _ACTIVATIONS[config.activation]
        self.up_proj = make.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = make.linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.down_proj(self.act(self.up_proj(x)))


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axis, in float32 (Zhang and Sennrich 2019).

    Positions are one axis, as in `Linear`: the gradient of the scale sums over them, and over two axes XLA's
    CPU backend takes twenty times as long.
    """

    def __init__(self, *shape: int, eps: float, offset: float, param_dtype: jnp.dtype):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset, param_dtype))

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        h = x.reshape(-1, *self.scale.shape).astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (h * _lead(scale, h.ndim)).astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32 (Ba et al. 2016); flat, as `RMSNorm`."""

    def __init__(self, *shape: int, eps: float, use_bias: bool, param_dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        h = x.reshape(-1, *self.scale.shape).astype(jnp.float32)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        h = h * _lead(self.scale[...].astype(jnp.float32), h.ndim)
        if self.bias is not None:
            h = h + _lead(self.bias[...].astype(jnp.float32), h.ndim)
        return h.astype(x.dtype).reshape(x.shape)


class Embedding(nnx.Module):
    """A table [V, D], looked up in the compute dtype."""

    def __init__(self, rows: int, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(_INIT(rngs.params(), (rows, dim), param_dtype))

    def __call__(self, index: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        return self.embedding[...].at[index].get(mode="clip").astype(self.dtype)


@dataclass(frozen=True)
class _Maker:
    """Builds the sub-modules that a configuration asks for."""

    config: DecoderConfig
    rngs: nnx.Rngs
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def linear(self, dim_in: int, dim_out: int, use_bias: bool) -> Linear:
        return Linear(
            dim_in,
            dim_out,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_INIT,
            rngs=self.rngs,
        )

    def embedding(self, rows: int) -> Embedding:
        dim = self.config.hidden_size
        return Embedding(rows, dim, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs)

    def norm(self, *shape: int, use_bias: bool = True) -> RMSNorm | LayerNorm:
        common = {"eps": self.config.norm_eps, "param_dtype": self.param_dtype}
        if self.config.norm.startswith("rms"):
            return RMSNorm(*shape, offset=float(self.config.norm == "rms_offset"), **common)
        return LayerNorm(*shape, use_bias=use_bias and self.config.norm == "layer", **common)

    def qk_norms(self, heads: int) -> tuple[Callable, Callable]:
        """A norm before heads are split, and one after."""
        C = self.config.head_dim
        shapes = {"all_heads": (heads * C,), "head": (C,), "per_head": (heads, C)}
        if self.config.qk_norm == "none":
            return _identity, _identity
        norm = self.norm(*shapes[self.config.qk_norm], use_bias=False)
        return (norm, _identity) if self.config.qk_norm == "all_heads" else (_identity, norm)

    def placement(self) -> Callable:
        return _rotate if self.config.position == "rotary" else _unplaced

    def mlp(self) -> GatedMLP | MLP:
        return GatedMLP(self) if self.config.gated_mlp else MLP(self)

    def block(self) -> Block | ParallelBlock | SharedParallelBlock:
        return _BLOCKS[self.config.residual](self)


def _stack(make: _Maker, num_layers: int) -> Any:
    """`num_layers` blocks whose parameters are stacked along a leading axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Any:
        return _Maker(make.config, rngs, make.dtype, make.param_dtype).block()

    return create(make.rngs)


def _rematerialised(block: Callable, remat: Remat) -> Callable:
    """`full` keeps a layer's input and its attention's output, `dots` also the outputs of the projections.

    Attention's probabilities are kept by neither.
    """
    if remat == "none":
        return block
    names = SAVED_NAMES if remat == "full" else (*SAVED_NAMES, PRODUCT)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    if remat == "dots":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = jax.checkpoint_policies.save_from_both_policies(dots, policy)
    return jax.checkpoint(block, policy=policy, prevent_cse=False)


def _lead(x: Array, ndim: int) -> Array:
    """Leading axes of size one, so that broadcasting is explicit."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _identity(x: Array) -> Array:
    return x


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    return rotate(x, *rope)


def _unplaced(x: Array, rope: None) -> Array:
    return x


_INIT = nnx.initializers.normal(0.02)

_ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

_BLOCKS = {"sequential": Block, "parallel": ParallelBlock, "parallel_shared": SharedParallelBlock}
