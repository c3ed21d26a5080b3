"""A frozen model in less memory: kernels in bfloat16, or in int8 with one scale an output.

Norms and biases stay float32, and embeddings are bfloat16 in both, because the output projection reads the
table as it is. Int8 is weight-only and symmetric: W ≈ Q · s with s = max |W| / 127 over the inputs of an
output. The scale commutes with the product, x W = (x Q) · s, so no float kernel of all layers ever exists.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from dpo.models.decoder import Decoder
from dpo.models.linear import Linear, Rounds, keep, product
from dpo.models.parts import Embedding

BaseDtype = Literal["float32", "bfloat16", "int8"]


class Int8Linear(nnx.Module):
    """x (Q · s) + b with an int8 Q; never trained."""

    def __init__(self, linear: Linear):
        rounded, scale = _round_to_int8(linear.full_kernel)
        self.dtype: Any = linear.dtype
        self.rounds: Rounds = linear.rounds
        self.kernel = nnx.Param(rounded)
        self.kernel_scale = nnx.Param(scale)
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n F"]:
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = product(flat, self.kernel[...].astype(self.dtype), self.rounds)
        y = y * self.kernel_scale[...].astype(y.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)[None, :]
        return keep(y.astype(self.dtype), self.rounds).reshape(*x.shape[:-1], -1)

    @property
    def full_kernel(self) -> Float32[Array, "*L D F"]:
        """Q · s."""
        return self.kernel[...].astype(jnp.float32) * self.kernel_scale[...]


def as_held(values: np.ndarray, leaf: str, dtype: BaseDtype) -> np.ndarray:
    """One parameter with the numbers that a model which is held as `dtype` computes with, in float32."""
    if dtype == "float32" or leaf not in ("kernel", "embedding"):
        return values
    if dtype == "int8" and leaf == "kernel":
        rounded, scale = _round_to_int8(jnp.asarray(values))
        return np.asarray(rounded.astype(jnp.float32) * scale)
    return values.astype(jnp.bfloat16).astype(np.float32)


def hold(model: Decoder, dtype: BaseDtype) -> None:
    """Change how a model's kernels and embeddings are held, in place and one after another."""
    if dtype == "float32":
        return
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Embedding):
            module.embedding = nnx.Param(module.embedding[...].astype(jnp.bfloat16))
        for name, child in list(vars(module).items()):
            if not isinstance(child, Linear):
                continue
            if dtype == "int8":
                setattr(module, name, Int8Linear(child))
            else:
                child.kernel = nnx.Param(child.kernel[...].astype(jnp.bfloat16))


def _round_to_int8(
    kernel: Float32[Array, "*L D F"],
) -> tuple[Int8[Array, "*L D F"], Float32[Array, "*L 1 F"]]:
    """Q and s of W ≈ Q · s."""
    largest = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return jnp.round(kernel / scale).astype(jnp.int8), scale
