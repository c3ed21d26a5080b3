"""Soft-capping against numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from dpo.models.attention import attend_cached
from dpo.models.soft_cap import soft_cap


@pytest.mark.parametrize("cap", [1.5, 50.0])
def test_a_capped_score_is_right_to_its_last_digits(cap: float) -> None:
    """In units of the last place: of the quotient, of tanh and of the product together."""
    rng = np.random.default_rng(0)
    x = cap * np.concatenate([rng.normal(size=2_000) * s for s in (1e-3, 0.1, 0.5, 2, 9)]).astype(np.float32)
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    found = np.asarray(jax.jit(lambda x: soft_cap(x, cap))(x))
    off = (found - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert np.abs(off).max() <= 3.5
    assert np.sqrt(np.mean(off**2)) <= 0.6
    slope = jax.jit(jax.vmap(jax.grad(lambda x: soft_cap(x, cap))))(x)
    assert_allclose(slope, 1 - (expected / cap) ** 2, atol=4e-7)


def test_attention_of_capped_scores_is_that_of_float64() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, 64, 1, 8)).astype(np.float32) for _ in range(3))
    scores = 50 * np.tanh(10 * np.einsum("rtgc,rsgc->ts", *map(np.float64, (q, k))) / 50)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v[0, :, 0].astype(np.float64)
    keys, values = jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.transpose(0, 2, 1, 3))
    seen = jnp.ones((1, 64, 64), bool)
    found = attend_cached(jnp.asarray(q), keys, values, seen, scale=10.0, softcap=50.0)
    assert_allclose(found[0, :, 0], expected, atol=4e-6)
