"""What layers are made with: their smallest parts, and who chooses them by the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


class Buffer(nnx.Variable):
    """Numbers of a checkpoint that are not learned: they are read and written, and stay as they are."""


WEIGHTS = (nnx.Param, Buffer)
"""What a checkpoint has of a model."""


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
        self.embedding = nnx.Param(INIT(rngs.params(), (rows, dim), param_dtype))

    def __call__(self, index: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        return self.embedding[...].at[index].get(mode="clip").astype(self.dtype)


@dataclass(frozen=True)
class LayerMaker:
    """Builds the sub-modules that a configuration asks for."""

    config: DecoderConfig
    rngs: nnx.Rngs
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    reads: bool = False
    """Whether its layers attend to the keys and values of another."""

    def linear(self, dim_in: int, dim_out: int, use_bias: bool) -> Linear:
        return Linear(
            dim_in,
            dim_out,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=INIT,
            rngs=self.rngs,
        )

    def embedding(self, rows: int, dim: int | None = None) -> Embedding:
        dim = self.config.hidden_size if dim is None else dim
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
            return identity, identity
        norm = self.norm(*shapes[self.config.qk_norm], use_bias=False)
        return (norm, identity) if self.config.qk_norm == "all_heads" else (identity, norm)

    def turned_norm(self) -> Callable:
        """A norm of heads that were turned to their positions."""
        return self.norm(self.config.head_dim) if self.config.qk_norm == "turned_head" else identity

    def activation(self) -> Callable:
        if self.config.activation == "xielu":
            return XIELU(self.param_dtype)
        return _ACTIVATIONS[self.config.activation]

    def placement(self) -> Callable:
        return _rotate if self.config.position == "rotary" else _unplaced


def identity(x: Array) -> Array:
    return x


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    return rotate(x, *rope)


def _unplaced(x: Array, rope: None) -> Array:
    return x


INIT = nnx.initializers.normal(0.02)

_ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
