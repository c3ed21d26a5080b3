"""The kernel for GPUs is the plain attention behind the same mask: interpreted here, and lowered for CUDA."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_rows import make_layout, make_qkv
from numpy.testing import assert_allclose, assert_array_equal

from dpo.models.attention import attend_plain, visible
from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.attention_ranges import attend_ranges, block_size
from dpo.models.key_ranges import find_bounds, find_ranges

C = 8
LENGTH = 150  # padded to three blocks

# Groups as (prompt length, response lengths): shared prompts, one of them empty, ragged branches, padding.
ROWS = (((30, (25, 14)), (20, (9, 12))), ((5, (60, 50, 20)), (0, (9,))))


def value_and_gradients(attention, arrays, real):
    q, k, v, cotangent = arrays

    def loss(q, k, v):
        out = attention(q, k, v)
        return jnp.sum(jnp.where(real, out * cotangent, 0).astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def both(heads, *, dtype=jnp.float32, window=None, softcap=None, head_dim=C):
    """Output and gradients of real slots, by the kernel and by `attend_plain` in float32."""
    layout = make_layout(ROWS, LENGTH)
    real = (layout["group"] != 0)[..., None, None]
    arrays = make_qkv(len(ROWS), LENGTH, heads, head_dim, dtype)
    kernel = partial(attend_ranges, **layout, scale=0.3, window=window, softcap=softcap, interpret=True)
    ours = value_and_gradients(kernel, arrays, real)
    mask = visible(**layout, window=window)
    plain = partial(attend_plain, mask=mask, scale=0.3, softcap=softcap)
    exact = value_and_gradients(plain, [x.astype(jnp.float32) for x in arrays], real)
    return ours, [np.where(real, x, 0) for x in exact]  # padding: zeros, and no gradient


@pytest.mark.parametrize("window", [None, 1, 17, 2**30], ids=str)
def test_the_two_ranges_are_the_mask(window):
    layout = make_layout(ROWS, LENGTH)
    ranges = find_ranges(**layout, window=window)
    slot = np.arange(LENGTH)
    shared, end, own, seen_end = (np.asarray(x) for x in ranges)
    seen = (slot >= shared[..., None]) & (slot < end[..., None])
    seen |= (slot >= own[..., None]) & (slot <= slot[:, None])
    mask = np.asarray(visible(**layout, window=window))
    assert_array_equal(seen, mask)
    assert not (mask & (slot[:, None] >= seen_end[:, None, :])).any(), "no later query sees a key"
    has_query = mask.any(axis=1)
    if window is None:
        assert_array_equal(seen_end[has_query], (LENGTH - np.argmax(mask[:, ::-1], axis=1))[has_query])


@pytest.mark.parametrize(
    ("heads", "options"),
    [((2, 1), {}), ((1, 1), {"window": 17, "softcap": 0.7})],
    ids=["grouped heads", "window and soft-capping"],
)
def test_it_is_plain_attention_in_values_and_gradients(heads, options):
    ours, plain = both(heads, **options)
    for got, expected in zip(ours, plain, strict=True):
        assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_off_by_its_rounding_alone():
    """It is at most half as far again from float32 as plain attention on the same bfloat16 numbers."""
    layout = make_layout(ROWS, LENGTH)
    real = (layout["group"] != 0)[..., None, None]
    ours, exact = both((2, 1), dtype=jnp.bfloat16)
    arrays = make_qkv(len(ROWS), LENGTH, (2, 1), C, jnp.bfloat16)
    plain = value_and_gradients(partial(attend_plain, mask=visible(**layout), scale=0.3), arrays, real)
    for got, rounded, expected in zip(ours, plain, exact, strict=True):
        spread = np.sqrt(np.mean((rounded - expected) ** 2))
        assert np.sqrt(np.mean((got - expected) ** 2)) <= 1.5 * spread


def test_only_blocks_with_a_visible_key_are_read():
    """Of a long prompt with four responses: the blocks of the sibling responses are passed over."""
    layout = make_layout((((128, (128, 128, 128, 128)),),), 640)
    first, middle, second, last = (np.asarray(x)[0] for x in find_bounds(find_ranges(**layout), 64))
    read = np.maximum(middle - first, 0) + np.maximum(last - second, 0)
    assert_array_equal(read, [1, 2, *[3, 4] * 4])
    mask = np.asarray(visible(**layout))[0].reshape(10, 64, 10, 64).any(axis=(1, 3))
    assert_array_equal(read, mask.sum(axis=1))
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"{read.sum()} of the {10 * 11 // 2} blocks on and below the diagonal" in page


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block"),
    [(64, "bfloat16", 64), (256, "bfloat16", 64), (128, "float32", 64), (256, "float32", 32)],
)
def test_heads_of_many_bytes_have_smaller_blocks(head_dim, dtype, block):
    assert block_size(head_dim, dtype) == block


@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcap"), [(jnp.bfloat16, 64, None), (jnp.float32, 80, 0.7)], ids=str
)
def test_it_is_lowered_for_cuda_without_scores_in_memory(dtype, head_dim, softcap):
    """Three kernels, a window that is traced, and no array over pairs of slots (150, padded to 192).

    Under rematerialisation the forward kernel is called once: of what JAX writes out again nothing is used.
    """
    layout = make_layout(ROWS, LENGTH)
    q, k, v, _ = make_qkv(len(ROWS), LENGTH, (4, 2), head_dim, dtype)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES))
    def loss(q, k, v, window):
        out = attend_ranges(q, k, v, **layout, scale=0.3, window=window, softcap=softcap)
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = gradient.trace(q, k, v, jnp.asarray(17)).lower(lowering_platforms=("cuda",)).as_text()
    assert [text.count(f"attend_ranges_{name}") > 0 for name in ("fwd", "dq", "dkv")] == [True] * 3
    assert not any(f"{T}x{T}x" in text for T in (LENGTH, 192))
    assert "has_side_effect = true" not in text
    forward = [line.split(":")[0].strip() for line in text.splitlines() if "attend_ranges_fwd" in line]
    assert sum(f"{name}#" in text for name in forward) == 1
