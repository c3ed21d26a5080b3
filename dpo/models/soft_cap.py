"""Soft-capping of scores and logits: cap * tanh(x / cap), to the last digit of float32.

XLA's tanh is off by up to 4.6 units in the last place, and by one on average below 0.3. A cap of 50 makes
1e-5 of it, where transformers' is off by 2e-6.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

_SERIES = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875)
"""tanh(x) / x in powers of x²."""


def soft_cap(x: Float32[Array, "*n"], cap: float) -> Float32[Array, "*n"]:
    """cap * tanh(x / cap)."""
    return cap * exact_tanh(x / cap)


@jax.custom_jvp
def exact_tanh(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Hyperbolic tangent: its series below 1/2, and 1 - 2 / (1 + exp(2x)) above."""
    size, square = jnp.abs(x), x * x
    series = jnp.polyval(jnp.asarray(_SERIES[:0:-1], np.float32), square, unroll=len(_SERIES))
    decayed = jnp.exp(-2 * size)
    return jnp.where(size < 0.5, x + x * square * series, jnp.sign(x) * (1 - 2 * decayed / (1 + decayed)))


@exact_tanh.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = exact_tanh(*primals)
    return y, (1 - y * y) * tangents[0]
