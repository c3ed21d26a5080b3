"""The tiles of attention_blocked: which blocks of queries meet which of keys, read, written, visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

TILES = 6
"""Tiles a step of the loop, computed side by side (docs/performance.md)."""


ZERO = np.uint32(0)
"""Unsigned, so that no code is made for negative places."""


class Layout(NamedTuple):
    """Who sees whom."""

    positions: Int[Array, "R T"]
    group: Int[Array, "R T"]
    branch: Int[Array, "R T"]
    window: Int[Array, ""] | None


class Place(NamedTuple):
    """Which block of queries meets which block of keys: numbers, and slots where blocks start."""

    row: Array
    head: Array
    q_slot: Array
    k_slot: Array
    real: Array
    """0 where the schedule is over."""


class Schedule(NamedTuple):
    """The tiles to visit: the first `count` of `places`."""

    places: Int[Array, "n 5"]
    count: Int[Array, ""]


def each_tile(schedule: Schedule, tile: Callable, merge: Callable, state: Any) -> tuple[Any, Any]:
    """`merge` what `tile` finds at every place into the state; and what to hold on to (`holding`).

    A step computes up to `TILES` that do not depend on each other, then merges them one after the other.
    XLA's CPU runtime runs independent operations side by side if enough of them are ready and no two use
    the same memory. Temporaries of a loop's body share memory; what a loop carries does not. So it carries
    every product and every operand of one, though nobody reads them.
    """
    width = min(TILES, len(schedule.places))
    places = [_place(schedule, jnp.int32(i)) for i in range(width)]
    spare = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: [tile(p) for p in places])
    )

    def step(n, carry):
        state, _ = carry
        places = [_place(schedule, n * width + i) for i in range(width)]
        found = [tile(place) for place in places]
        for place, (result, _) in zip(places, found, strict=True):
            state = merge(state, place, result)
        return state, found

    return jax.lax.fori_loop(0, -(-schedule.count // width), step, (state, spare))


def holding(result: Array, spare: Any) -> Array:
    """`result`, of which the compiler takes one entry to depend on the spare arrays, so that it keeps them.

    The entry changes only if one of theirs is infinite.
    """
    entries = [x.reshape(-1)[0].astype(jnp.float32) for x in jax.tree.leaves(spare)]
    first = result[(slice(1),) * result.ndim]
    first = jnp.where(jnp.stack(entries).max() == jnp.inf, jnp.inf, first).astype(result.dtype)
    return jax.lax.dynamic_update_slice(result, first, (ZERO,) * result.ndim)


def _place(schedule: Schedule, n: Array) -> Place:
    place = jax.lax.dynamic_slice(schedule.places, (n.astype(jnp.uint32), ZERO), (1, 5))[0]
    return Place(*(place[i] for i in range(5)))


class Tiles:
    """Reads and writes blocks: [M, C] of queries with M = B F, F = H / G; [B, C] of keys and values."""

    def __init__(self, layout: Layout, folded: int, block: int):
        self._layout, self._folded, self._block = layout, folded, block
        self._query_slots = [jnp.repeat(x, folded, axis=1) for x in layout[:3]]

    def queries(self, array: Float[Array, "R T H ..."], at: Place) -> Float[Array, "M ..."]:
        tile = self.query_slice(array, at)
        return tile.reshape(-1, *tile.shape[3:])

    def keys(self, array: Float[Array, "R G T C"], at: Place) -> Float[Array, "B C"]:
        return self.key_slice(array, at)[0, 0]

    def query_slice(self, array: Float[Array, "R T H ..."], at: Place) -> Float[Array, "1 B F ..."]:
        sizes = (1, self._block, self._folded, *array.shape[3:])
        return jax.lax.dynamic_slice(array, self._queries_at(at, array.ndim), sizes)

    def key_slice(self, array: Float[Array, "R G T C"], at: Place) -> Float[Array, "1 1 B C"]:
        sizes = (1, 1, self._block, array.shape[3])
        return jax.lax.dynamic_slice(array, (at.row, at.head, at.k_slot, ZERO), sizes)

    def write(
        self, array: Float[Array, "R T H ..."], tile: Float[Array, "1 B F ..."], at: Place
    ) -> Float[Array, "R T H ..."]:
        return jax.lax.dynamic_update_slice(array, tile, self._queries_at(at, array.ndim))

    def write_keys(
        self, array: Float[Array, "R G T C"], tile: Float[Array, "1 1 B C"], at: Place
    ) -> Float[Array, "R G T C"]:
        return jax.lax.dynamic_update_slice(array, tile, (at.row, at.head, at.k_slot, ZERO))

    def visible(self, at: Place) -> Bool[Array, "M B"]:
        """`attention.visible` of one block of queries and one of keys."""
        rows = self._block * self._folded
        query = [self._slots(x, at.row, at.q_slot * self._folded, rows)[:, None] for x in self._query_slots]
        key = [self._slots(x, at.row, at.k_slot, self._block)[None, :] for x in self._layout[:3]]
        q_slot = at.q_slot + np.repeat(np.arange(self._block, dtype=np.uint32), self._folded)
        mask = q_slot[:, None] >= at.k_slot + jnp.arange(self._block, dtype=jnp.uint32)[None, :]
        mask = mask & (query[1] == key[1]) & (key[1] != 0) & ((key[2] == 0) | (key[2] == query[2]))
        if self._layout.window is not None:
            mask = mask & (query[0] - key[0] < self._layout.window)
        return mask & (at.real != 0)

    def _slots(self, array: Int[Array, "R n"], row: Array, start: Array, size: int) -> Int[Array, " m"]:
        return jax.lax.dynamic_slice(array, (row, start.astype(jnp.uint32)), (1, size))[0]

    def _queries_at(self, at: Place, ndim: int) -> tuple:
        return at.row, at.q_slot, at.head * np.uint32(self._folded), *(ZERO,) * (ndim - 3)


def make_schedule(layout: Layout, block: int, num_kv_heads: int) -> Schedule:
    """The blocks of keys that each block of queries has to see, one tile for each key/value head.

    Ranges of group and branch numbers decide, so that a tile too many may be visited (its mask is empty),
    but never one too few.
    """
    R, T = layout.group.shape
    positions, group, branch = (x.reshape(R, T // block, block) for x in layout[:3])
    code = group * (1 + branch.max()) + branch
    real = group != 0
    queries = _range(group, real), _range(code, real)
    prompts, keys = _range(group, real & (branch == 0)), _range(code, real)
    needed = _overlap(queries[0], prompts) | _overlap(queries[1], keys)
    needed = needed & jnp.tri(T // block, dtype=bool)[None]
    if layout.window is not None:
        nearest = positions.min(axis=-1)[:, :, None] - positions.max(axis=-1)[:, None, :]
        needed = needed & (nearest < layout.window)
    chosen = jnp.stack(jnp.nonzero(needed, size=needed.size, fill_value=0), axis=1)
    tiles = jnp.repeat(chosen, num_kv_heads, axis=0)
    n = jnp.arange(len(tiles) + -len(tiles) % min(TILES, len(tiles)))
    count = needed.sum() * num_kv_heads
    tiles = jnp.pad(tiles, ((0, len(n) - len(tiles)), (0, 0)))
    columns = tiles[:, 0], n % num_kv_heads, tiles[:, 1] * block, tiles[:, 2] * block, n < count
    return Schedule(jnp.stack(columns, axis=1).astype(jnp.uint32), count)


def _range(numbers: Int[Array, "R n B"], where: Bool[Array, "R n B"]) -> tuple[Array, Array]:
    """Least and greatest number of each block; an empty range where there is none."""
    least = jnp.where(where, numbers, jnp.iinfo(jnp.int32).max).min(axis=-1)
    return least, jnp.where(where, numbers, -1).max(axis=-1)


def _overlap(queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Bool[Array, "R n n"]:
    least, greatest = (x[:, :, None] for x in queries)
    return (least <= keys[1][:, None, :]) & (keys[0][:, None, :] <= greatest)
