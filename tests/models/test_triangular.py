"""Systems with a unit lower triangular matrix, solved by products, against numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from dpo.models.triangular import solve_unit_lower


def draw_systems(spread: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the delta rule: β kk' of keys that differ by `spread`, and known values."""
    rng = np.random.default_rng(size)
    k = rng.normal(size=(3, 1, 16)) + spread * rng.normal(size=(3, size, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0.98, 1.0, size=(3, size, 1))
    return (beta * (k @ k.swapaxes(-1, -2))).astype(np.float32), rng.normal(size=(3, size, 5))


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("spread", [0.0, 1e-2, 10.0])
def test_a_chunk_is_solved_to_the_last_digits(spread: float, size: int) -> None:
    """Keys nearly alike and β near 1: powers of the matrix would be 10¹⁸, and nothing right."""
    system, known = draw_systems(spread, size)
    expected = np.linalg.solve(np.eye(size) + np.tril(system.astype(np.float64), -1), known)
    found = jax.jit(solve_unit_lower)(jnp.asarray(system), jnp.asarray(known, jnp.float32))
    assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_gradients_are_those_of_the_inverse() -> None:
    """Of sum(w x): b̄ = T⁻ᵀ w, and T̄ the strictly lower part of -b̄ x'."""
    system, known = draw_systems(1.0, 8)
    weights = np.random.default_rng(1).normal(size=known.shape)
    inverse = np.linalg.inv(np.eye(8) + np.tril(system.astype(np.float64), -1))
    of_known = inverse.swapaxes(-1, -2) @ weights
    of_system = -np.tril(of_known @ (inverse @ known).swapaxes(-1, -2), -1)

    def total(system: jax.Array, known: jax.Array) -> jax.Array:
        return (jnp.asarray(weights, jnp.float32) * solve_unit_lower(system, known)).sum()

    found = jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(system), jnp.asarray(known, jnp.float32))
    for ours, expected in zip(found, (of_system, of_known), strict=True):
        assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
