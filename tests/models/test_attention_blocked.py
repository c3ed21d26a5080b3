"""Blocked attention is the plain one, in values and gradients, for every layout, window and head count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_rows import make_layout, make_qkv

from dpo.models.attention import NO_WINDOW, attend_plain, visible
from dpo.models.attention_blocked import attend_blocked
from dpo.models.attention_tiles import TILES
from dpo.models.attention_tiles import Layout as _Layout
from dpo.models.attention_tiles import make_schedule as _schedule

T, C = 48, 8

# Groups as (prompt length, response lengths): a row of pairs, ragged branches, one long group, padding only.
ROWS = (
    ((5, (4, 6)), (9, (3, 2)), (1, (1,))),
    ((7, (2, 9, 1, 5, 3)), (10, ())),
    ((16, (20, 12)),),
    (),
)


def _layout(rows=ROWS, length=T) -> dict:
    return make_layout(rows, length)


def _qkv(rows, length, H, G, dtype=jnp.float32):
    return make_qkv(rows, length, (H, G), C, dtype)


def _compare(layout, H, G, dtype=jnp.float32, atol=2e-5, **options):
    """Value and gradients under a random cotangent; the plain path's padding rows are not compared."""
    rows, length = layout["group"].shape
    q, k, v, weight = _qkv(rows, length, H, G, dtype)
    weight = weight * (layout["group"] != 0)[:, :, None, None].astype(dtype)
    block = options.pop("block")
    scale, softcap, window = 0.3, options.get("softcap"), options.get("window")

    def blocked(q, k, v):
        out = attend_blocked(q, k, v, **layout, scale=scale, softcap=softcap, window=window, block=block)
        return jnp.sum((out * weight).astype(jnp.float32)), out * (weight != 0)

    def plain(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        out = attend_plain(q, k, v, visible(**layout, window=window), scale=scale, softcap=softcap)
        return jnp.sum(out * weight.astype(jnp.float32)), out * (weight != 0)

    got, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (blocked, plain)
    )
    for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(exact, np.float32), rtol=atol, atol=atol
        )


@pytest.mark.parametrize(
    ("heads", "block"),
    [
        ((6, 2), 8),
        *(pytest.param(*twin, marks=pytest.mark.slow) for twin in (((6, 2), 48), ((3, 3), 16), ((4, 1), 16))),
    ],
    ids=str,
)
def test_packed_rows_and_ragged_branches(heads, block):
    _compare(_layout(), *heads, block=block)


@pytest.mark.parametrize(
    "window", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(NO_WINDOW, marks=pytest.mark.slow)]
)
def test_windows_count_positions(window):
    _compare(_layout(), 4, 2, block=8, window=window)


def test_softcap():
    _compare(_layout(), 4, 2, block=16, softcap=0.7, window=11)


def test_length_that_is_no_multiple_of_the_block():
    _compare(_layout(length=T + 5), 4, 2, block=16)


def test_block_longer_than_the_row():
    _compare(_layout(), 4, 2, block=64)


def test_groups_and_branches_in_any_order_of_slots():
    """The schedule may not assume that groups are contiguous or numbered upwards."""
    rng = np.random.default_rng(0)
    layout = _layout()
    layout["group"] = jnp.array(rng.integers(0, 4, layout["group"].shape), jnp.int32)
    layout["branch"] = jnp.array(rng.integers(0, 3, layout["group"].shape), jnp.int32)
    mask = visible(**layout)
    layout["group"] = jnp.where(mask.any(axis=-1), layout["group"], 0)
    _compare(layout, 4, 2, block=8)


def test_bfloat16_sums_in_float32():
    _compare(_layout(), 4, 2, dtype=jnp.bfloat16, atol=0.04, block=16)


def test_window_may_be_traced_and_layers_scanned_and_rematerialised():
    layout = _layout()
    q, k, v, _ = _qkv(len(ROWS), T, 4, 4)
    windows = jnp.array([3, NO_WINDOW])

    def total(attend, q):
        def layer(x, window):
            return attend(x, window), None

        return jnp.sum(
            jax.lax.scan(jax.checkpoint(layer), q, windows)[0] * (layout["group"] != 0)[..., None, None]
        )

    def blocked(x, window):
        return attend_blocked(x, k, v, **layout, scale=0.3, window=window, block=16)

    def plain(x, window):
        return attend_plain(x, k, v, visible(**layout, window=window), scale=0.3)

    ours, exact = (jax.jit(jax.grad(lambda q, f=f: total(f, q)))(q) for f in (blocked, plain))
    np.testing.assert_allclose(ours, exact, atol=2e-5)


def test_padding_gives_zeros_and_gets_no_gradient():
    layout = _layout()
    q, k, v, weight = _qkv(len(ROWS), T, 4, 2)
    padding = (layout["group"] == 0)[:, :, None, None]

    def total(q, k, v):
        return jnp.sum(weight * attend_blocked(q, k, v, **layout, scale=0.3, block=16))

    assert not (attend_blocked(q, k, v, **layout, scale=0.3, block=16) * padding).any()
    for gradient in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v):
        assert jnp.isfinite(gradient).all()
        assert not (gradient * padding).any()


def test_only_blocks_that_someone_sees_are_visited():
    """Two groups of 16 slots, then one of a prompt of 8 with responses of 8 and 8, in blocks of 8."""
    layout = _layout((((12, (2, 2)), (12, (2, 2)), (8, (8, 8))),), length=56)
    places, count = _schedule(_Layout(**layout, window=None), 8, num_kv_heads=2)
    visited = [(int(q) // 8, int(k) // 8, int(head)) for _, head, q, k, real in places if real]
    blocks = [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3), (4, 4), (5, 4), (5, 5), (6, 4), (6, 6)]
    assert visited == [(q, k, head) for q, k in blocks for head in (0, 1)]
    assert int(count) == len(visited)
    assert len(places) % TILES == 0


@pytest.mark.parametrize("backward", [False, True])
def test_tiles_of_a_step_have_memory_of_their_own(backward):
    """The compiled loop carries every product of queries and keys: see `attention_tiles.each_tile`."""
    layout, (q, k, v, _) = _layout(), _qkv(len(ROWS), T, 4, 2)

    def total(q, k, v):
        return jnp.sum(attend_blocked(q, k, v, **layout, scale=0.3, block=16) ** 2)

    text = jax.jit(jax.grad(total, (0, 1, 2)) if backward else total).lower(q, k, v).compile().as_text() or ""
    loops = [line.split(" while(")[0] for line in text.splitlines() if " while(" in line]
    carried = sorted(loop.count("f32[32,16]") for loop in loops if "f32[32,16]" in loop)
    # Forward: the product and its softmax; backward: that, another product and its gradient.
    assert carried == [2 * TILES, 4 * TILES][: 1 + backward]


def test_memory_grows_linearly_with_the_row():
    def temporary_bytes(length):
        layout = jax.eval_shape(lambda: _layout(((), ()), length))
        q, k, v, _ = jax.eval_shape(lambda: _qkv(2, length, 4, 2))

        def total(q, k, v, layout):
            return jnp.sum(attend_blocked(q, k, v, **layout, scale=0.3))

        analysis = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v, layout).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary_bytes(2048) < 4.5 * temporary_bytes(512)
