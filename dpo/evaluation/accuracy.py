"""What held-out preferences say of a policy: pure functions over numpy arrays of log-probs.

A pair is two responses of one prompt, one ranked above the other. It is ordered correctly when its δ, the
difference of implicit rewards, is positive. Figures are means within a row first, then over rows; a δ of
exactly zero counts ½ and is reported apart; intervals draw prompts, so that rows of one prompt stay together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dpo.evaluation.statistics import cluster_bootstrap
from dpo.intervals import Interval, wilson
from dpo.losses import Scores, make_objective

NUM_BINS = 10
_plackett_luce = jax.jit(make_objective({"name": "plackett_luce", "beta": 1.0}).loss)


class Rows(NamedTuple):
    """n prompts with up to K responses, best first. What is absent may hold anything, NaN too."""

    policy: Float[np.ndarray, "n K"]
    reference: Float[np.ndarray, "n K"]
    lengths: Int[np.ndarray, "n K"]
    present: Bool[np.ndarray, "n K"]
    ranks: Int[np.ndarray, "n K"]
    prompts: Shaped[np.ndarray, " n"]
    """Identity of each row's prompt: rows of one prompt are one cluster."""
    sources: Shaped[np.ndarray, " n"]
    """Subset that each row belongs to."""

    @property
    def log_ratio(self) -> Float[np.ndarray, "n K"]:
        """log π − log ρ; 0 where absent."""
        return np.where(self.present, self.policy - self.reference, 0.0)

    def take(self, kept: Bool[np.ndarray, " n"]) -> Rows:
        """Some of the rows."""
        return Rows(*(array[kept] for array in self))


class Pairs(NamedTuple):
    """Every strictly ordered pair of every row."""

    row: Int[np.ndarray, " m"]
    better: Int[np.ndarray, " m"]
    worse: Int[np.ndarray, " m"]
    weight: Float[np.ndarray, " m"]
    """1 over the number of pairs of its row: every prompt counts the same."""

    def gap(self, values: Shaped[np.ndarray, "n K"]) -> Float[np.ndarray, " m"]:
        """Value of the better response minus that of the worse one."""
        return (values[self.row, self.better] - values[self.row, self.worse]).astype(np.float64)


def make_pairs(rows: Rows) -> Pairs:
    """All (i, j) of a row with i ranked above j; ties state no preference."""
    both = rows.present[:, :, None] & rows.present[:, None, :]
    row, better, worse = np.nonzero(both & (rows.ranks[:, :, None] < rows.ranks[:, None, :]))
    count = np.bincount(row, minlength=len(rows.ranks))
    return Pairs(row, better, worse, 1.0 / count[row])


def describe(rows: Rows, *, beta: float, seed: int = 0) -> dict[str, Any]:
    """Everything below, as plain numbers for a JSON file; the interval of a figure is [estimate, low, high].

    Raises:
      ValueError: when no row has two responses of different rank, or a log-prob is not finite.
    """
    check_finite(rows)
    pairs = make_pairs(rows)
    if len(pairs.row) == 0:
        raise ValueError("no row has two responses of different rank: there is nothing to be right about")
    delta = beta * pairs.gap(rows.log_ratio)
    result: dict[str, Any] = {
        "prompts": len(np.unique(rows.prompts)),
        "rows": len(np.unique(pairs.row)),
        "pairs": len(pairs.row),
        "beta": beta,
        "accuracy": list(accuracy(rows, pairs, rows.log_ratio, seed=seed)),
        "ties": int((delta == 0).sum()),
        "margin": list(cluster_bootstrap(delta, rows.prompts[pairs.row], weights=pairs.weight, seed=seed)),
        "log_ratio": log_ratios(rows),
        "baselines": baselines(rows, pairs, seed=seed),
        "by_length": by_length(rows, pairs, seed=seed),
        "calibration": calibration(delta, pairs.weight),
    }
    if len(pairs.row) == len(np.unique(pairs.row)):  # one pair a row: independent outcomes
        result["accuracy_wilson"] = list(wilson(float(outcomes(delta).sum()), len(delta)))
    if rows.present.sum(1).max() > 2:
        result["rankings"] = rankings(rows, beta=beta, seed=seed)
    names = np.unique(rows.sources[pairs.row])
    if len(names) > 1:
        result["by_source"] = {str(name): _by_source(rows, str(name), seed) for name in names}
        result["mean_of_sources"] = mean_of_sources(rows, pairs, seed=seed)
    return result


def check_finite(rows: Rows) -> None:
    """Refuse log-probs that are not numbers, naming their rows."""
    for name, values in (("policy", rows.policy), ("reference", rows.reference)):
        bad = np.nonzero((rows.present & ~np.isfinite(values)).any(1))[0]
        if len(bad):
            raise ValueError(f"{name} log-probs of rows {bad[:20].tolist()} are not finite")


def outcomes(gap: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """1 for a pair ordered correctly, ½ for a tie, 0 otherwise."""
    return (np.sign(gap) + 1) / 2


def accuracy(rows: Rows, pairs: Pairs, values: Shaped[np.ndarray, "n K"], *, seed: int = 0) -> Interval:
    """Part of the pairs that `values` order as the ranks do."""
    right = outcomes(pairs.gap(values))
    return cluster_bootstrap(right, rows.prompts[pairs.row], weights=pairs.weight, seed=seed)


def baselines(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[str, list[float]]:
    """What the same pairs give to scores that took no training: length, and the reference's own log-probs."""
    reference = np.where(rows.present, rows.reference, 0.0)
    scores = {
        "longer": rows.lengths,
        "reference_logp": reference,
        "reference_logp_per_token": reference / np.maximum(rows.lengths, 1),
    }
    return {name: list(accuracy(rows, pairs, values, seed=seed)) for name, values in scores.items()}


def log_ratios(rows: Rows) -> dict[str, float]:
    """Mean log π/ρ of the best response and of the others: whether both fall, and how far."""
    best = rows.present & (rows.ranks == 0)
    rest = rows.present & (rows.ranks > 0)
    return {
        "chosen": float(rows.log_ratio[best].mean()),
        "rejected": float(rows.log_ratio[rest].mean()),
        "chosen_per_token": float((rows.log_ratio[best]).sum() / rows.lengths[best].sum()),
        "rejected_per_token": float((rows.log_ratio[rest]).sum() / rows.lengths[rest].sum()),
    }


def by_length(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracy apart for pairs whose better response is the longer, the shorter, or as long."""
    longer = np.sign(pairs.gap(rows.lengths))
    right = outcomes(pairs.gap(rows.log_ratio))
    parts: dict[str, dict[str, Any]] = {}
    for name, sign in (("better_is_longer", 1), ("better_is_shorter", -1), ("equal_length", 0)):
        kept = longer == sign
        if kept.any():
            clusters = rows.prompts[pairs.row[kept]]
            interval = cluster_bootstrap(right[kept], clusters, weights=pairs.weight[kept], seed=seed)
            parts[name] = {"pairs": int(kept.sum()), "accuracy": list(interval)}
    return parts


def calibration(delta: Float[np.ndarray, " m"], weight: Float[np.ndarray, " m"]) -> dict[str, Any]:
    """Reliability of σ(|δ|), the confidence in the order that the policy gives, in bins from ½ to 1.

    ECE = Σ_bin (share of the bin) |part right − mean confidence| (Guo et al. 2017, Eq. 3).
    """
    confidence = 1 / (1 + np.exp(-np.abs(delta)))
    right = outcomes(delta)
    index = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    share = np.bincount(index, weights=weight, minlength=NUM_BINS) / weight.sum()
    filled = np.nonzero(share)[0]
    totals = np.bincount(index, weights=weight, minlength=NUM_BINS)[filled]
    mean_confidence = np.bincount(index, weights=weight * confidence, minlength=NUM_BINS)[filled] / totals
    mean_right = np.bincount(index, weights=weight * right, minlength=NUM_BINS)[filled] / totals
    return {
        "ece": float(np.sum(share[filled] * np.abs(mean_right - mean_confidence))),
        "confidence": mean_confidence.tolist(),
        "accuracy": mean_right.tolist(),
        "share": share[filled].tolist(),
        "pairs": np.bincount(index, minlength=NUM_BINS)[filled].tolist(),
    }


def rankings(rows: Rows, *, beta: float, seed: int = 0) -> dict[str, Any]:
    """How whole rankings are reproduced: Kendall's τ-b, the best found, NDCG, Plackett-Luce likelihood."""
    kept = has_preference(rows)
    usable = rows.take(kept)
    values = {
        "kendall_tau": kendall_tau(usable),
        "top_1": top_1(usable),
        "ndcg": ndcg(usable),
        "log_likelihood": plackett_luce_log_likelihood(rows, beta=beta)[kept],
    }
    result: dict[str, Any] = {
        name: list(cluster_bootstrap(value, usable.prompts, seed=seed)) for name, value in values.items()
    }
    counts = usable.present.sum(1)
    result["chance"] = {
        "top_1": float(((usable.present & (usable.ranks == 0)).sum(1) / counts).mean()),
        "log_likelihood": float(plackett_luce_log_likelihood(rows, beta=0.0)[kept].mean()),
    }
    return result


def has_preference(rows: Rows) -> Bool[np.ndarray, " n"]:
    """Rows that state any preference."""
    return np.isin(np.arange(len(rows.ranks)), make_pairs(rows).row)


def kendall_tau(rows: Rows) -> Float[np.ndarray, " n"]:
    """τ-b of each row between ranks and implicit rewards; 0 where the rewards are all equal.

    (C − D) / √((n₀ − n₁)(n₀ − n₂)) with n₀ pairs, of which n₁ tie in rank and n₂ in reward (Kendall 1945).
    """
    both = np.triu(np.ones((rows.ranks.shape[1],) * 2, bool), 1)[None]
    both = both & rows.present[:, :, None] & rows.present[:, None, :]
    by_rank = np.where(both, np.sign(rows.ranks[:, None, :] - rows.ranks[:, :, None]), 0)
    by_reward = np.where(both, np.sign(rows.log_ratio[:, :, None] - rows.log_ratio[:, None, :]), 0)
    agreement = (by_rank * by_reward).sum((1, 2))
    untied = np.abs(by_rank).sum((1, 2)) * np.abs(by_reward).sum((1, 2))
    return np.where(untied > 0, agreement / np.sqrt(np.maximum(untied, 1)), 0.0)


def top_1(rows: Rows) -> Float[np.ndarray, " n"]:
    """Whether the response with the highest implicit reward has the best rank; ties share the credit."""
    reward = np.where(rows.present, rows.log_ratio, -np.inf)
    highest = reward == reward.max(1, keepdims=True)
    return (highest & (rows.ranks == 0)).sum(1) / highest.sum(1)


def ndcg(rows: Rows) -> Float[np.ndarray, " n"]:
    """Normalised discounted cumulative gain of the order by implicit reward (Järvelin & Kekäläinen 2002).

    The gain of a response is the number of responses of its row that are ranked below it; ties in reward get
    the mean discount of the places that they share (McSherry & Najork 2008).
    """
    below = rows.present[:, None, :] & (rows.ranks[:, None, :] > rows.ranks[:, :, None])
    gain = np.where(rows.present, below.sum(2), 0).astype(np.float64)
    got = (gain * _mean_discount(rows.log_ratio, rows.present)).sum(1)
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


def mean_of_sources(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[str, list[float]]:
    """Accuracy, and that of length alone, every subset counting the same (as in RewardBench)."""
    names, source = np.unique(rows.sources[pairs.row], return_inverse=True)
    weight = pairs.weight / np.bincount(source, weights=pairs.weight)[source] / len(names)
    clusters = rows.prompts[pairs.row]
    return {
        name: list(cluster_bootstrap(outcomes(pairs.gap(values)), clusters, weights=weight, seed=seed))
        for name, values in (("accuracy", rows.log_ratio), ("longer", rows.lengths))
    }


def _by_source(rows: Rows, name: str, seed: int) -> dict[str, Any]:
    part = rows.take(rows.sources == name)
    pairs = make_pairs(part)
    interval = accuracy(part, pairs, part.log_ratio, seed=seed)
    return {"pairs": len(pairs.row), "accuracy": list(interval)} | baselines(part, pairs, seed=seed)


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
