"""Objectives on a whole ranking `[P, K]`, ragged. r = β s is the implicit reward, s the log-ratio log π/ρ."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo.losses import pairwise
from dpo.losses.bradley_terry import negative_log_sigmoid
from dpo.losses.pairs import pair_mask
from dpo.losses.parameters import Count, FlipProbability, Range, Strength
from dpo.losses.plackett_luce import in_order, ranking_log_prob
from dpo.losses.scores import MISMATCHED, TIE, Objective, Scores

_OF_LISTS = frozenset({"divergence", "ld_alpha"})


def plackett_luce(
    beta: Strength = 0.1,
    top_k: Count | None = None,
    discount: Annotated[float, Range(low=0.0, high=1.0, open_low=True)] = 1.0,
) -> Objective:
    """Plackett-Luce DPO: the likelihood of the whole ranking under the implicit rewards.

    Formula: −Σ_k d^k [r_τ(k) − log Σ_{j≥k} exp r_τ(j)], k from 0 to top_k − 1. Equal ranks are one group,
        whose likelihood is summed over its orders: exactly up to 5 members, by Efron's approximation above
    Gradient weight: Σ over the stages at which a response is still there of d^k (softmax − 1[picked]); sums
        to zero
    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; Plackett 1975; ties: Efron 1977
    Defaults: β = 0.1 (as DPO's); every stage, undiscounted (the likelihood itself)
    Data: rankings, ragged, with ties
    Reported: K = 2 is DPO; on lists of 8 that a reward model had scored, no better than all pairs (LiPO,
        arXiv:2402.01878, Table 1)
    Use: K > 2 responses a prompt; top_k where only the head of the ranking is trusted (an exact marginal)
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        ranking = in_order(beta * scores.log_ratio, scores)
        weights = discount ** jnp.arange(scores.policy.shape[1], dtype=scores.policy.dtype)
        stages = jnp.broadcast_to(weights, scores.policy.shape) if discount < 1.0 else None
        return -ranking_log_prob(ranking, top_k=top_k, stage_weights=stages)

    return Objective(loss, admits=_OF_LISTS)


def softmax_best(beta: Strength = 0.1) -> Objective:
    """Softmax over the candidates: only which response is best counts (S-DPO's likelihood).

    Formula: −log [exp r_best / Σ_j exp r_j]; several best: their probabilities are added
    Gradient weight: softmax − 1[best]
    Source: Chen et al. 2024 (S-DPO), arXiv:2406.09215; the first stage of Plackett-Luce
    Defaults: β = 0.1 (as DPO's)
    Data: rankings, of which only the best is used
    Reported: above DPO in recommendation, with several negatives
    Use: one good response among many, the others unordered
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        return -ranking_log_prob(in_order(beta * scores.log_ratio, scores), top_k=1)

    return Objective(loss, admits=_OF_LISTS)


def listmle(beta: Strength = 0.1, weights: Literal["exponential", "dcg"] = "exponential") -> Objective:
    """Position-aware ListMLE: Plackett-Luce whose early stages count more.

    Formula: −Σ_k w_k [r_τ(k) − log Σ_{j≥k} exp r_τ(j)]; exponential: w_k = 2^(n−k) − 1, dcg: w_k = 1/log₂(1 +
        k), k from 1 and n the responses present
    Gradient weight: as plackett_luce, each stage times w_k
    Source: Xia et al. 2008 (ListMLE, all w = 1: plackett_luce); Lan et al. 2014 (p-ListMLE, with these
        exponential weights in TensorFlow Ranking)
    Defaults: β = 0.1 (as DPO's); exponential (p-ListMLE's)
    Data: rankings, ragged, with ties (a group has the mean weight of its places)
    Reported: the form without weights: see plackett_luce
    Use: when the head of the ranking matters most
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        ranking = in_order(beta * scores.log_ratio, scores)
        place = jnp.arange(1, scores.policy.shape[1] + 1, dtype=scores.policy.dtype)[None, :]
        left = jnp.sum(ranking.present, axis=1, keepdims=True) - place
        by_place = jnp.broadcast_to(1.0 / jnp.log2(1.0 + place), left.shape)
        stages = jnp.exp2(jnp.maximum(left, 0.0)) - 1.0 if weights == "exponential" else by_place
        return -ranking_log_prob(ranking, stage_weights=stages)

    return Objective(loss, admits=_OF_LISTS)


def all_pairs(beta: Strength = 0.1, label_smoothing: FlipProbability = 0.0) -> Objective:
    """Bradley-Terry over all pairs of a ranking, as InstructGPT's reward model.

    Formula: mean over the better-worse pairs of −(1 − ε) log σ(r_i − r_j) − ε log σ(r_j − r_i)
    Gradient weight: mean of σ(r_j − r_i) − ε
    Source: Ouyang et al. 2022, arXiv:2203.02155, Eq. 1
    Defaults: β = 0.1 (as DPO's); ε = 0
    Data: rankings, ragged; ties are no pair
    Reported: for reward models, less over-fitting than shuffling a prompt's pairs through the data (§3.5)
    Use: rankings with noise; equal to dpo with `pairs: all`
    """
    return pairwise.dpo(beta=beta, label_smoothing=label_smoothing, pairs="all")


def lipo_lambda(beta: Strength = 0.05, gains: Literal["ranks", "scores"] = "ranks") -> Objective:
    """LiPO-λ: pairs weighted by how much swapping them would change the DCG of the policy's order.

    Formula: Σ_{i better than j} |2^ψ_i − 2^ψ_j| · |1/D(τ_i) − 1/D(τ_j)| · log(1 + exp(r_j − r_i)), D(τ) =
        log(1 + τ), τ the place in the order of r; where rewards are tied, as all are at the start, the mean
        over the orders of what is tied
    Gradient weight: the λ-weight times σ(r_j − r_i); the weights are not differentiated
    Source: Liu et al. 2024, arXiv:2402.01878, Eq. 8 (LambdaLoss, Wang et al. 2018)
    Defaults: β = 0.05 (LiPO's, §5); ψ from the ranks, (worse responses)/(n − 1), or the given scores, which
        should be in [0, 1]
    Data: rankings; with `gains: scores`, scores
    Reported: above DPO, SLiC and ListMLE in summarisation and dialogue (Table 1), and the only one of them
        that gains steadily from longer lists
    Use: lists whose head matters most and whose labels are graded
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        better = pair_mask(scores, "all")
        rewards = beta * scores.log_ratio
        weights = jax.lax.stop_gradient(_lambda_weights(scores, better, gains))
        gap = jnp.where(better, rewards[:, :, None] - rewards[:, None, :], 0.0)
        return jnp.sum(jnp.where(better, weights * negative_log_sigmoid(gap), 0.0), axis=(1, 2))

    needs = frozenset({"scores"}) if gains == "scores" else frozenset()
    return Objective(loss, needs=needs, admits=_OF_LISTS)


def infonca(beta: Strength = 0.1, alpha: Strength = 1.0) -> Objective:
    """InfoNCA: cross-entropy from the softmax of the given scores to the softmax of the implicit rewards.

    Formula: −Σ_i softmax(score/α)_i log softmax(r)_i
    Gradient weight: softmax(r) − softmax(score/α); sums to zero
    Source: Chen et al. 2024, arXiv:2402.05369, Table 1
    Defaults: β = 0.1 (as DPO's; the paper uses 0.01, appendix C), α = 1 (ours: it has the unit of the scores)
    Data: rankings with scores
    Reported: uses the scores' sizes, which rankings discard; α → 0 is softmax_best, and DPO for K = 2; a
        cross entropy of this kind was not competitive on densely scored lists in LiPO (§5.1)
    Use: when scores are trusted beyond their order
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        present = scores.present & (scores.ranks != MISMATCHED)
        target = jax.nn.softmax(jnp.where(present, scores.scores / alpha, -jnp.inf), axis=1, where=present)
        rewards = jnp.where(present, beta * scores.log_ratio, 0.0)
        log_sum = jax.nn.logsumexp(rewards, axis=1, where=present, keepdims=True)
        return -jnp.sum(jnp.where(present, target * (rewards - log_sum), 0.0), axis=1)

    return Objective(loss, needs=frozenset({"scores"}), learns_from_ties=True, admits=_OF_LISTS)


def _lambda_weights(
    scores: Scores,
    better: Bool[Array, "P K K"],
    gains: Literal["ranks", "scores"],
) -> Float[Array, "P K K"]:
    """|ΔG| · |Δ1/D| of every pair."""
    log_ratio = scores.log_ratio
    present = scores.present & (scores.ranks != MISMATCHED)
    beaten = jnp.sum(better, axis=2).astype(log_ratio.dtype)
    others = jnp.maximum(jnp.sum(present, axis=1, keepdims=True) - 1, 1)
    gain = jnp.exp2(beaten / others if gains == "ranks" else jnp.where(present, scores.scores, 0.0))
    gain_change = jnp.abs(gain[:, :, None] - gain[:, None, :])
    return gain_change * _discount_change(log_ratio, present)


def _discount_change(log_ratio: Float[Array, "P K"], present: Bool[Array, "P K"]) -> Float[Array, "P K K"]:
    """|1/D(τ_i) − 1/D(τ_j)| of every two responses, the mean over the orders of those that are tied.

    Tied are log-ratios that a chain of steps of at most `TIE` joins. Places of different groups do not
    overlap, so the mean of the difference is there the difference of the means; within a group of m it is the
    mean over the m(m − 1) ordered choices of two places.
    """
    held = jnp.where(present, log_ratio, jnp.finfo(log_ratio.dtype).min)  # absent ones come last
    order = jnp.argsort(-held, axis=1, stable=True)
    place = jnp.argsort(order, axis=1, stable=True)
    descending = jnp.take_along_axis(held, order, axis=1)
    parted = descending[:, :-1] - descending[:, 1:] > TIE
    group = jnp.cumsum(jnp.pad(parted, ((0, 0), (1, 0))), axis=1)  # of every place
    tied = group[:, :, None] == group[:, None, :]

    places = jnp.arange(1, log_ratio.shape[1] + 1, dtype=log_ratio.dtype)
    discount = 1.0 / jnp.log1p(places)
    apart = jnp.abs(discount[:, None] - discount[None, :])
    size = jnp.sum(tied, axis=2).astype(log_ratio.dtype)
    mean = jnp.sum(jnp.where(tied, discount[None, None, :], 0.0), axis=2) / size
    within = jnp.einsum(
        "pij,jk,pik->pi", tied.astype(apart.dtype), apart, tied.astype(apart.dtype), precision="highest"
    )
    within = within / jnp.maximum(size * (size - 1.0), 1.0)
    change = jnp.where(tied, within[:, :, None], jnp.abs(mean[:, :, None] - mean[:, None, :]))
    prompts = jnp.arange(len(place))[:, None, None]
    return change[prompts, place[:, :, None], place[:, None, :]]
