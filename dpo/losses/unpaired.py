"""Objectives on single responses: thumbs up (rank 0) or thumbs down (any worse rank).

Rows have K = 1; a second response of rank `MISMATCHED`, which answers another prompt, measures KTO's
baseline. Pairs and rankings work too: the best response is desirable, the others are not. A prompt's loss is
the mean over its responses. s is the log-ratio log π/ρ.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo.losses.bradley_terry import negative_log_sigmoid
from dpo.losses.parameters import NonNegative, Strength
from dpo.losses.scores import MISMATCHED, Objective, Scores

Baseline = Literal["mismatched", "batch", "none"]
Shift = Literal["running", "batch"]


def kto(
    beta: Strength = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    baseline: Baseline = "mismatched",
) -> Objective:
    """KTO: prospect theory's value of a response against what the policy is worth on average.

    Formula: λ_D (1 − σ(β (s − z))) if desirable, λ_U (1 − σ(β (z − s))) if not, z = max(0, KL(π‖ρ))
    Gradient weight: λ σ′(β (s − z)), up for desirable, down for undesirable; z is not differentiated
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, §4.1, Eq. 8 (7 in earlier versions)
    Defaults: β = 0.1, λ_D = λ_U = 1 (the paper's; it wants λ_D n_D / (λ_U n_U) in [1, 3/2]); baseline as the
        paper: the mean of s over prompts with another prompt's response. "batch" takes the mean over the
        batch's own responses instead (no extra responses, biased by the labels), "none" is 0
    Data: labels good or bad, one response each; pairs and rankings too; statistics of the whole batch
    Reported: matches or exceeds DPO at 1B to 30B parameters, from weaker labels, also with up to 90% fewer
        desirable ones
    Use: thumbs-up data, unbalanced or unpaired
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        labelled = _labelled(scores)
        desirable = scores.ranks == 0
        gain = beta * (scores.log_ratio - _baseline(scores, baseline))
        value = jnp.where(
            desirable,
            desirable_weight * jax.nn.sigmoid(-gain),
            undesirable_weight * jax.nn.sigmoid(gain),
        )
        return _mean_over_responses(value, labelled)

    needs = frozenset({"mismatched"}) if baseline == "mismatched" else frozenset()
    return Objective(
        loss,
        needs=needs,
        whole_batch=baseline != "none",
        learns_from_ties=True,
        learns_from_single_responses=True,
    )


def bco(
    beta: Strength = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    shift: Shift = "running",
) -> Objective:
    """BCO: a binary classifier whose logit is the implicit reward minus its running mean.

    Formula: −λ_D log σ(βs − δ) if desirable, −λ_U log σ(δ − βs) if not, δ = β · mean of s
    Gradient weight: λ σ(δ − βs) for desirable, λ σ(βs − δ) for undesirable; δ is not differentiated
    Source: Jung et al. 2024, arXiv:2404.04656; the mean over all responses so far as in TRL's BCOTrainer
    Defaults: β = 0.1 (as DPO's; the paper uses 0.01, appendix C), weights 1. The shift is state, so it is
        explicit: "running" reads `Scores.shift`, which the step keeps in the train state (`RunningMean`, part
        of the checkpoint, so a resumed run has the same bits); "batch" is the stateless form, the mean over
        the whole batch
    Data: labels good or bad, one response each; pairs and rankings too
    Reported: its loss bounds DPO's from above, the closer the better the shift (the paper's theorem)
    Use: thumbs-up data; "batch" for large batches
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        labelled = _labelled(scores)
        mean = _mean(scores.log_ratio, labelled) if shift == "batch" else _running(scores)
        logit = beta * (scores.log_ratio - jax.lax.stop_gradient(mean))
        value = jnp.where(
            scores.ranks == 0,
            desirable_weight * negative_log_sigmoid(logit),
            undesirable_weight * negative_log_sigmoid(-logit),
        )
        return _mean_over_responses(value, labelled)

    needs = frozenset({"shift"}) if shift == "running" else frozenset()
    return Objective(
        loss,
        needs=needs,
        whole_batch=shift == "batch",
        learns_from_ties=True,
        learns_from_single_responses=True,
    )


def _labelled(scores: Scores) -> Bool[Array, "P K"]:
    return scores.present & (scores.ranks != MISMATCHED)


def _running(scores: Scores) -> Float[Array, ""]:
    assert scores.shift is not None, "bco with a running shift needs Scores.shift"
    return scores.shift


def _baseline(scores: Scores, baseline: Baseline) -> Float[Array, ""]:
    """KTO's z, in nats."""
    if baseline == "none":
        return jnp.zeros((), scores.policy.dtype)
    mismatched = scores.present & (scores.ranks == MISMATCHED)
    counted = mismatched if baseline == "mismatched" else _labelled(scores)
    return jax.lax.stop_gradient(jnp.maximum(_mean(scores.log_ratio, counted), 0.0))


def _mean(values: Float[Array, "P K"], counted: Bool[Array, "P K"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def _mean_over_responses(values: Float[Array, "P K"], counted: Bool[Array, "P K"]) -> Float[Array, " P"]:
    return jnp.sum(jnp.where(counted, values, 0.0), axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1)
