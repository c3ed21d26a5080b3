"""Who sees whom."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from dpo.models.attention import attend, attend_plain, visible, visible_in_cache

GROUP = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 0]])
BRANCH = jnp.asarray([[0, 0, 1, 1, 2, 0, 1, 0]])
POSITIONS = jnp.asarray([[0, 1, 2, 3, 2, 0, 1, 0]])


def test_a_token_sees_its_prompt_and_its_branch():
    expected = [
        "x.......",  # prompt
        "xx......",
        "xxx.....",  # branch 1
        "xxxx....",
        "xx..x...",  # branch 2
        ".....x..",  # another group
        ".....xx.",
        "........",  # padding
    ]
    rows = ["".join(".x"[int(seen)] for seen in row) for row in visible(POSITIONS, GROUP, BRANCH)[0]]
    assert rows == expected


def test_a_window_counts_positions_not_slots():
    """Branch 2 at slot 4 is at position 2: a window of 2 reaches position 1, three slots back."""
    seen = visible(POSITIONS, GROUP, BRANCH, window=2)[0, 4]
    assert_array_equal(np.flatnonzero(seen), [1, 4])


def test_a_cache_is_seen_up_to_the_position_of_the_query():
    mask = visible_in_cache(jnp.asarray([[3], [1]]), 5, window=jnp.asarray(2))
    assert_array_equal(mask[:, 0], [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]])


def random_qkv(heads, groups):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, 8, heads, 4), (1, 8, groups, 4), (1, 8, groups, 4))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_implementations_agree_where_a_token_sees_anything():
    q, k, v = random_qkv(6, 2)
    layout: Any = {"positions": POSITIONS, "group": GROUP, "branch": BRANCH}
    choices = {"scale": 0.5, "window": jnp.asarray(3), "softcap": 2.0}
    plain = attend(q, k, v, **layout, **choices, implementation="plain")
    blocked = attend(q, k, v, **layout, **choices, implementation="blocked")
    assert_allclose(plain[:, :7], blocked[:, :7], atol=1e-6)


def test_query_heads_share_keys_in_order():
    q, k, v = random_qkv(6, 2)
    mask = jnp.tril(jnp.ones((1, 8, 8), bool))
    many_k, many_v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    assert_allclose(
        attend_plain(q, k, v, mask, scale=0.5), attend_plain(q, many_k, many_v, mask, scale=0.5), atol=1e-6
    )


def test_padding_has_no_nan_in_value_or_gradient():
    q, k, v = random_qkv(2, 2)
    layout: Any = {"positions": POSITIONS, "group": GROUP, "branch": BRANCH}

    def loss(q):
        return attend(q, k, v, **layout, scale=0.5, implementation="plain").sum()

    value, gradient = jax.value_and_grad(loss)(q)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
