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
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dpo.models.attention_tiles import Layout, Place, Tiles, each_tile, holding, make_schedule
from dpo.models.precision import precision_of
from dpo.models.soft_cap import exact_tanh
from dpo.parallel.partition import ONE_DEVICE, ROWS, TENSOR, Partition

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
    layout = Layout(
        *(jnp.pad(x, slots).astype(jnp.int32) for x in (positions, group, branch)),
        window=None if window is None else jnp.asarray(window, jnp.int32),
    )
    out: Array = _attend(scale, softcap, block, partition, q, k, v, layout)
    return out[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(scale, softcap, block, partition, q, k, v, layout) -> Array:
    return _forward(scale, softcap, block, partition, q, k, v, layout)[0]


def _forward(scale, softcap, block, partition, q, k, v, layout):
    local = partial(_forward_local, scale, softcap, block)
    saved = on_own_rows_and_heads(partition, local, q, k, v, layout)
    out, normaliser = (checkpoint_name(x, n) for x, n in zip(saved, SAVED_NAMES, strict=True))
    return out, (q, k, v, layout, out, normaliser)


def _forward_local(scale, softcap, block, q, k, v, layout):
    tiles = Tiles(layout, q.shape[2] // k.shape[2], block)
    keys, values = _heads_first(k), _heads_first(v)
    schedule = make_schedule(layout, block, k.shape[2])

    def tile(at: Place):
        """A softmax over these keys alone: its maximum, total and weighted sum of values."""
        operands = tiles.queries(q, at), tiles.keys(keys, at), tiles.keys(values, at)
        product = _product(operands[0], operands[1], 1, 1)
        scores, _ = _scores(product, tiles.visible(at), scale, softcap)
        maximum = jnp.maximum(scores.max(axis=1), _LEAST)
        weights = jnp.exp(scores - maximum[:, None])
        added = _product(weights.astype(v.dtype), operands[2], 1, 0)
        return (maximum, weights.sum(axis=1), added), (*operands, product, weights)

    def merge(state, at: Place, found):
        before = [tiles.query_slice(x, at) for x in state]
        found = [x.reshape(y.shape) for x, y in zip(found, before, strict=True)]
        maximum = jnp.maximum(before[0], found[0])
        decay, weight = jnp.exp(before[0] - maximum), jnp.exp(found[0] - maximum)
        old = before[1] * decay
        total = old + found[1] * weight
        share = 1 / jnp.where(total == 0, 1.0, total)
        out = before[2] * (old * share)[..., None] + found[2] * (weight * share)[..., None]
        return tuple(tiles.write(x, new, at) for x, new in zip(state, (maximum, total, out), strict=True))

    shape = q.shape[:3]
    empty = (jnp.full(shape, _LEAST), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32))
    (maximum, total, out), spare = each_tile(schedule, tile, merge, empty)
    out = holding(out, spare).astype(q.dtype)
    return out, maximum + jnp.log(jnp.where(total == 0, 1.0, total))


def _backward(scale, softcap, block, partition, saved, cotangent):
    local = partial(_backward_local, scale, softcap, block)
    return *on_own_rows_and_heads(partition, local, *saved, cotangent), None


def _backward_local(scale, softcap, block, q, k, v, layout, out, normaliser, cotangent):
    """With P the probabilities and dP = dO Vᵀ: dV = Pᵀ dO, dS = P (dP − Σ dO O), dQ = dS K, dK = dSᵀ Q."""
    tiles = Tiles(layout, q.shape[2] // k.shape[2], block)
    keys, values = _heads_first(k), _heads_first(v)
    offset = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    schedule = make_schedule(layout, block, k.shape[2])

    def tile(at: Place):
        our_queries, our_slopes = tiles.queries(q, at), tiles.queries(cotangent, at)
        our_keys, our_values = tiles.keys(keys, at), tiles.keys(values, at)
        product, by_weights = _product(our_queries, our_keys, 1, 1), _product(our_slopes, our_values, 1, 1)
        scores, cap_slope = _scores(product, tiles.visible(at), scale, softcap)
        weights = jnp.exp(scores - tiles.queries(normaliser, at)[:, None])
        by_scores = weights * (by_weights - tiles.queries(offset, at)[:, None]) * scale
        by_scores = (by_scores if cap_slope is None else by_scores * cap_slope).astype(q.dtype)
        weights = weights.astype(v.dtype)
        found = (
            _product(by_scores, our_keys, 1, 0),
            _product(by_scores, our_queries, 0, 0),
            _product(weights, our_slopes, 0, 0),
        )
        operands = our_queries, our_slopes, our_keys, our_values
        return found, (*operands, product, by_weights, weights, by_scores)

    def merge(state, at: Place, found):
        by_q, by_keys, by_values = state
        before = tiles.query_slice(by_q, at)
        return (
            tiles.write(by_q, before + found[0].reshape(before.shape), at),
            tiles.write_keys(by_keys, tiles.key_slice(by_keys, at) + found[1][None, None], at),
            tiles.write_keys(by_values, tiles.key_slice(by_values, at) + found[2][None, None], at),
        )

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, keys, values))
    (by_q, by_keys, by_values), spare = each_tile(schedule, tile, merge, empty)
    by_q = holding(by_q, spare).astype(q.dtype)
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


def _scores(product: Array, mask: Array, scale: float, softcap: float | None):
    """Float32 scores where visible, and the slope of the soft-cap."""
    scores, slope = product * scale, None
    if softcap is not None:
        squashed = exact_tanh(scores / softcap)
        scores, slope = softcap * squashed, 1 - squashed * squashed
    return jnp.where(mask, scores, _HIDDEN), slope


def _heads_first(x: Array) -> Array:
    """[R T G C] to [R G T C] and back."""
    return jnp.swapaxes(x, 1, 2)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(
        left, right, axes, precision=precision_of(left, right), preferred_element_type=jnp.float32
    )
