"""Objectives on pairs that read no reference; the symbols are those of `pairwise.py`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo.losses.bradley_terry import bradley_terry, negative_log_sigmoid
from dpo.losses.pairs import Pairs, Side, on_pairs
from dpo.losses.parameters import FlipProbability, NonNegative, Strength
from dpo.losses.scores import Objective

_LARGEST_MEAN_LOG_PROB = -1e-6
"""ORPO's odds p/(1 − p) stay finite."""


def simpo(
    beta: Strength = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: FlipProbability = 0.0,
    pairs: Pairs = "all",
) -> Objective:
    """SimPO: the average log-probability is the reward, with a margin and no reference.

    Formula: −(1 − ε) log σ(m) − ε log σ(−m), m = β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ
    Gradient weight: σ(−m) − ε
    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6
    Defaults: β = 2, γ = 1 (the paper's for Llama-3-Base, Table 8; it advises β 2 to 2.5, γ 0.5 to 1.5)
    Data: pairs or rankings; no reference
    Reported: above DPO by up to 6.4 points on AlpacaEval 2 and 7.5 on Arena-Hard, tuned; high learning rates
        cost GSM8K and MMLU (the paper's appendix)
    Use: when length bias is the problem, or the reference should have no say
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        margin = beta * (chosen.mean_log_prob - rejected.mean_log_prob) - gamma
        return bradley_terry(margin, label_smoothing=label_smoothing)

    return Objective(on_pairs(loss, pairs), reference_free=True, admits=frozenset({"wpo"}))


def cpo(
    beta: Strength = 0.1,
    nll_weight: NonNegative = 1.0,
    label_smoothing: FlipProbability = 0.0,
    pairs: Pairs = "all",
) -> Objective:
    """Contrastive preference optimisation: DPO with a uniform reference, and likelihood of the chosen
    response.

    Formula: −(1 − ε) log σ(u) − ε log σ(−u) − λ log π(y_w)/|y_w|, u = β (log π(y_w) − log π(y_l))
    Gradient weight: σ(−u) − ε
    Source: Xu et al. 2024, arXiv:2401.08417; the likelihood is per token here, as in TRL's CPOTrainer (which
        averages over the batch's tokens; ours is per response, so no batch split changes it)
    Defaults: β = 0.1, λ = 1 (TRL's)
    Data: pairs or rankings; no reference
    Reported: ALMA-R matches or exceeds the WMT winners and GPT-4 in translation (WMT'21, '22, '23)
    Use: translation-like tasks with good chosen responses
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        preference = bradley_terry(beta * (chosen.policy - rejected.policy), label_smoothing=label_smoothing)
        return preference - nll_weight * chosen.mean_log_prob

    return Objective(on_pairs(loss, pairs), reference_free=True, admits=frozenset({"wpo"}))


def orpo(beta: Strength = 0.1, nll_weight: NonNegative = 1.0, pairs: Pairs = "all") -> Objective:
    """ORPO: likelihood of the chosen response plus the log odds ratio of the per-token probabilities.

    Formula: −w log p_w − β log σ(log[p_w/(1 − p_w)] − log[p_l/(1 − p_l)]), p = π(y)^(1/|y|)
    Gradient weight: β σ(−log odds ratio) / (1 − p) in each log p
    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 3, 4, 6 and 7 (β is the paper's λ)
    Defaults: β = 0.1 (the paper's for Mistral 7B; 0.2 for Llama-2 7B, 0.25 for Phi-2), w = 1 (the paper's)
    Data: pairs or rankings; no reference
    Reported: fine-tuning and preference learning in one stage, from a base model: Mistral 7B reaches 12.2% on
        AlpacaEval 2
    Use: instead of SFT followed by DPO
    """

    def log_odds(side: Side) -> Float[Array, "P M"]:
        log_prob = jnp.minimum(side.mean_log_prob, _LARGEST_MEAN_LOG_PROB)
        # log(1 − e^x): expm1 is exact near 0, log1p far from it.
        near = jnp.log(-jnp.expm1(jnp.maximum(log_prob, -1.0)))
        far = jnp.log1p(-jnp.exp(jnp.minimum(log_prob, -0.5)))
        return log_prob - jnp.where(log_prob > -0.7, near, far)

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        ratio = negative_log_sigmoid(log_odds(chosen) - log_odds(rejected))
        return beta * ratio - nll_weight * chosen.mean_log_prob

    return Objective(on_pairs(loss, pairs), reference_free=True, admits=frozenset({"wpo"}))
