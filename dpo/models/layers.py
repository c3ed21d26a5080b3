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
from jaxtyping import Array, Float, Int

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


class ConvolutionBlock(nnx.Module):
    """h += convolution(norm(h)); h += mlp(norm(h))."""

    def __init__(self, make: LayerMaker):
        D = make.config.hidden_size
        self.input_layernorm = make.norm(D)
        self.conv = ShortConvolution(make)
        self.post_attention_layernorm = make.norm(D)
        self.mlp = make.mlp()

    def __call__(
        self, h: Float[Array, "R T D"], rope: Any, core: Callable
    ) -> tuple[Float[Array, "R T D"], Any]:
        mixed, extra = self.conv(self.input_layernorm(h), core)
        h = h + mixed
        return h + self.mlp(self.post_attention_layernorm(h)), extra


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
        q = self.q_head_norm(self._heads(self.q_norm(self.q_proj(x))))
        k = self.k_head_norm(self._heads(self.k_norm(self.k_proj(x))))
        v = self._heads(self.v_proj(x))
        q, k = self.q_turned_norm(self.place(q, rope)), self.k_turned_norm(self.place(k, rope))
        out, extra = core(q, k, v)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), extra

    def _heads(self, x: Float[Array, "R T HC"]) -> Float[Array, "R T H C"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class ShortConvolution(nnx.Module):
    """o(c x * Σ_j taps_j (b x * v x) j positions before), channel by channel (LFM2).

    `core` hands over what stands before each position in its own sequence, the nearest first.
    """

    def __init__(self, make: LayerMaker):
        D, width = make.config.hidden_size, make.config.convolution_width
        self.b_proj, self.c_proj, self.x_proj = (make.linear(D, D, False) for _ in range(3))
        self.o_proj = make.linear(D, D, False)
        self.taps = nnx.Param(_INIT(make.rngs.params(), (D, 1, width), make.param_dtype))

    def __call__(self, x: Float[Array, "R T D"], core: Callable) -> tuple[Float[Array, "R T D"], Any]:
        u = self.b_proj(x) * self.x_proj(x)
        before, extra = core(u)
        taps = self.taps[...].astype(jnp.float32)[None, None, :, 0, ::-1]
        mixed = u.astype(jnp.float32) * taps[..., 0]
        for j, part in enumerate(before, start=1):
            mixed = mixed + part.astype(jnp.float32) * taps[..., j]
        return self.o_proj(self.c_proj(x) * mixed.astype(x.dtype)), extra


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

    def block(self, kind: str) -> Block | ParallelBlock | SharedParallelBlock | ConvolutionBlock:
        return _BLOCKS[self.config.residual](self) if kind == "attention" else ConvolutionBlock(self)


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

_BLOCKS = {"sequential": Block, "parallel": ParallelBlock, "parallel_shared": SharedParallelBlock}
