"""Matrix products whose operands are rounded to bfloat16 and whose sums stay float32.

Tensor cores, TPUs and CPUs with AVX512-BF16 multiply bfloat16 at two or more times float32's rate and add in
float32 anyway. Weights are kept in float32, so that small updates are not lost; only what enters a product is
rounded, to 8 significant bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32

from dpo.models.precision import precision_of


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rounded_product(
    x: Float[Array, "n D"], w: Float[Array, "D F"], only_backward: bool = False, dtype: Any = jnp.float32
) -> Float[Array, "n F"]:
    """x W of operands rounded to bfloat16; in the backward pass dy is rounded before both products.

    Sums are float32 and are rounded to `dtype` at the end. With `only_backward` the value is the plain
    product, and the gradient that of rounded operands.
    """
    if only_backward:
        return jnp.matmul(x, w, precision=precision_of(x, w))
    return _product(_round(x), _round(w), _FORWARD, dtype)


def _forward(
    x: Float[Array, "n D"], w: Float[Array, "D F"], only_backward: bool, dtype: Any
) -> tuple[Array, tuple[Any, ...]]:
    return rounded_product(x, w, only_backward, dtype), (_round(x), w, jnp.zeros((), x.dtype))


def _backward(
    only_backward: bool, dtype: Any, residuals: tuple[Any, ...], cotangent: Float[Array, "n F"]
) -> tuple[Float[Array, "n D"], Float[Array, "D F"]]:
    x, w, like_x = residuals
    dy = _round(cotangent)
    return _product(dy, _round(w), _BY_OUTPUTS, like_x.dtype), rounded_sum(x, dy).astype(w.dtype)


def rounded_sum(x: Float[Array, "n D"], y: Float[Array, "n F"]) -> Float32[Array, "D F"]:
    """xᵀ y of rounded operands, float32."""
    x = jax.lax.platform_dependent(_round(x), cpu=_written_transposed, default=jnp.transpose)
    return _product(x, _round(y), _FORWARD, jnp.float32)


def _written_transposed(x: Float[Array, "n D"]) -> Float[Array, "D n"]:
    """xᵀ as rows in memory: XLA's CPU backend has no quick kernel for a transposed left operand."""
    return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))


def _round(x: Array) -> Array:
    return x.astype(jnp.bfloat16)


_Axes = tuple[tuple[tuple[int], tuple[int]], tuple[tuple[()], tuple[()]]]

_FORWARD: _Axes = (((1,), (0,)), ((), ()))
"""x W."""
_BY_OUTPUTS: _Axes = (((1,), (1,)), ((), ()))
"""x Wᵀ."""


def _product(x: Array, w: Array, axes: _Axes, dtype: Any) -> Array:
    """A product that is summed in float32, in `dtype`.

    Accelerators are asked for the rounded result at once: they would write a float32 array of twice the size
    and read it again. XLA's CPU backend sums in bfloat16 when it is asked for bfloat16, so it is not.
    """

    def in_float32(x: Array, w: Array) -> Array:
        return jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32)

    if dtype == jnp.float32:
        return in_float32(x, w)
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=lambda x, w: in_float32(x, w).astype(dtype),
        default=lambda x, w: jax.lax.dot_general(x, w, axes, preferred_element_type=dtype),
    )


rounded_product.defvjp(_forward, _backward)
