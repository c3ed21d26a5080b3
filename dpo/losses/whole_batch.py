"""Objectives whose loss of a prompt depends on the whole batch; the symbols are those of `pairwise.py`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo.losses.bradley_terry import bradley_terry
from dpo.losses.pairs import Pairs, Side, on_pairs_of_the_batch
from dpo.losses.parameters import FlipProbability, Strength
from dpo.losses.scores import Objective, Scores


def aot(beta: Strength = 0.1, label_smoothing: FlipProbability = 0.0, pairs: Pairs = "all") -> Objective:
    """AOT: the sorted policy gaps of the batch should dominate the sorted reference gaps.

    Formula: −(1 − ε) log σ(d) − ε log σ(−d), d_i = β (i-th smallest of log π(y_w)/π(y_l) − i-th smallest of
        log ρ(y_w)/ρ(y_l))
    Gradient weight: σ(−d) − ε
    Source: Melnyk et al. 2024, arXiv:2406.05882, §3, paired form
    Defaults: β = 0.1 (as DPO's); ε = 0 (TRL's)
    Data: pairs or rankings; statistics of the whole batch
    Reported: state of the art among 7B models on the Open LLM benchmarks and AlpacaEval, when it appeared
    Use: large batches
    """

    def loss(chosen: Side, rejected: Side, exists: Bool[Array, "P M"]) -> Float[Array, "P M"]:
        gap = chosen.policy - rejected.policy
        reference_gap = chosen.reference - rejected.reference
        return bradley_terry(
            beta * _minus_same_rank(gap, reference_gap, exists), label_smoothing=label_smoothing
        )

    return Objective(on_pairs_of_the_batch(loss, pairs), whole_batch=True, admits=frozenset({"ld_alpha"}))


def aot_unpaired(
    beta: Strength = 0.1, label_smoothing: FlipProbability = 0.0, pairs: Pairs = "all"
) -> Objective:
    """AOT on unpaired responses: the sorted chosen log-ratios should dominate the sorted rejected ones.

    Formula: −(1 − ε) log σ(d) − ε log σ(−d), d_i = β (i-th smallest s_w − i-th smallest s_l)
    Gradient weight: σ(−d) − ε
    Source: Melnyk et al. 2024, arXiv:2406.05882, §3, unpaired form
    Defaults: β = 0.1 (as DPO's); ε = 0 (TRL's)
    Data: pairs or rankings; statistics of the whole batch
    Reported: as aot
    Use: large batches in which chosen and rejected are not answers to the same prompts
    """

    def loss(chosen: Side, rejected: Side, exists: Bool[Array, "P M"]) -> Float[Array, "P M"]:
        gap = _minus_same_rank(chosen.log_ratio, rejected.log_ratio, exists)
        return bradley_terry(beta * gap, label_smoothing=label_smoothing)

    return Objective(on_pairs_of_the_batch(loss, pairs), whole_batch=True, admits=frozenset({"ld_alpha"}))


def sft() -> Objective:
    """Likelihood of the best response, averaged over the batch's tokens: a term for sums (DPO + NLL, MPO).

    Formula: −Σ log π(y_best) / Σ |y_best|, both sums over the whole batch
    Gradient weight: 1 on every token of the best response
    Source: TRL's sft term; Pang et al. 2024, arXiv:2404.19733 (DPO + NLL); Wang et al. 2024,
        arXiv:2411.10442, §3.2 (MPO)
    Defaults: none
    Data: anything with a best response; statistics of the whole batch; no reference
    Reported: crucial for iterated DPO on reasoning (Pang et al.)
    Use: `objectives: [{name: dpo, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: sft, weight: 1.0}]` is
        MPO
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        best = scores.present & (scores.ranks == 0)
        tokens = jnp.maximum(jnp.sum(jnp.where(best, scores.lengths, 0)), 1)
        mean = -jnp.sum(jnp.where(best, scores.policy, 0.0)) / tokens
        return jnp.broadcast_to(mean, scores.policy.shape[:1])

    return Objective(
        loss,
        whole_batch=True,
        reference_free=True,
        learns_from_ties=True,
        learns_from_single_responses=True,
    )


def _minus_same_rank(
    values: Float[Array, "P M"], others: Float[Array, "P M"], exists: Bool[Array, "P M"]
) -> Float[Array, "P M"]:
    """Each value minus the one of `others` that has the same rank in sorted order, over the batch's pairs.

    The result stays with the pair whose value it is, so that a prompt keeps its own loss.
    """
    last = jnp.where(exists, 0.0, jnp.inf).ravel()
    order = jnp.argsort(values.ravel() + last, stable=True)
    rank = jnp.argsort(order, stable=True)
    matched = others.ravel()[jnp.argsort(others.ravel() + last, stable=True)][rank]
    return values - jnp.where(exists.ravel(), matched, 0.0).reshape(values.shape)
