"""x W + b, as one 2-D matrix product in the backward pass too."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from dpo.models.precision import precision_of
from dpo.models.products import rounded_product

Rounds = Literal["neither", "backward", "both"]
"""Passes in which the operands of a product are rounded to bfloat16."""

PRODUCT = "product"
"""Name of a rounded product for remat policies, which do not see the product inside a custom gradient."""


class Linear(nnx.Linear):
    """`nnx.Linear` over flattened positions.

    The gradient of W sums over all positions. Over two axes [R T], XLA's CPU backend first writes both
    operands out transposed, fused into whatever made them: a third of the backward pass. Over one axis it is
    a plain product.

    `rounds` is "both" with bfloat16 activations; `round_products` sets it when activations stay float32.
    """

    def __init__(self, dim_in: int, dim_out: int, **options: Any):
        super().__init__(dim_in, dim_out, **options)
        self.precision = precision_of(self.dtype or self.param_dtype)
        self.rounds: Rounds = "both" if self.dtype == jnp.bfloat16 else "neither"

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n F"]:
        flat = x.reshape(-1, x.shape[-1])
        if self.rounds == "neither":
            return super().__call__(flat).reshape(*x.shape[:-1], -1)
        if self.bias is None:
            y = product(flat, self.kernel[...], self.rounds, self.dtype)
        else:  # added to the float32 sum, before it is rounded
            y = product(flat, self.kernel[...], self.rounds)
            y = y + self.bias[...].astype(y.dtype)[None, :]
        return keep(y.astype(self.dtype), self.rounds).reshape(*x.shape[:-1], -1)

    @property
    def full_kernel(self) -> Float32[Array, "*L D F"]:
        """W in float32."""
        return self.kernel[...].astype(jnp.float32)


def product(
    x: Float[Array, "n D"], w: Float[Array, "D F"], rounds: Rounds, dtype: Any = jnp.float32
) -> Float[Array, "n F"]:
    """x W, rounded in some passes; the result is in `dtype` where both are rounded, else as the operands."""
    if rounds == "neither":
        return jnp.matmul(x, w, precision=precision_of(x, w))
    return rounded_product(x, w, rounds == "backward", dtype)


def keep(y: Float[Array, "n F"], rounds: Rounds) -> Float[Array, "n F"]:
    """What a linear gives, named for remat policies: in its own dtype, half the bytes of the float32 sum."""
    return y if rounds == "neither" else checkpoint_name(y, PRODUCT)


def round_products(model: nnx.Module, rounds: Rounds) -> None:
    """Set in which passes a model and its linears round, in place."""
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "rounds"):
            setattr(module, "rounds", rounds)  # noqa: B010
