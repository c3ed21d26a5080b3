"""Pairs of a ranking: the one composition that takes every pairwise objective from two responses to K.

For K = 2 there is one pair and nothing to choose. A ranking of K gives, with `pairs`,

    ranks       0    1    1    2        responses a b c d
    all         ab ac ad bd cd          every better-worse pair (a tie is no pair)
    adjacent    ab ac bd cd             neighbouring ranks
    best_worst  ad                      the best rank against the last

A prompt's loss is the mean over its pairs; 0 where it has none (all tied, or fewer than two present). Of a
loss that couples the pairs of the whole batch it is its pairs' share of the mean over all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dpo.losses.scores import MISMATCHED, Loss, Scores

Pairs = Literal["all", "adjacent", "best_worst"]


class Side(NamedTuple):
    """One side, chosen or rejected, of M pairs of each of P prompts."""

    policy: Float[jax.Array, "P M"]
    reference: Float[jax.Array, "P M"]
    lengths: Float[jax.Array, "P M"]
    scores: Float[jax.Array, "P M"]

    @property
    def log_ratio(self) -> Float[jax.Array, "P M"]:
        """log π − log ρ."""
        return self.policy - self.reference

    @property
    def mean_log_prob(self) -> Float[jax.Array, "P M"]:
        """log π per token."""
        return self.policy / self.lengths


PairLoss = Callable[[Side, Side], Float[jax.Array, "P M"]]
"""(chosen, rejected) → loss of each pair."""

BatchPairLoss = Callable[[Side, Side, Bool[jax.Array, "P M"]], Float[jax.Array, "P M"]]
"""(chosen, rejected, which pairs exist) → loss of each pair, for losses that look across pairs."""


def on_pairs(loss: PairLoss, pairs: Pairs) -> Loss:
    """The mean of a pairwise loss over a ranking's pairs."""

    def mean_over_pairs(scores: Scores) -> Float[jax.Array, " P"]:
        mask = pair_mask(scores, pairs)
        exists = mask.reshape(mask.shape[0], -1)
        # Pairs that don't exist are replaced before the loss: no overflow of theirs can reach a gradient.
        losses = loss(_side(scores, mask, axis=2), _side(scores, mask, axis=1))
        if scores.weights is not None:
            losses = losses * _spread(scores.weights, mask, axis=2) * _spread(scores.weights, mask, axis=1)
        total = jnp.sum(jnp.where(exists, losses, 0.0), axis=1)
        return total / jnp.maximum(jnp.sum(exists, axis=1), 1)

    return mean_over_pairs


def on_pairs_of_the_batch(loss: BatchPairLoss, pairs: Pairs) -> Loss:
    """One mean over all pairs of the batch, of a loss that couples them.

    Every pair counts the same, whichever prompt it is of: a loss that sorts gives a pair the rejected
    response of another prompt, and which one is rounding's to say where log-ratios are equal. A prompt's loss
    is its pairs' share, so that the mean over the prompts that have pairs is the mean over the pairs. Where
    every prompt has as many pairs, that is `on_pairs`.
    """

    def share_of_prompt(scores: Scores) -> Float[jax.Array, " P"]:
        assert scores.weights is None, "weights of responses would part company with what is sorted"
        mask = pair_mask(scores, pairs)
        exists = mask.reshape(mask.shape[0], -1)
        losses = loss(_side(scores, mask, axis=2), _side(scores, mask, axis=1), exists)
        total = jnp.sum(jnp.where(exists, losses, 0.0), axis=1)
        pairs_a_prompt = jnp.sum(exists) / jnp.maximum(jnp.sum(jnp.any(exists, axis=1)), 1)
        return total / jnp.maximum(pairs_a_prompt, 1).astype(total.dtype)

    return share_of_prompt


def pair_mask(scores: Scores, pairs: Pairs) -> Bool[jax.Array, "P K K"]:
    """Which (better, worse) combinations of a prompt's responses are compared."""
    present = scores.present & (scores.ranks != MISMATCHED)
    better, worse = scores.ranks[:, :, None], scores.ranks[:, None, :]
    both = present[:, :, None] & present[:, None, :]
    ordered = both & (better < worse)
    if pairs == "all":
        return ordered
    if pairs == "adjacent":
        between = ordered[:, :, :, None] & ordered[:, None, :, :]  # better than k, and k better than worse
        return ordered & ~jnp.any(between, axis=2)
    beaten = jnp.any(ordered, axis=1)  # some response is better
    beats = jnp.any(ordered, axis=2)
    return ordered & ~beaten[:, :, None] & ~beats[:, None, :]


def _side(scores: Scores, mask: Bool[jax.Array, "P K K"], *, axis: int) -> Side:
    return Side(
        policy=_spread(scores.policy, mask, axis=axis, filler=-1.0),
        reference=_spread(scores.reference, mask, axis=axis, filler=-1.0),
        lengths=_spread(jnp.maximum(scores.lengths, 1).astype(scores.policy.dtype), mask, axis=axis),
        scores=_spread(scores.scores, mask, axis=axis),
    )


def _spread(
    values: Float[jax.Array, "P K"], mask: Bool[jax.Array, "P K K"], *, axis: int, filler: float = 1.0
) -> Float[jax.Array, "P M"]:
    spread = jnp.broadcast_to(jnp.expand_dims(values, axis), mask.shape)
    return jnp.where(mask, spread, filler).reshape(mask.shape[0], -1)
