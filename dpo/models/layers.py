"""What a decoder is made of: blocks, attention, MLPs, norms and embeddings, and who builds them.

A family's differences are values of `DecoderConfig`; they choose sub-modules in `__init__`, and no `__call__`
asks which family it is. Norms are float32 inside; the residual stream has the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from dpo.models.decoder_config import DecoderConfig
from dpo.models.linear import Linear
from dpo.models.norms import LayerNorm, RMSNorm, UnscaledRMSNorm, lead
from dpo.models.rotary import rotate

XIELU_BETA, XIELU_EPS = 0.5, -1e-6
"""What xIELU does not learn."""


class Block(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h)), with norms of the outputs where a family has them."""

    def __init__(self, make: LayerMaker):
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


class RecurrentBlock(nnx.Module):
    """h += mixer(norm(h)); h += mlp(norm(h)), with something else than attention as the mixer.

    Outputs are normed too where a family does that.
    """

    def __init__(self, make: LayerMaker, mixer: Callable):
        config, D = make.config, make.config.hidden_size
        self.input_layernorm = make.norm(D)
        self.mixer = mixer
        self.mixer_output_norm = make.norm(D) if config.post_norm else _identity
        self.post_attention_layernorm = make.norm(D)
        self.mlp = make.mlp()
        self.mlp_output_norm = make.norm(D) if config.post_norm else _identity

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
        self.mlp = make.mlp()

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
        self.mlp = make.mlp()

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
        self.v_proj = make.linear(D, G * C, config.qkv_bias)
        self.o_proj = make.linear(H * C, D, config.output_bias)
        self.q_norm, self.q_head_norm = make.qk_norms(H)
        self.k_norm, self.k_head_norm = make.qk_norms(G)
        self.q_turned_norm, self.k_turned_norm = make.turned_norm(), make.turned_norm()
        self.place = make.placement()

    def __call__(
        self, x: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        q = self.q_head_norm(_heads(self.q_norm(self.q_proj(x)), self.head_dim))
        k = self.k_head_norm(_heads(self.k_norm(self.k_proj(x)), self.head_dim))
        v = _heads(self.v_proj(x), self.head_dim)
        q, k = self.q_turned_norm(self.place(q, rope)), self.k_turned_norm(self.place(k, rope))
        out, extra = core(q, k, v)
        out = out.reshape(*x.shape[:2], -1)
        if self.g_proj is not None:
            gate = jax.nn.sigmoid(self.g_proj(x))
            out = out * jnp.repeat(gate, out.shape[-1] // gate.shape[-1], axis=-1)
        return self.o_proj(out), extra


class Convolution(nnx.Module):
    """Σ_j taps_j (u j positions before), channel by channel, in float32.

    `before` is what stands before each position in its own sequence, the nearest first.
    """

    def __init__(self, make: LayerMaker, channels: int):
        shape = (channels, 1, make.config.convolution_width)
        self.taps = nnx.Param(_INIT(make.rngs.params(), shape, make.param_dtype))
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


class XIELU(nnx.Module):
    """xIELU (Huang and Schlag 2024): a x² + βx where x > 0, else b (exp(min(x, ε)) - 1 - x) + βx.

    a and b are learned, one of each a layer.
    """

    def __init__(self, param_dtype: jnp.dtype):
        self.alpha_p = nnx.Param(jnp.full((1,), math.log(math.expm1(0.8)), param_dtype))
        self.alpha_n = nnx.Param(jnp.full((1,), math.log(math.expm1(0.8 - XIELU_BETA)), param_dtype))

    def __call__(self, x: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
        h = x.astype(jnp.float32)
        a = jax.nn.softplus(lead(self.alpha_p[...].astype(jnp.float32), h.ndim))
        b = XIELU_BETA + jax.nn.softplus(lead(self.alpha_n[...].astype(jnp.float32), h.ndim))
        below = (jnp.expm1(jnp.minimum(h, XIELU_EPS)) - h) * b
        return (jnp.where(h > 0, a * h * h, below) + XIELU_BETA * h).astype(x.dtype)


class Embedding(nnx.Module):
    """A table [V, D], looked up in the compute dtype."""

    def __init__(self, rows: int, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(_INIT(rngs.params(), (rows, dim), param_dtype))

    def __call__(self, index: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        return self.embedding[...].at[index].get(mode="clip").astype(self.dtype)


@dataclass(frozen=True)
class LayerMaker:
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

    def norm(self, *shape: int, use_bias: bool = True) -> RMSNorm | UnscaledRMSNorm | LayerNorm:
        if self.config.norm == "rms_unscaled":
            return UnscaledRMSNorm(self.config.norm_eps)
        common = {"eps": self.config.norm_eps, "param_dtype": self.param_dtype}
        if self.config.norm.startswith("rms"):
            return RMSNorm(*shape, offset=float(self.config.norm == "rms_offset"), **common)
        return LayerNorm(*shape, use_bias=use_bias and self.config.norm == "layer", **common)

    def qk_norms(self, heads: int) -> tuple[Callable, Callable]:
        """A norm before heads are split, and one after."""
        C = self.config.head_dim
        shapes = {"all_heads": (heads * C,), "head": (C,), "per_head": (heads, C)}
        if self.config.qk_norm in ("none", "turned_head"):
            return _identity, _identity
        norm = self.norm(*shapes[self.config.qk_norm], use_bias=False)
        return (norm, _identity) if self.config.qk_norm == "all_heads" else (_identity, norm)

    def turned_norm(self) -> Callable:
        """A norm of heads that were turned to their positions."""
        return self.norm(self.config.head_dim) if self.config.qk_norm == "turned_head" else _identity

    def activation(self) -> Callable:
        if self.config.activation == "xielu":
            return XIELU(self.param_dtype)
        return _ACTIVATIONS[self.config.activation]

    def placement(self) -> Callable:
        return _rotate if self.config.position == "rotary" else _unplaced

    def mlp(self) -> GatedMLP | MLP:
        return GatedMLP(self) if self.config.gated_mlp else MLP(self)

    def block(self, kind: str) -> Block | ParallelBlock | SharedParallelBlock | RecurrentBlock:
        if kind == "attention":
            return _BLOCKS[self.config.residual](self)
        return RecurrentBlock(self, _MIXERS[kind](self))


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
        return LayerMaker(make.config, rngs, make.dtype, make.param_dtype).block(kind)

    return create(make.rngs)


def _heads(x: Float[Array, "R T HC"], size: int) -> Float[Array, "R T H C"]:
    return x.reshape(*x.shape[:2], -1, size)


def _unit(x: Float32[Array, "R T H C"]) -> Float32[Array, "R T H C"]:
    """Of length one, as the kernels of flash-linear-attention make it."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


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
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

_MIXERS = {"convolution": ShortConvolution, "delta": GatedDeltaNet}
_BLOCKS = {"sequential": Block, "parallel": ParallelBlock, "parallel_shared": SharedParallelBlock}
