"""Exact attention as 2-D matrix products over blocks that are visible: the fast path on a CPU.

XLA's CPU backend runs an einsum over rows and heads ten times slower than a plain matrix product. So this is
a loop over (row, block of queries, key/value head); the query heads that share a key/value head are folded
into the rows of the product. An inner loop walks the blocks of keys of which some query may see one:

    keys        0 1 2 3 4 5
    queries 0   x                 one row: a group in blocks 0-1, a long one with
            1   x x               branches in 2-5. Other groups, later slots and
            2     x x             sibling branches are never multiplied.
            3       x x
            4       x   x
            5       x     x

The softmax is accumulated block by block (Milakov and Gimelshein 2018), and the backward pass makes the
probabilities again from the saved log-normalisers (Dao et al. 2022): memory is linear in T. Products take the
inputs' dtype and sum in float32, where softmax and accumulators stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo.models.partition import ONE_DEVICE, ROWS, TENSOR, Partition

BLOCK = 64
"""Slots a block: the quickest of 32, 64, 128 and 256 for heads of 64 on AVX-512 (docs/performance.md)."""

SAVED_NAMES = ("attention_output", "attention_normaliser")
"""What a rematerialisation policy may save so that the forward pass is not run again."""

_HIDDEN = -1e30
_LEAST = -1e29
"""Start of the running maximum: above hidden scores, so that exp(_HIDDEN - maximum) is 0 and not 1."""


def attend_blocked(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R T G C"],
    v: Float[Array, "R T G C"],
    *,
    positions: Int[Array, "R T"],
    group: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    scale: float,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
    partition: Partition = ONE_DEVICE,
) -> Float[Array, "R T H C"]:
    """The attention of `attention.attend`; padding slots give zeros and get no gradient.

    On a mesh every device attends to its own rows and heads: the compiler would gather them for a loop.
    """
    length = q.shape[1]
    block = min(block, length)
    slots = ((0, 0), (0, -length % block))
    q, k, v = (jnp.pad(x, (*slots, (0, 0), (0, 0))) for x in (q, k, v))
    layout = _Layout(
        *(jnp.pad(x, slots).astype(jnp.int32) for x in (positions, group, branch)),
        window=None if window is None else jnp.asarray(window, jnp.int32),
    )
    out: Array = _attend(scale, softcap, block, partition, q, k, v, layout)
    return out[:, :length]


class _Layout(NamedTuple):
    """Who sees whom."""

    positions: Int[Array, "R T"]
    group: Int[Array, "R T"]
    branch: Int[Array, "R T"]
    window: Int[Array, ""] | None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(scale, softcap, block, partition, q, k, v, layout) -> Array:
    return _forward(scale, softcap, block, partition, q, k, v, layout)[0]


def _forward(scale, softcap, block, partition, q, k, v, layout):
    local = partial(_forward_local, scale, softcap, block)
    saved = on_own_rows_and_heads(partition, local, q, k, v, layout)
    out, normaliser = (checkpoint_name(x, n) for x, n in zip(saved, SAVED_NAMES, strict=True))
    return out, (q, k, v, layout, out, normaliser)


def _forward_local(scale, softcap, block, q, k, v, layout):
    tiles = _Tiles(q.shape, k.shape[2], block)
    keys, values = _heads_first(k), _heads_first(v)
    order, count = _schedule(layout, block)

    def query_block(step, state):
        at = tiles.index(step)
        queries = tiles.queries(q, at)

        def key_block(n, state):
            maximum, total, out = state
            j = order[at.row, at.block, n]
            scores, _ = _scores(
                queries, tiles.keys(keys, at, j), tiles.visible(layout, at, j), scale, softcap
            )
            least = maximum
            maximum = jnp.maximum(maximum, scores.max(axis=1))
            weights, decay = jnp.exp(scores - maximum[:, None]), jnp.exp(least - maximum)
            added = _product(weights.astype(v.dtype), tiles.keys(values, at, j), 1, 0)
            return maximum, total * decay + weights.sum(axis=1), out * decay[:, None] + added

        start = (
            jnp.full(tiles.size, _LEAST),
            jnp.zeros(tiles.size),
            jnp.zeros((tiles.size, q.shape[-1])),
        )
        maximum, total, out = jax.lax.fori_loop(0, count[at.row, at.block], key_block, start)
        total = jnp.where(total == 0, 1.0, total)
        return (
            tiles.write(state[0], (out / total[:, None]).astype(q.dtype), at),
            tiles.write(state[1], maximum + jnp.log(total), at),
        )

    empty = (jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32))
    return jax.lax.fori_loop(0, tiles.steps, query_block, empty)


def _backward(scale, softcap, block, partition, saved, cotangent):
    local = partial(_backward_local, scale, softcap, block)
    return *on_own_rows_and_heads(partition, local, *saved, cotangent), None


def _backward_local(scale, softcap, block, q, k, v, layout, out, normaliser, cotangent):
    """With P the probabilities and dP = dO Vᵀ: dV = Pᵀ dO, dS = P (dP − Σ dO O), dQ = dS K, dK = dSᵀ Q."""
    tiles = _Tiles(q.shape, k.shape[2], block)
    keys, values = _heads_first(k), _heads_first(v)
    order, count = _schedule(layout, block)
    offset = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def query_block(step, state):
        by_q, by_keys, by_values = state
        at = tiles.index(step)
        queries, slopes = tiles.queries(q, at), tiles.queries(cotangent, at)
        normal, shift = tiles.queries(normaliser, at)[:, None], tiles.queries(offset, at)[:, None]

        def key_block(n, state):
            by_queries, by_keys, by_values = state
            j = order[at.row, at.block, n]
            tile = tiles.keys(keys, at, j)
            scores, cap_slope = _scores(queries, tile, tiles.visible(layout, at, j), scale, softcap)
            weights = jnp.exp(scores - normal)
            by_scores = weights * (_product(slopes, tiles.keys(values, at, j), 1, 1) - shift) * scale
            by_scores = (by_scores if cap_slope is None else by_scores * cap_slope).astype(q.dtype)
            return (
                by_queries + _product(by_scores, tile, 1, 0),
                tiles.add(by_keys, _product(by_scores, queries, 0, 0), at, j),
                tiles.add(by_values, _product(weights.astype(v.dtype), slopes, 0, 0), at, j),
            )

        start = (jnp.zeros((tiles.size, q.shape[-1])), by_keys, by_values)
        by_queries, *rest = jax.lax.fori_loop(0, count[at.row, at.block], key_block, start)
        return tiles.write(by_q, by_queries.astype(q.dtype), at), *rest

    empty = (jnp.zeros_like(q), jnp.zeros(keys.shape, jnp.float32), jnp.zeros(keys.shape, jnp.float32))
    by_q, by_keys, by_values = jax.lax.fori_loop(0, tiles.steps, query_block, empty)
    return by_q, _heads_first(by_keys).astype(k.dtype), _heads_first(by_values).astype(v.dtype)


_attend.defvjp(_forward, _backward)


def on_own_rows_and_heads(partition: Partition, function: Callable, q: Array, k: Array, *rest: Any) -> Any:
    """`function(q, k, *rest)` by every device, on its rows and heads of [R T H ...] and [R T] arrays."""
    if not partition.is_split:
        return function(q, k, *rest)
    leaves, tree = jax.tree.flatten((q, k, *rest))
    rows = partition.divides(ROWS, q.shape[0])
    heads = partition.divides(TENSOR, q.shape[2], k.shape[2])

    def spec(x: Any) -> PartitionSpec:
        return PartitionSpec(*(rows, None, heads)[: 3 if x.ndim > 2 else x.ndim])

    return jax.shard_map(
        lambda *leaves: function(*tree.unflatten(leaves)),
        mesh=partition.mesh,
        in_specs=tuple(spec(leaf) for leaf in leaves),
        out_specs=jax.tree.map(spec, jax.eval_shape(function, q, k, *rest)),
        check_vma=False,
    )(*leaves)


class _Index(NamedTuple):
    """Where a step of the outer loop is."""

    row: Array
    block: Array
    head: Array


class _Tiles:
    """Reads and writes blocks: [M, C] of queries with M = B * H / G, [B, C] of keys and values."""

    def __init__(self, shape: tuple[int, ...], num_kv_heads: int, block: int):
        R, T, H, _ = shape
        self.block, self.folded, self.num_kv_heads = block, H // num_kv_heads, num_kv_heads
        self.num_blocks = T // block
        self.steps = R * self.num_blocks * num_kv_heads
        self.size = block * self.folded

    def index(self, step: Array) -> _Index:
        row_block, head = step // self.num_kv_heads, step % self.num_kv_heads
        return _Index(row_block // self.num_blocks, row_block % self.num_blocks, head)

    def queries(self, array: Float[Array, "R T H ..."], at: _Index) -> Float[Array, "M ..."]:
        rest = array.shape[3:]
        sizes = (1, self.block, self.folded, *rest)
        return jax.lax.dynamic_slice(array, self._place(at, rest), sizes).reshape(self.size, *rest)

    def write(
        self, array: Float[Array, "R T H ..."], tile: Float[Array, "M ..."], at: _Index
    ) -> Float[Array, "R T H ..."]:
        rest = array.shape[3:]
        tile = tile.reshape(1, self.block, self.folded, *rest)
        return jax.lax.dynamic_update_slice(array, tile, self._place(at, rest))

    def keys(self, array: Float[Array, "R G T C"], at: _Index, j: Array) -> Float[Array, "B C"]:
        sizes = (1, 1, self.block, array.shape[3])
        return jax.lax.dynamic_slice(array, (at.row, at.head, j * self.block, 0), sizes)[0, 0]

    def add(self, array: Float[Array, "R G T C"], tile: Float[Array, "B C"], at: _Index, j: Array) -> Array:
        place = (at.row, at.head, j * self.block, 0)
        return jax.lax.dynamic_update_slice(array, (self.keys(array, at, j) + tile)[None, None], place)

    def visible(self, layout: _Layout, at: _Index, j: Array) -> Bool[Array, "M B"]:
        """`attention.visible` of one block of queries and one of keys."""
        q_slot, k_slot = at.block * self.block, j * self.block
        query = [self._slots(x, at.row, q_slot)[:, None] for x in layout[:3]]
        key = [self._slots(x, at.row, k_slot)[None, :] for x in layout[:3]]
        slot = jnp.arange(self.block)
        mask = (q_slot + slot)[:, None] >= (k_slot + slot)[None, :]
        mask = mask & (query[1] == key[1]) & (key[1] != 0) & ((key[2] == 0) | (key[2] == query[2]))
        if layout.window is not None:
            mask = mask & (query[0] - key[0] < layout.window)
        shape = (self.block, self.folded, self.block)
        return jnp.broadcast_to(mask[:, None, :], shape).reshape(self.size, self.block)

    def _slots(self, array: Int[Array, "R T"], row: Array, start: Array) -> Int[Array, " B"]:
        return jax.lax.dynamic_slice(array, (row, start), (1, self.block))[0]

    def _place(self, at: _Index, rest: tuple[int, ...]) -> tuple:
        return at.row, at.block * self.block, at.head * self.folded, *(0 for _ in rest)


def _scores(queries: Array, keys: Array, mask: Array, scale: float, softcap: float | None):
    """Float32 scores where visible, and the slope of the soft-cap."""
    scores = _product(queries, keys, 1, 1) * scale
    slope = None
    if softcap is not None:
        squashed = jnp.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1 - squashed * squashed
    return jnp.where(mask, scores, _HIDDEN), slope


def _schedule(layout: _Layout, block: int) -> tuple[Int[Array, "R n n"], Int[Array, "R n"]]:
    """For each block of queries the blocks of keys to visit, first `count` of `order`.

    Ranges of group and branch numbers decide, so that a block too many may be visited (its mask is empty),
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
    return jnp.argsort(~needed, axis=-1, stable=True), needed.sum(axis=-1)


def _range(numbers: Int[Array, "R n B"], where: Bool[Array, "R n B"]) -> tuple[Array, Array]:
    """Least and greatest number of each block; an empty range where there is none."""
    least = jnp.where(where, numbers, jnp.iinfo(jnp.int32).max).min(axis=-1)
    return least, jnp.where(where, numbers, -1).max(axis=-1)


def _overlap(queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Bool[Array, "R n n"]:
    least, greatest = (x[:, :, None] for x in queries)
    return (least <= keys[1][:, None, :]) & (keys[0][:, None, :] <= greatest)


def _heads_first(x: Array) -> Array:
    """[R T G C] to [R G T C] and back."""
    return jnp.swapaxes(x, 1, 2)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
