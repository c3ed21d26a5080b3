"""Exact attention on GPUs by a kernel of our own, which reads two ranges of keys a query.

    keys        0 1 2 3 4 5       a query sees keys [shared, shared_end) of its prompt and
    queries 0   x                 [own, itself] of its own branch; a window cuts both from
            1   x x               the left. Blocks of keys between the two ranges, and of
            2     x x             other groups, are never read.
            3       x x
            4       x   x
            5       x     x

Nothing of size [T, T] is made: scores live in registers, the softmax is accumulated block by block (Milakov
and Gimelshein 2018), and the backward pass makes probabilities again from the saved log-normalisers (Dao et
al. 2022, arXiv:2205.14135). Products take the inputs' dtype (float32 in full precision), summed in float32.
The kernels are Pallas's for Triton; `interpret` runs them where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int

from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.key_ranges import Ranges, find_bounds, find_ranges
from dpo.models.precision import precision_of

LARGEST_BLOCK = 64
"""Slots a block of queries and of keys at most; rows are padded to a multiple of their block."""

BYTES_PER_SLOT = 512
"""A head of more bytes is computed in blocks of half as many slots, so that tiles fit the fast memory."""

LEAST_HEAD_DIM = 16
"""Tensor cores multiply at least so many numbers; heads are padded to a power of two from here on."""

_HIDDEN = -1e30
"""Score of an invisible key."""
_LEAST = -1e29
"""Start of the running maximum: above hidden scores, so that exp(_HIDDEN - maximum) is 0 and not 1."""


class _Options(NamedTuple):
    """What is fixed when a kernel is compiled."""

    scale: float
    softcap: float | None
    block: int
    """Slots a block of queries and of keys."""
    interpret: bool


def attend_ranges(
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
    interpret: bool = False,
) -> Float[Array, "R T H C"]:
    """The attention of `attention.attend`; padding slots give zeros and get no gradient."""
    length, head_dim = q.shape[1], q.shape[3]
    wide = max(LEAST_HEAD_DIM, pl.next_power_of_2(head_dim)) - head_dim
    block = block_size(head_dim + wide, q.dtype)
    more = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, wide))) for x in (q, k, v))
    layout = (jnp.pad(x, ((0, 0), (0, more))) for x in (positions, group, branch))
    ranges = find_ranges(*layout, window=window)
    out: Array = _attend(_Options(scale, softcap, block, interpret), q, k, v, ranges)
    return out[:, :length, :, :head_dim]


def block_size(head_dim: int, dtype: Any) -> int:
    """Slots a block of heads of this size."""
    return LARGEST_BLOCK if head_dim * jnp.dtype(dtype).itemsize <= BYTES_PER_SLOT else LARGEST_BLOCK // 2


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q: Array, k: Array, v: Array, ranges: Ranges) -> Array:
    return _forward(options, q, k, v, ranges)[0]


def _forward(options: _Options, q: Array, k: Array, v: Array, ranges: Ranges) -> tuple[Array, tuple]:
    R, T, H, C = q.shape
    repeats, size = H // k.shape[2], options.block
    block, row = _query_block(size, C), _per_query(size)
    keys = pl.BlockSpec((None, T, None, C), lambda i, r, h: (r, 0, h // repeats, 0))
    bound = pl.BlockSpec((None, None), lambda i, r, h: (r, i))
    out, normaliser = pl.pallas_call(
        partial(_forward_kernel, options),
        grid=(T // size, R, H),
        in_specs=[block, keys, keys, *[row] * 3, *[bound] * 4],
        out_specs=[block, _per_head(size)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((R, H, T), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=options.interpret,
        name="attend_ranges_fwd",
    )(q, k, v, *ranges[:3], *find_bounds(ranges, size))
    out, normaliser = (checkpoint_name(x, n) for x, n in zip((out, normaliser), SAVED_NAMES, strict=True))
    return out, (q, k, v, ranges, out, normaliser)


def _backward(options: _Options, saved: tuple, cotangent: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, ranges, out, normaliser = saved
    R, T, H, C = q.shape
    G, size = k.shape[2], options.block
    repeats = H // G
    # dS = P (dP - d) with d = sum_c out dout, the derivative through the softmax's total
    through_total = jnp.einsum(
        "rthc,rthc->rht", out.astype(jnp.float32), cotangent.astype(jnp.float32), precision="highest"
    )
    block, row, head = _query_block(size, C), _per_query(size), _per_head(size)
    whole_keys = pl.BlockSpec((None, T, None, C), lambda i, r, h: (r, 0, h // repeats, 0))
    bound = pl.BlockSpec((None, None), lambda i, r, h: (r, i))
    common: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(num_warps=4, num_stages=2),
        "interpret": options.interpret,
    }
    dq = pl.pallas_call(
        partial(_query_gradient_kernel, options),
        grid=(T // size, R, H),
        in_specs=[block, whole_keys, whole_keys, block, head, head, *[row] * 3, *[bound] * 4],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="attend_ranges_dq",
        **common,
    )(q, k, v, cotangent, normaliser, through_total, *ranges[:3], *find_bounds(ranges, size))

    key_block = pl.BlockSpec((None, size, None, C), lambda i, r, g: (r, i, g, 0))
    whole_queries = pl.BlockSpec((None, T, repeats, C), lambda i, r, g: (r, 0, g, 0))
    whole_heads = pl.BlockSpec((None, repeats, T), lambda i, r, g: (r, g, 0))
    whole_rows = pl.BlockSpec((None, T), lambda i, r, g: (r, 0))
    last = -(-ranges.seen_end.reshape(R, -1, size).max(axis=-1) // size)
    dk, dv = pl.pallas_call(
        partial(_key_gradients_kernel, options, repeats),
        grid=(T // size, R, G),
        in_specs=[
            *(whole_queries, key_block, key_block, whole_queries, whole_heads, whole_heads),
            *[whole_rows] * 3,
            bound,
        ],
        out_specs=[key_block, key_block],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="attend_ranges_dkv",
        **common,
    )(q, k, v, cotangent, normaliser, through_total, *ranges[:3], last)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(options: _Options, q, k, v, shared, shared_end, own, *rest):
    """Of one block of queries of one head: softmax(scores) v and the log-normaliser."""
    *bounds, out, normaliser = rest
    queries, seen = q[...], _seen_by(options.block, pl.program_id(0), shared[...], shared_end[...], own[...])

    def read(j: Array, carry: tuple) -> tuple:
        maximum, total, summed = carry
        here = pl.ds(j * options.block, options.block)
        scores, _ = _scores(options, _dot(queries, k[here, :].T), seen(j))
        highest = jnp.maximum(maximum, scores.max(axis=1))
        weights, decay = jnp.exp(scores - highest[:, None]), jnp.exp(maximum - highest)
        values = v[here, :]
        summed = summed * decay[:, None] + _dot(weights.astype(values.dtype), values)
        return highest, total * decay + weights.sum(axis=1), summed

    empty = (
        jnp.full(queries.shape[:1], _LEAST, jnp.float32),
        jnp.zeros(queries.shape[:1], jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    maximum, total, summed = _over_keys(bounds, read, empty)
    total = jnp.where(total == 0, 1.0, total)
    out[...] = (summed / total[:, None]).astype(out.dtype)
    normaliser[...] = maximum + jnp.log(total)


def _query_gradient_kernel(
    options: _Options, q, k, v, dout, normaliser, through, shared, shared_end, own, *rest
):
    """dq = scale Σ_j dS_j k_j of one block of queries of one head."""
    *bounds, dq = rest
    queries, cotangent = q[...], dout[...]
    log_total, through_total = normaliser[...], through[...]
    seen = _seen_by(options.block, pl.program_id(0), shared[...], shared_end[...], own[...])

    def read(j: Array, gradient: Array) -> Array:
        here = pl.ds(j * options.block, options.block)
        keys = k[here, :]
        scores, slope = _scores(options, _dot(queries, keys.T), seen(j))
        weights = jnp.exp(scores - log_total[:, None])
        dscores = weights * (_dot(cotangent, v[here, :].T) - through_total[:, None]) * slope
        return gradient + _dot(dscores.astype(keys.dtype), keys)

    gradient = _over_keys(bounds, read, jnp.zeros(queries.shape, jnp.float32))
    dq[...] = (gradient * options.scale).astype(dq.dtype)


def _key_gradients_kernel(
    options: _Options, repeats: int, q, k, v, dout, normaliser, through, shared, shared_end, own, last, dk, dv
):
    """Of one block of keys, over the heads that read it: dk = scale Σ_i dS_i q_i, dv = Σ_i P_i dout_i."""
    j = pl.program_id(0)
    keys, values = k[...], v[...]

    def read(head: int, i: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        here = pl.ds(i * options.block, options.block)
        queries, cotangent = q[here, head, :], dout[here, head, :]
        seen = _seen_by(options.block, i, shared[here], shared_end[here], own[here])
        scores, slope = _scores(options, _dot(queries, keys.T), seen(j))
        weights = jnp.exp(scores - normaliser[head, here][:, None])
        dscores = weights * (_dot(cotangent, values.T) - through[head, here][:, None]) * slope
        for_keys = gradients[0] + _dot(dscores.astype(queries.dtype).T, queries)
        return for_keys, gradients[1] + _dot(weights.astype(cotangent.dtype).T, cotangent)

    gradients = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    for head in range(repeats):
        gradients = jax.lax.fori_loop(j, last[...], partial(read, head), gradients)
    dk[...] = (gradients[0] * options.scale).astype(dk.dtype)
    dv[...] = gradients[1].astype(dv.dtype)


def _over_keys(bounds: list, read: Callable, state: Any) -> Any:
    """`read` of each block of keys that the block of queries sees something of."""
    first, middle, second, last = (bound[...] for bound in bounds)
    state = jax.lax.fori_loop(first, middle, read, state)
    return jax.lax.fori_loop(second, last, read, state)


def _seen_by(
    size: int, i: Array, shared: Array, shared_end: Array, own: Array
) -> Callable[[Array], Bool[Array, "q k"]]:
    """Which keys of a block the queries of block `i` see, blocks having `size` slots."""
    query = i * size + jnp.arange(size)

    def seen(j: Array) -> Bool[Array, "q k"]:
        key = (j * size + jnp.arange(size))[None, :]
        of_prompt = (key >= shared[:, None]) & (key < shared_end[:, None])
        return of_prompt | ((key >= own[:, None]) & (key <= query[:, None]))

    return seen


def _scores(
    options: _Options, product: Float32[Array, "q k"], seen: Bool[Array, "q k"]
) -> tuple[Float32[Array, "q k"], Float32[Array, "q k"] | float]:
    """Scores with invisible keys hidden, and their derivative by the scaled product."""
    scores, slope = product * options.scale, 1.0
    if options.softcap is not None:
        bent = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * bent, 1 - bent * bent
    return jnp.where(seen, scores, _HIDDEN), slope


def _dot(a: Array, b: Array) -> Float32[Array, ...]:
    """A product summed in float32."""
    return jax.lax.dot(a, b, precision=precision_of(a, b), preferred_element_type=jnp.float32)


def _query_block(size: int, head_dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size, None, head_dim), lambda i, r, h: (r, i, h, 0))


def _per_query(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size), lambda i, r, h: (r, i))


def _per_head(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, size), lambda i, r, h: (r, h, i))
