"""Rows for tests of attention: groups as (prompt length, response lengths), with random queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np


def make_layout(rows, length) -> dict:
    """Positions, group and branch of rows that hold these groups one after the other, then padding."""
    positions, group, branch = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for r, groups in enumerate(rows):
        slot = 0
        for g, (prompt, responses) in enumerate(groups, start=1):
            for b, (start, size) in enumerate([(0, prompt), *((prompt, n) for n in responses)]):
                where = slice(slot, slot + size)
                positions[r, where] = start + np.arange(size)
                group[r, where], branch[r, where] = g, b
                slot += size
    return {"positions": jnp.array(positions), "group": jnp.array(group), "branch": jnp.array(branch)}


def make_qkv(rows, length, heads, head_dim, dtype=jnp.float32):
    """Queries, keys, values and a cotangent for (query, key/value) `heads`."""
    H, G = heads
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (rows, length, n, head_dim)).astype(dtype)
        for key, n in zip(keys, (H, G, G, H), strict=True)
    ]
