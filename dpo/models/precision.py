"""The precision of a matrix product: float32 means float32 on every platform.

By default a TPU multiplies float32 in one bfloat16 pass and a GPU in TF32: 8 and 11 significant bits of 24,
where a log-ratio is the small difference of two large sums. Quicker products are asked for by name:
`model.compute_dtype`, `model.round_products`, or JAX_DEFAULT_MATMUL_PRECISION for a platform's own kinds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def precision_of(*operands: Array | DTypeLike) -> jax.lax.Precision | None:
    """What a product of these is asked for: all bits of float32, unless JAX was told a default precision.

    None leaves it to JAX. Shorter operands have no more bits than one pass takes; Mosaic refuses more passes.
    """
    is_float32 = jnp.result_type(*operands) == jnp.float32
    return jax.lax.Precision.HIGHEST if is_float32 and told_nothing() else None


def told_nothing() -> bool:
    """Whether JAX was told no default precision, by JAX_DEFAULT_MATMUL_PRECISION or in Python."""
    return jax.config.jax_default_matmul_precision is None  # type: ignore[attr-defined]
