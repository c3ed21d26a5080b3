"""Who sees whom, and the attention that follows from it.

    tokens     p p p a a b b | q q c . .       one row: two groups and padding
    group      1 1 1 1 1 1 1 | 2 2 2 0 0
    branch     0 0 0 1 1 2 2 | 0 0 1 0 0

A key is visible when it is not later in the row, belongs to the same group (0 is padding), and is the prompt
(branch 0) or the query's own branch. A window of W counts positions, not slots: sibling responses lie between
a prompt and a late branch in the row, but not in the sequence.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo.models.attention_blocked import attend_blocked
from dpo.models.partition import ONE_DEVICE, ROWS, TENSOR, Partition

Implementation = Literal["auto", "plain", "blocked"]
Window = int | Int[Array, ""] | None

NO_WINDOW = 2**30
"""A window that hides nothing, for scanned layers of which only some have one."""

_HIDDEN = -1e30
"""Score of an invisible key: finite, so that a row of padding has no NaN in value or gradient."""


def skips_blocks(partition: Partition = ONE_DEVICE) -> bool:
    """Whether `auto` visits only what some query may see: a long row then costs no more than short ones."""
    return partition.platform == "cpu"


def visible(
    positions: Int[Array, "R T"], group: Int[Array, "R T"], branch: Int[Array, "R T"], window: Window = None
) -> Bool[Array, "R T T"]:
    """Mask [row, query, key] of rows that attend to themselves."""
    slot = jnp.arange(positions.shape[1])
    query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    mask = (slot[:, None] >= slot[None, :])[None]
    mask = mask & (group[query] == group[key]) & (group[key] != 0)
    mask = mask & ((branch[key] == 0) | (branch[key] == branch[query]))
    return mask if window is None else mask & (positions[query] - positions[key] < window)


def visible_in_cache(
    positions: Int[Array, "R S"], length: int, window: Window = None
) -> Bool[Array, "R S length"]:
    """Mask [row, query, slot] over a cache whose slot is the position that it holds."""
    slot = jnp.arange(length)[None, None, :]
    mask = slot <= positions[..., None]
    return mask if window is None else mask & (positions[..., None] - slot < window)


def attend(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R T G C"],
    v: Float[Array, "R T G C"],
    *,
    positions: Int[Array, "R T"],
    group: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    scale: float,
    window: Window = None,
    softcap: float | None = None,
    key_bias: Float[Array, "R T H"] | None = None,
    implementation: Implementation = "auto",
    partition: Partition = ONE_DEVICE,
) -> Float[Array, "R T H C"]:
    """Attention within rows; `auto` is blocked on a CPU and plain elsewhere. Both give the same result.

    `key_bias` is added to a key's scores (ALiBi); only `plain` has it. On a mesh rows stay on their devices,
    and so do heads where both kinds of them can be split.
    """
    heads = partition.divides(TENSOR, q.shape[2], k.shape[2])
    q, k, v = (partition.constrain(x, ROWS, None, heads) for x in (q, k, v))
    if implementation == "auto":
        implementation = "blocked" if skips_blocks(partition) else "plain"
    if implementation == "blocked" and key_bias is None:
        return attend_blocked(
            q,
            k,
            v,
            positions=positions,
            group=group,
            branch=branch,
            scale=scale,
            window=window,
            softcap=softcap,
            partition=partition,
        )
    mask = visible(positions, group, branch, window)
    out = attend_plain(q, k, v, mask, scale=scale, softcap=softcap, key_bias=key_bias)
    return partition.constrain(out, ROWS, None, heads)


def attend_plain(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R S G C"],
    v: Float[Array, "R S G C"],
    mask: Bool[Array, "R T S"],
    *,
    scale: float,
    softcap: float | None = None,
    key_bias: Float[Array, "R S H"] | None = None,
) -> Float[Array, "R T H C"]:
    """softmax(scale * q k, where visible) v in float32; query head h reads key head h // (H // G)."""
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    return attend_cached(q, keys, values, mask, scale=scale, softcap=softcap, key_bias=key_bias)


def attend_cached(
    q: Float[Array, "R T H C"],
    keys: Float[Array, "R G C S"],
    values: Float[Array, "R G S C"],
    mask: Bool[Array, "R T S"],
    *,
    scale: float,
    softcap: float | None = None,
    key_bias: Float[Array, "R S H"] | None = None,
) -> Float[Array, "R T H C"]:
    """`attend_plain` over keys and values laid out as a cache holds them."""
    R, T, H, C = q.shape
    G = keys.shape[1]
    q = q.reshape(R, T, G, H // G, C)
    scores = jnp.einsum("rtgqc,rgcs->rgqts", q, keys, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if key_bias is not None:
        S = keys.shape[-1]
        scores += key_bias.transpose(0, 2, 1).reshape(R, G, H // G, 1, S)
    scores = jnp.where(mask[:, None, None, :, :], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("rgqts,rgsc->rtgqc", weights, values).reshape(R, T, H, C)
