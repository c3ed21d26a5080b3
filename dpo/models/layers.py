"""What a decoder is made of: blocks, attention, convolutions and MLPs, and their stacks.

A family's differences are values of `DecoderConfig`; they choose sub-modules in `__init__`, and no `__call__`
asks which family it is. Norms are float32 inside; the residual stream has the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from dpo.models.decoder_config import ATTENTION, split_kind
from dpo.models.norms import RMSNorm, UnscaledRMSNorm, lead
from dpo.models.parts import INIT, Buffer, LayerMaker, identity
from dpo.models.per_layer import PerLayerResidual


class Block(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h)), with norms of the outputs where a family has them."""

    def __init__(self, make: LayerMaker):
        config, D = make.config, make.config.hidden_size
        self.residual_scale = config.residual_scale
        self.input_layernorm = make.norm(D) if config.pre_norm else identity
        self.self_attn = _make_attention(make)
        self.attention_output_norm = make.norm(D) if config.post_norm else identity
        self.post_attention_layernorm = make.norm(D) if config.pre_norm else identity
        self.mlp = _make_mlp(make)
        self.mlp_output_norm = make.norm(D) if config.post_norm else identity

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        attended, extra = self.self_attn(self.input_layernorm(h), rope, core)
        h = h + self.attention_output_norm(attended) * self.residual_scale
        h = h + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(h))) * self.residual_scale
        return h, extra


class ScaledBlock(Block):
    """What a block makes of h, with what is beside it, times a number that is not learned (Gemma 4)."""

    def __init__(self, make: LayerMaker):
        super().__init__(make)
        self.per_layer = PerLayerResidual(make) if make.config.per_layer_size else identity
        self.layer_scalar = Buffer(jnp.ones((1,), make.param_dtype))

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable, *beside: Float[Array, "R T P"]
    ) -> tuple[Float[Array, "R T D"], Any]:
        h, extra = super().__call__(h, rope, core)
        h = self.per_layer(h, *beside)
        return h * lead(self.layer_scalar[...].astype(h.dtype), h.ndim), extra


class RecurrentBlock(nnx.Module):
    """h += mixer(norm(h)); h += mlp(norm(h)), with something else than attention as the mixer.

    Outputs are normed too where a family does that.
    """

    def __init__(self, make: LayerMaker, mixer: Callable):
        config, D = make.config, make.config.hidden_size
        self.input_layernorm = make.norm(D)
        self.mixer = mixer
        self.mixer_output_norm = make.norm(D) if config.post_norm else identity
        self.post_attention_layernorm = make.norm(D)
        self.mlp = _make_mlp(make)
        self.mlp_output_norm = make.norm(D) if config.post_norm else identity

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        mixed, extra = self.mixer(self.input_layernorm(h), core)
        h = h + self.mixer_output_norm(mixed)
        return h + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(h))), extra


class ParallelBlock(nnx.Module):
    """h += attention(norm(h)) + mlp(norm'(h))."""

    def __init__(self, make: LayerMaker):
        self.input_layernorm = make.norm(make.config.hidden_size)
        self.self_attn = Attention(make)
        self.post_attention_layernorm = make.norm(make.config.hidden_size)
        self.mlp = _make_mlp(make)

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        attended, extra = self.self_attn(self.input_layernorm(h), rope, core)
        return h + attended + self.mlp(self.post_attention_layernorm(h)), extra


class SharedParallelBlock(nnx.Module):
    """x = norm(h); h += attention(x) + mlp(x)."""

    def __init__(self, make: LayerMaker):
        self.input_layernorm = make.norm(make.config.hidden_size)
        self.self_attn = Attention(make)
        self.mlp = _make_mlp(make)

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        x = self.input_layernorm(h)
        attended, extra = self.self_attn(x, rope, core)
        return h + attended + self.mlp(x), extra


class Attention(nnx.Module):
    """Projections around `core(q, k, v)`, which attends within rows or over a cache."""

    def __init__(self, make: LayerMaker):
        config = make.config
        D, H, G, C = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim = C
        self.q_proj = make.linear(D, H * C, config.qkv_bias)
        gates = {"none": 0, "channel": H * C, "head": H}[config.gated_attention]
        has_bias = config.qkv_bias and config.gated_attention == "channel"
        self.g_proj = make.linear(D, gates, has_bias) if gates else None
        self.k_proj = make.linear(D, G * C, config.qkv_bias)
        self.v_proj = None if config.values_are_keys else make.linear(D, G * C, config.qkv_bias)
        self.o_proj = make.linear(H * C, D, config.output_bias)
        self.q_norm, self.q_head_norm = make.qk_norms(H)
        self.k_norm, self.k_head_norm = make.qk_norms(G)
        self.v_norm = UnscaledRMSNorm(config.norm_eps) if config.value_norm else identity
        self.q_turned_norm, self.k_turned_norm = make.turned_norm(), make.turned_norm()
        self.place = make.placement()

    def __call__(
        self, x: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        q = self.q_head_norm(_heads(self.q_norm(self.q_proj(x)), self.head_dim))
        keys = self.k_proj(x)
        k = self.k_head_norm(_heads(self.k_norm(keys), self.head_dim))
        v = self.v_norm(_heads(keys if self.v_proj is None else self.v_proj(x), self.head_dim))
        q, k = self.q_turned_norm(self.place(q, rope)), self.k_turned_norm(self.place(k, rope))
        out, extra = core(q, k, v)
        out = out.reshape(*x.shape[:2], -1)
        if self.g_proj is not None:
            gate = jax.nn.sigmoid(self.g_proj(x))
            out = out * jnp.repeat(gate, out.shape[-1] // gate.shape[-1], axis=-1)
        return self.o_proj(out), extra


class ReadingAttention(nnx.Module):
    """Queries alone around `core(q)`, which attends to keys and values of a layer before."""

    def __init__(self, make: LayerMaker):
        config = make.config
        width = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = make.linear(config.hidden_size, width, config.qkv_bias)
        self.o_proj = make.linear(width, config.hidden_size, config.output_bias)
        self.q_norm, self.q_head_norm = make.qk_norms(config.num_heads)
        self.place = make.placement()

    def __call__(
        self, x: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        q = self.q_head_norm(_heads(self.q_norm(self.q_proj(x)), self.head_dim))
        out, extra = core(self.place(q, rope))
        return self.o_proj(out.reshape(*x.shape[:2], -1)), extra


class Convolution(nnx.Module):
    """Σ_j taps_j (u j positions before), channel by channel, in float32.

    `before` is what stands before each position in its own sequence, the nearest first.
    """

    def __init__(self, make: LayerMaker, channels: int):
        shape = (channels, 1, make.config.convolution_width)
        self.taps = nnx.Param(INIT(make.rngs.params(), shape, make.param_dtype))
        has_bias = make.config.convolution_bias
        self.bias = nnx.Param(jnp.zeros((channels,), make.param_dtype)) if has_bias else None

    def __call__(self, u: Float[Array, "R T D"], before: list[Array]) -> Float32[Array, "R T D"]:
        taps = self.taps[...].astype(jnp.float32)[None, None, :, 0, ::-1]
        mixed = u.astype(jnp.float32) * taps[..., 0]
        for j, part in enumerate(before, start=1):
            mixed = mixed + part.astype(jnp.float32) * taps[..., j]
        return mixed if self.bias is None else mixed + lead(self.bias[...].astype(jnp.float32), 3)


class ShortConvolution(nnx.Module):
    """o(c x * convolution(b x * v x)) (LFM2); `core` hands over what stands before each position."""

    def __init__(self, make: LayerMaker):
        D, has_bias = make.config.hidden_size, make.config.convolution_bias
        self.b_proj, self.c_proj, self.x_proj = (make.linear(D, D, has_bias) for _ in range(3))
        self.o_proj = make.linear(D, D, has_bias)
        self.convolution = Convolution(make, D)

    def __call__(self, x: Float[Array, "R T D"], core: Callable) -> tuple[Float[Array, "R T D"], Any]:
        u = self.b_proj(x) * self.x_proj(x)
        before, extra = core(u)
        return self.o_proj(self.c_proj(x) * self.convolution(u, before).astype(x.dtype)), extra


class GatedDeltaNet(nnx.Module):
    """o(norm(delta rule of silu(convolution(q x, k x, v x))) * silu(z x)) (Yang et al. 2024; Qwen3-Next).

    `core(u)` hands over what stands before each position, and the function that runs the delta rule.
    """

    def __init__(self, make: LayerMaker):
        D, sizes = make.config.hidden_size, make.config.delta
        assert sizes is not None
        self.sizes, self.act_fn = sizes, make.activation()
        keys, values = sizes.num_key_heads * sizes.key_dim, sizes.num_value_heads * sizes.value_dim
        self.q_proj, self.k_proj = make.linear(D, keys, False), make.linear(D, keys, False)
        self.v_proj, self.z_proj = make.linear(D, values, False), make.linear(D, values, False)
        self.b_proj, self.a_proj = (make.linear(D, sizes.num_value_heads, False) for _ in range(2))
        self.o_proj = make.linear(values, D, False)
        self.convolution = Convolution(make, sizes.channels)
        self.norm = RMSNorm(
            sizes.value_dim, eps=make.config.norm_eps, offset=0.0, param_dtype=make.param_dtype
        )
        self.A_log = nnx.Param(jnp.zeros((sizes.num_value_heads,), make.param_dtype))
        self.dt_bias = nnx.Param(jnp.ones((sizes.num_value_heads,), make.param_dtype))

    def __call__(self, x: Float[Array, "R T D"], core: Callable) -> tuple[Float[Array, "R T D"], Any]:
        sizes = self.sizes
        u = jnp.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        before, run = core(u)
        u = self.act_fn(self.convolution(u, before).astype(x.dtype)).astype(jnp.float32)
        keys = sizes.num_key_heads * sizes.key_dim
        q, k, v = jnp.split(u, [keys, 2 * keys], axis=-1)
        q, k = (_unit(_heads(part, sizes.key_dim)) for part in (q, k))
        serves = sizes.num_value_heads // sizes.num_key_heads
        q, k = (jnp.repeat(part, serves, axis=2) for part in (q * sizes.key_dim**-0.5, k))
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))[None, None]
        step = self.a_proj(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[None, None]
        log_decay, beta = -rate * jax.nn.softplus(step), jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        read, extra = run(q, k, _heads(v, sizes.value_dim), log_decay, beta)
        gate = jax.nn.silu(_heads(self.z_proj(x), sizes.value_dim).astype(jnp.float32))
        out = (self.norm(read.astype(x.dtype)).astype(jnp.float32) * gate).astype(x.dtype)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), extra


class GatedMLP(nnx.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, make: LayerMaker):
        config = make.config
        self.act_fn = make.activation()
        self.gate_proj = make.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = make.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = make.linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MLP(nnx.Module):
    """down(act(up x))."""

    def __init__(self, make: LayerMaker):
        config = make.config
        self.act_fn = make.activation()
        self.up_proj = make.linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = make.linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def make_block(make: LayerMaker, kind: str) -> Any:
    """The block of a kind of layers, with the sizes that the maker's configuration has."""
    if kind in ATTENTION:
        return _BLOCKS[make.config.residual](make)
    return RecurrentBlock(make, _MIXERS[kind](make))


def _make_attention(make: LayerMaker) -> Attention | ReadingAttention:
    return ReadingAttention(make) if make.reads else Attention(make)


def _make_mlp(make: LayerMaker) -> GatedMLP | MLP:
    return GatedMLP(make) if make.config.gated_mlp else MLP(make)


class LayersByKind(nnx.Module):
    """Each kind's blocks, stacked in the order of their layers, under the kind's name."""

    def __init__(self, make: LayerMaker):
        kinds = make.config.layer_kinds
        for kind in dict.fromkeys(kinds):
            setattr(self, kind, _stack(make, kind, kinds.count(kind)))


def stack_layers(make: LayerMaker) -> Any:
    """Blocks whose parameters are stacked along a leading axis: one stack, or one of each kind."""
    config = make.config
    return _stack(make, "attention", config.num_layers) if config.is_uniform else LayersByKind(make)


def _stack(make: LayerMaker, kind: str, num_layers: int) -> Any:

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Any:
        config, reads = make.config.of_kind(kind), split_kind(kind)[1] == "reader"
        return make_block(LayerMaker(config, rngs, make.dtype, make.param_dtype, reads), kind)

    return create(make.rngs)


def _heads(x: Float[Array, "R T HC"], size: int) -> Float[Array, "R T H C"]:
    return x.reshape(*x.shape[:2], -1, size)


def _unit(x: Float32[Array, "R T H C"]) -> Float32[Array, "R T H C"]:
    """Of length one, as the kernels of flash-linear-attention make it."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


_MIXERS = {"convolution": ShortConvolution, "delta": GatedDeltaNet}
_BLOCKS = {
    "sequential": Block,
    "parallel": ParallelBlock,
    "parallel_shared": SharedParallelBlock,
    "sequential_scaled": ScaledBlock,
}
