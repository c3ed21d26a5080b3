"""Adapters as modules over a linear: LoRA, rsLoRA and DoRA.

    y = x W + s (x A) B        A [D, r], B [r, F], both trained; W is not

LoRA (Hu et al. 2021, arXiv:2106.09685) has s = α/r, rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) s = α/√r.
DoRA (Liu et al. 2024, arXiv:2402.09353, Eq. 5) learns the length m of every output's weights besides:
W' = m (W + s A B) / ‖W + s A B‖, with the norm held constant in the derivative (its section 4.3).

A layer with α = 0 has no adapter: nothing of it is ever moved. Which linears have one is said by
`dpo.huggingface.adapters`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from dpo.models.linear import Linear
from dpo.models.precision import precision_of
from dpo.models.quantized import Int8Linear


class Method(NamedTuple):
    """Which of the four kinds of adapters."""

    use_rslora: bool = False
    use_dora: bool = False

    def divisor(self, rank: int) -> float:
        """s is α over it."""
        return math.sqrt(rank) if self.use_rslora else float(rank)


class LoraLinear(nnx.Module):
    """x W + s (x A) B [+ b] over a frozen linear."""

    def __init__(self, base: Linear | Int8Linear, a: nnx.LoRAParam, b: Array, alpha: Array, method: Method):
        self.method = method
        self.base = base
        self.lora_a = a
        self.lora_b = nnx.LoRAParam(b)
        self.lora_alpha = nnx.Variable(alpha)

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n F"]:
        flat = x.reshape(-1, x.shape[-1])
        y = self.base(flat)
        return (y + self._added(flat, y.dtype)).reshape(*x.shape[:-1], -1)

    @property
    def full_kernel(self) -> Float32[Array, "*L D F"]:
        """W + s A B in float32."""
        a, b = self.lora_a[...], self.lora_b[...]
        added = jnp.matmul(a, b, precision=precision_of(a, b))
        return self.base.full_kernel + self._scale[..., None, None] * added

    @property
    def _scale(self) -> Float32[Array, "*L"]:
        return self.lora_alpha[...] / self.method.divisor(self.lora_a[...].shape[-1])

    def _added(self, x: Float[Array, "n D"], dtype: Any) -> Float[Array, "n F"]:
        a, b = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
        low = jnp.matmul(x.astype(dtype), a, precision=precision_of(a)) * self._scale.astype(dtype)
        return jnp.matmul(low, b, precision=precision_of(b))


class DoraLinear(LoraLinear):
    """m (x W + s (x A) B) / ‖W + s A B‖ [+ b]; without a magnitude given, m is ‖W‖ and B must be 0."""

    def __init__(
        self,
        base: Linear | Int8Linear,
        a: nnx.LoRAParam,
        b: Array,
        alpha: Array,
        method: Method,
        *,
        magnitude: Array | None,
    ):
        super().__init__(base, a, b, alpha, method)
        self.lora_magnitude = nnx.LoRAParam(_norms(base.full_kernel) if magnitude is None else magnitude)

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n F"]:
        flat, bias = x.reshape(-1, x.shape[-1]), self.base.bias
        y = self.base(flat)
        length = self._length(super().full_kernel).astype(y.dtype)[None, :]
        if bias is None:
            y = (y + self._added(flat, y.dtype)) * length
        else:
            constant = bias[...].astype(y.dtype)[None, :]
            y = (y - constant + self._added(flat, y.dtype)) * length + constant
        return y.reshape(*x.shape[:-1], -1)

    @property
    def full_kernel(self) -> Float32[Array, "*L D F"]:
        """m (W + s A B) / ‖W + s A B‖ in float32."""
        kernel = super().full_kernel
        return kernel * self._length(kernel)[..., None, :]

    def _length(self, kernel: Float32[Array, "*L D F"]) -> Float32[Array, "*L F"]:
        """m / ‖W + s A B‖; 1 where there is no adapter, and for an output whose weights are all 0."""
        norms = _norms(jax.lax.stop_gradient(kernel))
        length = self.lora_magnitude[...] / jnp.where(norms > 0, norms, 1.0)
        return jnp.where((self.lora_alpha[...] == 0)[..., None] | (norms == 0), 1.0, length)


def _norms(kernel: Float32[Array, "*L D F"]) -> Float32[Array, "*L F"]:
    """Length of every output's weights."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2))
