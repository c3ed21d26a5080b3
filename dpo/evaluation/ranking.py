"""How whole rankings are reproduced: Kendall's tau-b, the best found, NDCG, Plackett-Luce likelihood."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from dpo.evaluation.figures import Estimate, RankingFigures
from dpo.evaluation.rows import Rows, make_pairs
from dpo.evaluation.statistics import bounded_mean, cluster_bootstrap
from dpo.losses import Scores, make_objective

_plackett_luce = jax.jit(make_objective({"name": "plackett_luce", "beta": 1.0}).loss)


def rankings(rows: Rows, *, beta: float, seed: int = 0) -> RankingFigures:
    """How whole rankings are reproduced: Kendall's τ-b, the best found, NDCG, Plackett-Luce likelihood."""
    kept = has_preference(rows)
    usable = rows.take(kept)

    def bounded(values: Float[np.ndarray, " n"], least: float = 0.0) -> Estimate:
        return list(bounded_mean(values, usable.prompts, least=least, seed=seed))

    counts, likelihood = usable.present.sum(1), plackett_luce_log_likelihood(rows, beta=beta)[kept]
    return {
        "kendall_tau": bounded(kendall_tau(usable), -1.0),
        "top_1": bounded(top_1(usable)),
        "ndcg": bounded(ndcg(usable)),
        "log_likelihood": list(cluster_bootstrap(likelihood, usable.prompts, seed=seed)),
        "chance": {
            "top_1": float(((usable.present & (usable.ranks == 0)).sum(1) / counts).mean()),
            "log_likelihood": float(plackett_luce_log_likelihood(rows, beta=0.0)[kept].mean()),
        },
    }


def has_preference(rows: Rows) -> Bool[np.ndarray, " n"]:
    """Rows that state any preference."""
    return np.isin(np.arange(len(rows.ranks)), make_pairs(rows).row)


def kendall_tau(rows: Rows) -> Float[np.ndarray, " n"]:
    """τ-b of each row between ranks and implicit rewards; 0 where the rewards are all equal.

    (C − D) / √((n₀ − n₁)(n₀ − n₂)) with n₀ pairs, of which n₁ tie in rank and n₂ in reward (Kendall 1945).
    """
    both = np.triu(np.ones((rows.ranks.shape[1],) * 2, bool), 1)[None]
    both = both & rows.present[:, :, None] & rows.present[:, None, :]
    reward = rows.resolved_ratio
    by_rank = np.where(both, np.sign(rows.ranks[:, None, :] - rows.ranks[:, :, None]), 0)
    by_reward = np.where(both, np.sign(reward[:, :, None] - reward[:, None, :]), 0)
    agreement = (by_rank * by_reward).sum((1, 2))
    untied = np.abs(by_rank).sum((1, 2)) * np.abs(by_reward).sum((1, 2))
    return np.where(untied > 0, agreement / np.sqrt(np.maximum(untied, 1)), 0.0)


def top_1(rows: Rows) -> Float[np.ndarray, " n"]:
    """Whether the response with the highest implicit reward has the best rank; ties share the credit."""
    reward = np.where(rows.present, rows.resolved_ratio, -np.inf)
    highest = reward == reward.max(1, keepdims=True)
    return (highest & (rows.ranks == 0)).sum(1) / highest.sum(1)


def ndcg(rows: Rows) -> Float[np.ndarray, " n"]:
    """Normalised discounted cumulative gain of the order by implicit reward (Järvelin & Kekäläinen 2002).

    The gain of a response is the number of responses of its row that are ranked below it; ties in reward get
    the mean discount of the places that they share (McSherry & Najork 2008).
    """
    below = rows.present[:, None, :] & (rows.ranks[:, None, :] > rows.ranks[:, :, None])
    gain = np.where(rows.present, below.sum(2), 0).astype(np.float64)
    got = (gain * _mean_discount(rows.resolved_ratio, rows.present)).sum(1)
    best = (gain * _mean_discount(-rows.ranks, rows.present)).sum(1)
    return got / best


def plackett_luce_log_likelihood(rows: Rows, *, beta: float) -> Float[np.ndarray, " n"]:
    """log p of each row's ranking under Plackett-Luce with the implicit rewards; ties are marginalised."""
    scores = Scores(
        policy=jnp.asarray(beta * rows.log_ratio, jnp.float32),
        reference=jnp.zeros(rows.present.shape),
        lengths=jnp.asarray(rows.lengths),
        present=jnp.asarray(rows.present),
        ranks=jnp.asarray(rows.ranks),
        scores=jnp.full(rows.present.shape, jnp.nan),
    )
    return -np.asarray(_plackett_luce(scores), np.float64)


def _mean_discount(
    values: Shaped[np.ndarray, "n K"], present: Bool[np.ndarray, "n K"]
) -> Float[np.ndarray, "n K"]:
    """1/log₂(1 + place) by falling value, averaged over the places that equal values share."""
    above = (present[:, None, :] & (values[:, None, :] > values[:, :, None])).sum(2)
    equal = (present[:, None, :] & (values[:, None, :] == values[:, :, None])).sum(2)
    discounts = 1 / np.log2(np.arange(values.shape[1]) + 2)
    total = np.concatenate([[0.0], np.cumsum(discounts)])
    mean = (total[np.minimum(above + equal, len(discounts))] - total[above]) / np.maximum(equal, 1)
    return np.where(present, mean, 0.0)
