"""Weightings of tokens and examples that compose with many objectives; what they read is in `sums.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo.losses.scores import Scores


def with_tail_weight(scores: Scores, alpha: float) -> Scores:
    """LD-DPO: log-probs beyond the shortest response's length count with α (Liu et al. 2024,
    arXiv:2409.06411).

    log π′ = Σ_{t ≤ m} log π_t + α Σ_{t > m} log π_t, m the fewest tokens that a response of the prompt has;
    likewise the reference. α = 1 changes nothing, 0 ignores the excess. Needs `policy_head` and
    `reference_head`.
    """
    assert scores.policy_head is not None, "ld_alpha needs Scores.policy_head"
    assert scores.reference_head is not None, "ld_alpha needs Scores.reference_head"
    return scores._replace(
        policy=scores.policy_head + alpha * (scores.policy - scores.policy_head),
        reference=scores.reference_head + alpha * (scores.reference - scores.reference_head),
    )


def with_policy_weights(scores: Scores) -> Scores:
    """WPO: a pair counts as much as the policy would have written both (Zhou et al. 2024, arXiv:2406.11827,
    Eq. 2).

    w(y) = exp(1/|y| Σ_t [log π(y_t) − log Σ_v π(v)²]), not differentiated; 1 for a sample of average
    likelihood at every position. Needs `log_collision`.
    """
    assert scores.log_collision is not None, "wpo needs Scores.log_collision"
    excess = (scores.policy - scores.log_collision) / jnp.maximum(scores.lengths, 1)
    return scores._replace(weights=jax.lax.stop_gradient(jnp.exp(excess).astype(scores.policy.dtype)))
