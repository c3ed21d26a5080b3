"""The two ranges of keys that each slot sees, and the blocks that hold them: what attention_ranges reads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32


class Ranges(NamedTuple):
    """Of each slot: the keys that it sees as a query, and the last query that sees it as a key."""

    shared: Int32[Array, "R T"]
    """First key of the prompt that is seen; a prompt's own tokens have no such range."""
    shared_end: Int32[Array, "R T"]
    """One after the last one; equal to `shared` where there is none."""
    own: Int32[Array, "R T"]
    """First key of the own branch that is seen; the last one is the slot itself. Behind it where padding."""
    seen_end: Int32[Array, "R T"]
    """One after the last query that may see this slot; 0 where padding."""


class Bounds(NamedTuple):
    """Blocks that a block of queries reads keys from: [first, middle) and [second, last)."""

    first: Int32[Array, "R B"]
    middle: Int32[Array, "R B"]
    second: Int32[Array, "R B"]
    last: Int32[Array, "R B"]


def find_ranges(
    positions: Int[Array, "R T"],
    group: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    *,
    window: int | Int[Array, ""] | None = None,
) -> Ranges:
    """The two ranges of keys of each slot of a batch's rows.

    Groups are contiguous, a group is its prompt and then its branches, and positions count from 0 in a group
    (`dpo.data.batch`): the prompt's key at position p is p slots after the prompt's first.
    """
    slot = jnp.broadcast_to(jnp.arange(group.shape[1], dtype=jnp.int32), group.shape)
    new_group = _differs_from_previous(group)
    new_branch = new_group | _differs_from_previous(branch)
    first_branch = (branch > 0) & (new_group | (_previous(branch) == 0))
    is_real, is_branch = group != 0, branch > 0
    shared = _latest(slot, new_group)
    shared_end = _latest(slot, first_branch)
    own = _latest(slot, new_branch)
    seen_end = jnp.where(is_branch, _next(slot, new_branch), _next(slot, new_group))
    if window is not None:
        reach = jnp.minimum(jnp.asarray(window, jnp.int32), group.shape[1])
        shared = shared + jnp.maximum(positions.astype(jnp.int32) - reach + 1, 0)
        own = jnp.maximum(own, slot - reach + 1)
        seen_end = jnp.where(is_branch, jnp.minimum(seen_end, slot + reach), seen_end)
    has_prompt = is_real & is_branch
    shared_end = jnp.where(has_prompt, shared_end, 0)
    return Ranges(
        shared=jnp.where(has_prompt, jnp.minimum(shared, shared_end), 0),
        shared_end=shared_end,
        own=jnp.where(is_real, own, slot + 1),
        seen_end=jnp.where(is_real, seen_end, 0),
    )


def find_bounds(ranges: Ranges, size: int) -> Bounds:
    """Blocks of keys of each block of `size` queries; what lies between its two ranges is left out."""
    R, T = ranges.own.shape

    def blocks(x: Int[Array, "R T"]) -> Int[Array, "R B q"]:
        return x.reshape(R, T // size, size)

    has_prompt = ranges.shared_end > ranges.shared
    slot = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (R, T))
    is_real = ranges.own <= slot
    first = blocks(jnp.where(has_prompt, ranges.shared, T)).min(-1) // size
    middle = -(-blocks(jnp.where(has_prompt, ranges.shared_end, 0)).max(-1) // size)
    second = blocks(jnp.where(is_real, ranges.own, T)).min(-1) // size
    last = -(-blocks(jnp.where(is_real, slot + 1, 0)).max(-1) // size)
    first = jnp.where(second <= middle, jnp.minimum(first, second), first)
    return Bounds(first, middle, jnp.maximum(second, middle), last)


def _previous(x: Int[Array, "R T"]) -> Int[Array, "R T"]:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _differs_from_previous(x: Int[Array, "R T"]) -> Bool[Array, "R T"]:
    """True in the first slot, and where a value is not the one before."""
    return (x != _previous(x)).at[:, 0].set(True)


def _latest(slot: Int[Array, "R T"], begins: Bool[Array, "R T"]) -> Int[Array, "R T"]:
    """The last slot up to each one at which something begins; 0 where none does."""
    return jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)


def _next(slot: Int[Array, "R T"], begins: Bool[Array, "R T"]) -> Int[Array, "R T"]:
    """The first slot after each one at which something begins; T where none does."""
    length = slot.shape[1]
    after = jnp.where(begins, slot, length)
    after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return jax.lax.cummin(after, axis=1, reverse=True)
