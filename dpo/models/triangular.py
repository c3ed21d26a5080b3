"""Systems with a unit lower triangular matrix, solved by products alone.

Matrix units have no triangular solve, and on a CPU it is a call of LAPACK for each matrix, with which
programs for several devices did not end. Here blocks of one, two, four … rows are inverted, a pair by two
products:

    (A 0; C B)⁻¹ = (A⁻¹ 0; -B⁻¹ C A⁻¹ B⁻¹)

The delta rule's system is β D kk' with |k| = 1 and β, D at most 1: no entry of an inverse or of C A⁻¹ is then
larger than 1, and no digits are lost. By powers of a nilpotent matrix, (1 - N)(1 + N²)(1 + N⁴) …, all of them
are lost where keys are alike.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def solve_unit_lower(
    system: Float32[Array, "*n c c"], known: Float32[Array, "*n c m"]
) -> Float32[Array, "*n c m"]:
    """x of (1 + strictly lower part of `system`) x = known; c is a power of two."""
    return _product(invert_unit_lower(system), known)


def invert_unit_lower(system: Float32[Array, "*n c c"]) -> Float32[Array, "*n c c"]:
    """The inverse of 1 + the strictly lower part of `system`; c is a power of two."""
    *batch, size, _ = system.shape
    assert size & (size - 1) == 0, size
    inverse, rows = jnp.ones((*batch, size, 1, 1), system.dtype), 1
    while rows < size:
        pairs = inverse.reshape(*batch, -1, 2, rows, rows)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        below = -_product(_product(second, _below(system, rows)), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([below, second], axis=-1)], axis=-2)
        rows *= 2
    return inverse.reshape(system.shape)


def _below(system: Float32[Array, "*n c c"], rows: int) -> Float32[Array, "*n p r r"]:
    """Of each two neighbouring blocks of rows, what is below the first and beside the second."""
    *batch, size, _ = system.shape
    pairs = size // (2 * rows)
    blocks = system.reshape(*batch, pairs, 2, rows, pairs, 2, rows)[..., 1, :, :, 0, :].swapaxes(-2, -3)
    return blocks.reshape(*batch, -1, rows, rows)[..., :: pairs + 1, :, :]


def _forward(system: Array, known: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = invert_unit_lower(system)
    solved = _product(inverse, known)
    return solved, (inverse, solved)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """With x = T⁻¹ b: the gradient of b is T⁻ᵀ x̄, and of T its product with -xᵀ."""
    inverse, solved = kept
    of_known = _product(inverse.swapaxes(-1, -2), gradient)
    return -jnp.tril(_product(of_known, solved.swapaxes(-1, -2)), -1), of_known


solve_unit_lower.defvjp(_forward, _backward)
