"""Metrics of a step, under TRL's names, computed on the device from one step's scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo.losses.pairs import pair_mask
from dpo.losses.scores import MISMATCHED, Scores

Metrics = dict[str, Float[Array, ""]]

RESOLUTION = 64
"""Roundings of a pair's log-probs within which δ counts as zero: in float32 8e-4 nats for two responses of
50. Rounding alone made -1e-5 of the mean of the first eight δ of the shipped pairs."""


def preference_metrics(scores: Scores, beta: float) -> Metrics:
    """Means over the batch. `chosen` is every response of rank 0, `rejected` every other.

    rewards/* are β (log π − log ρ), rewards/margins and rewards/accuracies are over all strictly ordered
    pairs of a prompt, so that for K = 2 they are TRL's, but for a δ of zero: it counts one half, as in
    held-out figures, and nothing in TRL's. Zero is here what the log-probs' precision cannot tell from
    it: at the start policy and reference are one model, whose log-probs of one response differ in their
    last digits from one shape of a batch to another. Responses of another prompt (rank `MISMATCHED`) are
    left out. A mean over nothing is NaN: of pairs, where every prompt has one labelled response, or of
    chosen ones, where a batch has none.
    """
    rewards = beta * jax.lax.stop_gradient(scores.log_ratio)
    own = scores.present & (scores.ranks != MISMATCHED)
    best, rest = own & (scores.ranks == 0), own & (scores.ranks > 0)
    above = pair_mask(scores, "all")
    margins = rewards[:, :, None] - rewards[:, None, :]
    policy = jax.lax.stop_gradient(scores.policy)
    return {
        "rewards/chosen": _mean(rewards, best),
        "rewards/rejected": _mean(rewards, rest),
        "rewards/accuracies": _mean((_sign(scores) + 1) / 2, above),
        "rewards/margins": _mean(margins, above),
        "logps/chosen": _mean(policy, best),
        "logps/rejected": _mean(policy, rest),
        "lengths/chosen": _mean(scores.lengths.astype(jnp.float32), best),
        "lengths/rejected": _mean(scores.lengths.astype(jnp.float32), rest),
    }


def _sign(scores: Scores) -> Float[Array, "B K K"]:
    """Of δ, the log-ratio of a prompt's response minus another's: -1, 0 or 1; 0 within `RESOLUTION`."""
    ratio, policy = jax.lax.stop_gradient((scores.log_ratio, scores.policy))
    size = jnp.abs(policy)
    finest = RESOLUTION * jnp.finfo(policy.dtype).eps * (size[:, :, None] + size[:, None, :])
    gap = ratio[:, :, None] - ratio[:, None, :]
    return jnp.where(jnp.abs(gap) <= finest, 0.0, jnp.sign(gap))


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """On the host, without the means over nothing: where there is no pair, no line has an accuracy of 0.

    All are fetched at once: each wait of its own would be a trip to the device.
    """
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return {name: value for name, value in numbers.items() if "/" not in name or not math.isnan(value)}


def _mean(values: Float[Array, ...], mask: Array) -> Float[Array, ""]:
    """Mean over `mask`: within each prompt first, then over the prompts that have any; NaN where none has."""
    axes = tuple(range(1, values.ndim))
    count = mask.sum(axes)
    per_prompt = jnp.where(mask, values, 0).sum(axes) / jnp.maximum(count, 1)
    prompts = (count > 0).sum()
    return per_prompt.sum() / jnp.where(prompts > 0, prompts, jnp.nan)
