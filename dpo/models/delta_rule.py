"""The gated delta rule in rows that share prompts: linear attention whose state each sequence has for itself.

    S_t = a_t S_s + k_t u_t'        u_t = β_t (v_t - a_t S_s' k_t)        o_t = S_t' q_t

a_t = exp(g_t) is the decay, and s the token before t in its own sequence: for the first token of a response
the last of its prompt (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, Eq. 10; β, a and the state are a
head's).

Rows are computed in chunks of a fixed number of slots. What a token reads in its chunk are the slots of its
own sequence, and what it reads of before is one of two states at most: of the sequence that was running when
the chunk began, and of the prompt that its own response belongs to, where that has ended before.

slot         0 1 2 3|4 5 6 7|8 9         chunks of four
branch       0 0 0 1|1 1 2 2|2 3         one group
state        - - - -|r r p p|r p         r: the running one, p: the prompt's since it ended; - none
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from dpo.models.look_back import find_predecessors
from dpo.models.precision import precision_of
from dpo.models.triangular import solve_unit_lower

CHUNK = 64
"""Slots of a chunk: products within chunks grow with it, and steps of the scan over chunks become fewer."""


class Chunks(NamedTuple):
    """What the tokens of each chunk read: N chunks of c slots, and E states, kept from chunk to chunk."""

    sees: Bool[Array, "N R c c"]
    """Whether a slot (first) comes after another or is it, in one sequence."""
    origin: Bool[Array, "N R c E"]
    """Which state a slot's sequence had when the chunk began; none where it began in the chunk."""
    last: Int[Array, "N R E"]
    """The slot whose state is kept from this chunk on; -1 where the one before stays."""


def make_chunks(group: Int[Array, "R T"], branch: Int[Array, "R T"], size: int = CHUNK) -> Chunks:
    """Chunks of packed rows, whose states are the running sequence's and the prompt's."""
    size = _chunk_size(size, group.shape[1])
    slot = jnp.broadcast_to(jnp.arange(group.shape[1])[None, :], group.shape)
    before = find_predecessors(group, branch, 1)[0]
    begins = (before < 0) | (before != slot - 1)  # a first response runs on from its prompt
    own = jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
    prompt_end = jnp.take_along_axis(before, own, axis=1)
    prompt_start = jnp.take_along_axis(own, jnp.maximum(prompt_end, 0), axis=1)
    chunk = slot // size * size
    in_prompt = (branch == 0) | (prompt_end < 0)
    # What ran when the chunk began: the token's own part of its sequence, or its prompt, which ends here.
    ran = (own < chunk) | (~in_prompt & (prompt_end >= chunk) & (prompt_start < chunk))
    kept = ~in_prompt & (own >= chunk) & (prompt_end < chunk)
    real = group != 0
    origin = jnp.stack([real & ran, real & kept], axis=-1)
    ends = jnp.stack([real, real & (branch == 0)], axis=-1)
    group, branch = _chunked(group, size), _chunked(branch, size)
    return Chunks(sees=_sees(group, branch), origin=_chunked(origin, size), last=_last(_chunked(ends, size)))


def continued(group: Int[Array, "R S"], size: int = CHUNK) -> Chunks:
    """Chunks of one sequence a row that goes on from one state; `group` is 0 at padding, which leaves it."""
    size = _chunk_size(size, group.shape[1])
    group = _chunked(group, size)
    real = (group != 0)[..., None]
    return Chunks(sees=_sees(group, jnp.zeros_like(group)), origin=real, last=_last(real))


def gated_delta(
    q: Float[Array, "R T H K"],
    k: Float[Array, "R T H K"],
    v: Float[Array, "R T H V"],
    log_decay: Float32[Array, "R T H"],
    beta: Float32[Array, "R T H"],
    *,
    chunks: Chunks,
    states: Float32[Array, "R H E K V"],
) -> tuple[Float32[Array, "R T H V"], Float32[Array, "R H E K V"]]:
    """What each token reads, and the states after the last chunk.

    With L the sum of a token's log-decays in its sequence from the chunk's begin, S its state there, and
    D_ij = exp(L_i - L_j) where i sees j:

        (1 + strictly lower(β D kk')) u = β (v - exp(L) S'k)        o = exp(L) S'q + (D qk') u

    What needs no state is computed for all chunks at once, and the scan carries the states. Sums, solutions
    and states are float32.
    """
    precision = precision_of(q, k, v)
    product = partial(jnp.matmul, precision=precision)
    size, length, width = chunks.sees.shape[-1], q.shape[1], v.shape[-1]
    q, k, v, g, beta = (_by_head(x, size) for x in (q, k, v, log_decay[..., None], beta[..., None]))
    sees = chunks.sees[:, :, None]
    coarse, fine = _sums(g, chunks.sees)
    between = (coarse - coarse.swapaxes(-1, -2)) + (fine - fine.swapaxes(-1, -2))
    decay = jnp.exp(jnp.where(sees, between, -jnp.inf))
    into, turned = jnp.exp(coarse + fine), k.swapaxes(-1, -2)
    system = beta * decay * product(k, turned)
    known = beta * jnp.concatenate([v, into * k], axis=-1)
    solved = solve_unit_lower(system, known)
    each = _Each(
        values=solved[..., :width],
        writes=_beside(solved[..., width:], chunks.origin),
        reads=_beside(into * q, chunks.origin),
        within=decay * product(q, turned),
        keys=_kept_keys(k, decay, chunks.last),
        mix=_mix(into, chunks),
    )

    def step(states: Array, each: _Each) -> tuple[Array, Array]:
        before = states.reshape(*states.shape[:2], -1, width)
        u = each.values - product(each.writes, before)
        read = product(each.reads, before) + product(each.within, u)
        kept = (each.mix[..., None, None] * states[:, :, None]).sum(3)
        return kept + product(each.keys, u).reshape(states.shape), read

    states, read = jax.lax.scan(step, states, each)
    read = read.transpose(1, 0, 3, 2, 4).reshape(read.shape[1], -1, *read.shape[2:3], width)
    return read[:, :length], states


def _sums(
    g: Float32[Array, "N R H c 1"], sees: Bool[Array, "N R c c"]
) -> tuple[Float32[Array, "N R H c 1"], Float32[Array, "N R H c 1"]]:
    """Log-decays summed from the chunk's begin, in two parts whose differences keep a short sum's digits.

    A sum of -200 is known to 1e-5 in float32, and so would be the decay between two neighbours. The first
    part is of multiples of 1/2048, whose sums and differences are exact. Below -128 a decay is 0.
    """
    g = jnp.maximum(g, -128.0)
    coarse = jax.lax.stop_gradient(jnp.round(g * 2048) / 2048)
    parts = jnp.concatenate([coarse, g - coarse], axis=-1)
    sums = jnp.matmul(sees[:, :, None].astype(jnp.float32), parts, precision=jax.lax.Precision.HIGHEST)
    return sums[..., :1], sums[..., 1:]


class _Each(NamedTuple):
    """What of a chunk the scan reads; EK are the E states of K rows each, under each other."""

    values: Float32[Array, "N R H c V"]
    writes: Float32[Array, "N R H c EK"]
    reads: Float32[Array, "N R H c EK"]
    within: Float32[Array, "N R H c c"]
    keys: Float32[Array, "N R H EK c"]
    mix: Float32[Array, "N R H E E"]
    """Of each state (first) after the chunk: how much of each state before."""


def _beside(x: Float32[Array, "N R H c K"], origin: Bool[Array, "N R c E"]) -> Float32[Array, "N R H c EK"]:
    """Each token's numbers at the state that it has, and zeros at the others."""
    chosen = origin[:, :, None, :, :, None] * x[..., None, :]
    return chosen.reshape(*x.shape[:-1], -1)


def _kept_keys(
    k: Float32[Array, "N R H c K"], decay: Float32[Array, "N R H c c"], last: Int[Array, "N R E"]
) -> Float32[Array, "N R H EK c"]:
    """The keys of what each kept state has from the chunk, decayed to its last token."""
    rows = jnp.take_along_axis(decay, jnp.maximum(last, 0)[:, :, None, :, None], axis=3)
    rows = jnp.where((last >= 0)[:, :, None, :, None], rows, 0.0)
    kept = rows[..., None, :] * k.swapaxes(-1, -2)[:, :, :, None]
    return kept.reshape(*kept.shape[:3], -1, kept.shape[-1])


def _mix(into: Float32[Array, "N R H c 1"], chunks: Chunks) -> Float32[Array, "N R H E E"]:
    """How the states before a chunk go into those after it: decayed to the last token, or as they are."""
    at = jnp.maximum(chunks.last, 0)
    came = jnp.take_along_axis(chunks.origin, at[..., None], axis=2)[:, :, None]
    decayed = jnp.take_along_axis(into, at[:, :, None, :, None], axis=3)
    stays = jnp.eye(at.shape[-1])[None, None, None]
    return jnp.where((chunks.last >= 0)[:, :, None, :, None], decayed * came, stays)


def _chunk_size(size: int, length: int) -> int:
    """A power of two, and no larger than rows of this length fill."""
    return min(size, 1 << (length - 1).bit_length())


def _chunked(x: Array, size: int) -> Array:
    """[R T ...] as [N R c ...], with zeros behind the end."""
    padding = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _by_head(x: Float[Array, "R T H n"], size: int) -> Float32[Array, "N R H c n"]:
    return _chunked(x, size).swapaxes(2, 3).astype(jnp.float32)


def _sees(group: Int[Array, "N R c"], branch: Int[Array, "N R c"]) -> Bool[Array, "N R c c"]:
    same = (group[..., :, None] == group[..., None, :]) & (group[..., :, None] != 0)
    own = (branch[..., None, :] == 0) | (branch[..., None, :] == branch[..., :, None])
    return jnp.tril(same & own)


def _last(ends: Bool[Array, "N R c E"]) -> Int[Array, "N R E"]:
    """The last slot of a chunk of each kind; -1 where there is none."""
    slot = jnp.arange(ends.shape[2])[None, None, :, None]
    return jnp.where(ends, slot, -1).max(axis=2)
