"""What is summed over a response besides its log-probs, where an objective asks for it: one row each.

A row of `EXTRA_SUMS` is all that the step, the reference's store, the held-out evaluation and the plans know
of an extra sum. Another one is a function of `Scored` here, its row, and its field of `Scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

OfLogits = Callable[[Float[Array, "M V"]], Float[Array, " M"]]
"""One number of every position's logits."""


class Scored(NamedTuple):
    """What is known at the scored positions of a batch, N in each of R rows."""

    log_probs: Float[Array, "R N"]
    """Of the target tokens."""
    owner: Int[Array, "R N"]
    """Response p·K + k that a position belongs to; P·K for padding."""
    lengths: Int[Array, "P K"]
    present: Bool[Array, "P K"]
    reduce_logits: Callable[[OfLogits], Float[Array, "R N"]]
    """A function of the logits at every position, applied a chunk at a time and not differentiated."""


class ExtraSum(NamedTuple):
    """How an extra sum is computed, and where objectives find it."""

    per_token: Callable[[Scored], Float[Array, "R N"]]
    """Summed over the positions of each response."""
    policy: str
    """Field of `Scores` that holds the policy's."""
    reference: str | None = None
    """Field that holds the reference's, which is then stored beside its log-probs; None where no objective
    reads it."""


def in_head(
    owner: Int[Array, "R N"],
    lengths: Int[Array, "P K"],
    present: Bool[Array, "P K"],
) -> Bool[Array, "R N"]:
    """Which scored tokens are within the length of their prompt's shortest response; padding never is.

    The scored tokens of a response stand side by side, so that their places count them.
    """
    P, K = lengths.shape
    place = jnp.arange(owner.size).reshape(owner.shape)
    start = jax.ops.segment_min(place.ravel(), owner.ravel(), P * K + 1)
    offset = place - start[owner]
    shortest = jnp.min(jnp.where(present, lengths, jnp.iinfo(lengths.dtype).max), axis=1)
    limit = jnp.concatenate([jnp.repeat(shortest, K), jnp.zeros(1, lengths.dtype)])
    return offset < limit[owner]


def log_collision(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """log Σ_v π(v)², the log-probability that two samples agree."""
    return jax.nn.logsumexp(2.0 * logits, axis=-1) - 2.0 * jax.nn.logsumexp(logits, axis=-1)


def _head(scored: Scored) -> Float[Array, "R N"]:
    head = in_head(scored.owner, scored.lengths, scored.present)
    return jnp.where(head, scored.log_probs, 0)


EXTRA_SUMS = {
    "head": ExtraSum(_head, policy="policy_head", reference="reference_head"),
    "log_collision": ExtraSum(lambda scored: scored.reduce_logits(log_collision), policy="log_collision"),
}
"""By the name that `Objective.needs` has for them."""
