"""The gated delta rule: chunks of any size give every sequence what it gives token by token, alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose

from dpo.models.delta_rule import continued, gated_delta, make_chunks

H, K, V = 2, 3, 4


def alone(state, q, k, v, g, beta):
    """One sequence in float64, token by token, as the paper writes it."""
    read = []
    for t in range(len(q)):
        state = state * np.exp(g[t])[:, None, None]
        found = np.einsum("hkv,hk->hv", state, k[t])
        state = state + np.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - found))
        read.append(np.einsum("hkv,hk->hv", state, q[t]))
    return np.asarray(read), state


def draw(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, ...]:
    q, k = rng.normal(size=(2, rows, length, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(rows, length, H, V))
    return q, k, v, -rng.exponential(0.5, size=(rows, length, H)), rng.uniform(size=(rows, length, H))


def draw_row(rng: np.random.Generator) -> tuple[list[int], list[int], list[list[int]]]:
    """Groups of a prompt and its responses: group, branch, and the slots of every sequence."""
    group: list[int] = []
    branch: list[int] = []
    sequences: list[list[int]] = []
    for number in range(1, rng.integers(2, 5)):
        parts = []
        for place in range(rng.integers(1, 5)):
            slots = len(group) + np.arange(rng.integers(1, 12))
            group += [number] * len(slots)
            branch += [place] * len(slots)
            parts.append(slots.tolist())
        sequences += [parts[0] + part for part in parts[1:]] or parts
    return group, branch, sequences


@pytest.mark.parametrize("size", [4, *(pytest.param(size, marks=pytest.mark.ci) for size in (1, 64))])
def test_every_sequence_reads_what_it_reads_alone(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = [draw_row(rng) for _ in range(12)]
    length = max(len(group) for group, _, _ in rows) + 2
    group, branch = (
        np.stack([np.pad(row[place], (0, length - len(row[place]))) for row in rows]) for place in (0, 1)
    )
    arrays = draw(rng, len(rows), length)
    zeros = jnp.zeros((len(rows), H, 2, K, V))
    chunks = make_chunks(jnp.asarray(group), jnp.asarray(branch), size)
    read, _ = jax.jit(gated_delta)(
        *(jnp.asarray(x, jnp.float32) for x in arrays), chunks=chunks, states=zeros
    )
    for row, (_, _, sequences) in enumerate(rows):
        for slots in sequences:
            expected, _ = alone(np.zeros((H, K, V)), *(x[row, slots] for x in arrays))
            assert_allclose(read[row, np.asarray(slots)], expected, atol=2e-5)


@pytest.mark.parametrize("size", [64, pytest.param(2, marks=pytest.mark.ci)])
def test_a_sequence_goes_on_from_its_state_and_padding_leaves_it(size: int) -> None:
    arrays = draw(np.random.default_rng(0), 2, 9)
    lengths = (9, 5)
    real = jnp.asarray([[slot < length for slot in range(9)] for length in lengths], jnp.int32)
    start = np.random.default_rng(1).normal(size=(2, H, 1, K, V))
    q, k, v, g, beta = (jnp.asarray(x, jnp.float32) for x in arrays)
    read, states = gated_delta(
        q, k, v, g, beta, chunks=continued(real, size), states=jnp.asarray(start, jnp.float32)
    )
    for row, length in enumerate(lengths):
        expected, state = alone(start[row, :, 0], *(x[row, :length] for x in arrays))
        assert_allclose(read[row, :length], expected, atol=2e-5)
        assert_allclose(states[row, :, 0], state, atol=2e-5)


def test_equal_keys_without_decay_are_solved_stably() -> None:
    """β = 1 and one key for all: each token replaces the value before; powers of the system are huge."""
    length = 64
    k = np.zeros((1, length, 1, K))
    k[..., 0] = 1
    v = np.random.default_rng(0).normal(size=(1, length, 1, V))
    given = (k, k, v, np.zeros((1, length, 1)), np.ones((1, length, 1)))
    chunks = make_chunks(jnp.ones((1, length), int), jnp.zeros((1, length), int))
    read, _ = gated_delta(
        *(jnp.asarray(x, jnp.float32) for x in given), chunks=chunks, states=jnp.zeros((1, 1, 2, K, V))
    )
    assert_allclose(read, v, atol=1e-5)


@pytest.mark.ci
def test_gradients_are_those_of_differences() -> None:
    rng = np.random.default_rng(3)
    group, branch, _ = draw_row(rng)
    arrays = [jnp.asarray(x, jnp.float32) for x in draw(rng, 1, len(group))]
    chunks = make_chunks(jnp.asarray([group]), jnp.asarray([branch]), 4)
    weights = jnp.asarray(rng.normal(size=(1, len(group), H, V)), jnp.float32)

    def total(*given):
        given = tuple(map(jnp.asarray, given))
        return (weights * gated_delta(*given, chunks=chunks, states=jnp.zeros((1, H, 2, K, V)))[0]).sum()

    check_grads(total, arrays, order=1, modes=("rev",), rtol=2e-2, atol=2e-2)
