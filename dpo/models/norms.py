"""Norms over the last axis: of a root mean square, with or without a scale, and of mean and variance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class UnscaledRMSNorm(nnx.Module):
    """x / rms(x) over the last axis, in float32."""

    def __init__(self, eps: float):
        self.eps = eps

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        h = x.astype(jnp.float32)
        return (h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)).astype(x.dtype)


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
        return (h * lead(scale, h.ndim)).astype(x.dtype).reshape(x.shape)


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
        h = h * lead(self.scale[...].astype(jnp.float32), h.ndim)
        if self.bias is not None:
            h = h + lead(self.bias[...].astype(jnp.float32), h.ndim)
        return h.astype(x.dtype).reshape(x.shape)


def lead(x: Array, ndim: int) -> Array:
    """Leading axes of size one, so that broadcasting is explicit."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
