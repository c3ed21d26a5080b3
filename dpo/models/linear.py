"""x W + b, as one 2-D matrix product in the backward pass too."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32


class Linear(nnx.Linear):
    """`nnx.Linear` over flattened positions.

    The gradient of W sums over all positions. Over two axes [R T], XLA's CPU backend first writes both
    operands out transposed, fused into whatever made them: a third of the backward pass. Over one axis it is
    a plain product.
    """

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n F"]:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    @property
    def full_kernel(self) -> Float32[Array, "*L D F"]:
        """W in float32."""
        return self.kernel[...].astype(jnp.float32)
