"""What held-out preferences say of a policy: pure functions over numpy arrays of log-probs.

A pair is two responses of one prompt, one ranked above the other. It is ordered correctly when its δ, the
difference of implicit rewards, is positive. Figures are means within a row first, then over rows; a δ of
exactly zero counts ½ and is reported apart; intervals draw prompts, so that rows of one prompt stay together.
Single labelled responses are compared with the reference itself (`as_pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dpo.evaluation.statistics import cluster_bootstrap, few_clusters, mean_of_groups, without_spread
from dpo.intervals import Interval, wilson
from dpo.losses import Scores, make_objective
from dpo.outcomes import UserError

NUM_BINS = 10
BASELINES = {
    "longer": "longer is better",
    "reference_logp": "reference's log-prob",
    "reference_logp_per_token": "the same per token",
}
"""Scores that took no training, in words."""
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

    `unpaired` is true where the rows are single labelled responses, which are compared as `as_pairs` says.

    Raises:
      ValueError: when no row has two responses of different rank, or a log-prob is not finite.
    """
    check_finite(rows)
    given, rows = rows, as_pairs(rows)
    pairs = make_pairs(rows)
    if len(pairs.row) == 0:
        raise UserError("no row has two responses of different rank: there is nothing to be right about")
    delta = beta * pairs.gap(rows.log_ratio)
    result: dict[str, Any] = {
        "prompts": len(np.unique(rows.prompts[pairs.row])),
        "rows": len(np.unique(pairs.row)),
        "pairs": len(pairs.row),
        "unpaired": rows is not given,
        "beta": beta,
        "accuracy": list(accuracy(rows, pairs, rows.log_ratio, seed=seed)),
        "ties": int((delta == 0).sum()),
        "margin": list(cluster_bootstrap(delta, rows.prompts[pairs.row], weights=pairs.weight, seed=seed)),
        "log_ratio": log_ratios(given, seed=seed),
        "baselines": baselines(rows, pairs, seed=seed),
        "over_baselines": over_baselines(rows, pairs, seed=seed),
        "by_length": by_length(rows, pairs, beta=beta, seed=seed),
        "calibration": calibration(delta, pairs.weight),
    }
    if len(pairs.row) == result["prompts"]:  # one pair a prompt: independent outcomes
        result["accuracy_wilson"] = list(wilson(float(outcomes(delta).sum()), len(delta)))
    if given.present.sum(1).max() > 2:
        result["rankings"] = rankings(rows, beta=beta, seed=seed)
    names = np.unique(rows.sources[pairs.row])
    if len(names) > 1:
        result["by_source"] = by_source(rows, pairs, beta=beta, seed=seed)
        result["mean_of_sources"] = mean_of_sources(rows, pairs, seed=seed)
    if result["unpaired"]:  # one side of every part is the reference itself, whose log-ratio says nothing
        for part in (*result["by_length"].values(), *result.get("by_source", {}).values()):
            del part["log_ratio"]
    return result


def cautions(figures: dict[str, Any]) -> list[str]:
    """What a reader of the figures has to know of their intervals."""
    found = few_clusters(figures["prompts"])
    found += without_spread("accuracy", figures["accuracy"], figures["prompts"])
    small = [name for name, part in figures.get("by_source", {}).items() if few_clusters(part["prompts"])]
    if small:
        found.append(
            f"the interval of the mean of the sources is too narrow: few prompts in {', '.join(small)}"
        )
    return found


def part_interval(part: dict[str, Any]) -> tuple[Sequence[float] | None, str]:
    """What to show beside the accuracy of a part of the pairs, and a remark on it.

    The bootstrap's interval; of fewer than FEW prompts none; where all of them came out alike, Wilson's.
    """
    rate, low, high = part["accuracy"]
    if few_clusters(part["prompts"]):
        return None, "too few prompts for an interval"
    if low == high:
        return wilson(rate * part["prompts"], part["prompts"]), "all alike: Wilson's interval"
    return part["accuracy"], ""


def as_pairs(rows: Rows) -> Rows:
    """Single labelled responses (rank 0 desirable, 1 not) as pairs; any other rows as they are.

    The other side is the reference itself: its log-ratio is 0, so that a desirable response is right when the
    policy made it likelier, an undesirable one when less likely. For the baselines it has the median length
    and the median log-prob of the reference.
    """
    if rows.ranks.shape[1] != 1 or not rows.present.all():
        return rows
    is_desirable = rows.ranks == 0

    def beside(values: Shaped[np.ndarray, "n 1"]) -> Shaped[np.ndarray, "n 2"]:
        median = np.full_like(values, np.median(values))
        return np.where(
            is_desirable, np.concatenate([values, median], 1), np.concatenate([median, values], 1)
        )

    reference, log_ratio = beside(rows.reference), np.zeros((len(rows.ranks), 2))
    log_ratio[np.arange(len(rows.ranks)), rows.ranks[:, 0]] = rows.log_ratio[:, 0]
    return rows._replace(
        policy=reference + log_ratio,
        reference=reference,
        lengths=beside(rows.lengths),
        present=np.ones(reference.shape, bool),
        ranks=np.tile([0, 1], (len(rows.ranks), 1)),
    )


def check_finite(rows: Rows, places: Sequence[str] | None = None) -> None:
    """Refuse log-probs that are not numbers, naming their rows, by `places` where they are known."""
    for name, values in (("policy", rows.policy), ("reference", rows.reference)):
        bad = np.nonzero((rows.present & ~np.isfinite(values)).any(1))[0].tolist()
        if bad:
            which = str(bad[:20]) if places is None else ", ".join(places[row] for row in bad[:5])
            raise UserError(
                f"{name} log-probs of {len(bad)} of {len(rows.ranks)} rows are not finite ({which}): check "
                "the weights, and the learning rate they were trained with"
            )


def outcomes(gap: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """1 for a pair ordered correctly, ½ for a tie, 0 otherwise."""
    return (np.sign(gap) + 1) / 2


def accuracy(rows: Rows, pairs: Pairs, values: Shaped[np.ndarray, "n K"], *, seed: int = 0) -> Interval:
    """Part of the pairs that `values` order as the ranks do."""
    right = outcomes(pairs.gap(values))
    return cluster_bootstrap(right, rows.prompts[pairs.row], weights=pairs.weight, seed=seed)


def baselines(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[str, list[float]]:
    """What the same pairs give to scores that took no training: length, and the reference's own log-probs."""
    return {
        name: list(accuracy(rows, pairs, values, seed=seed))
        for name, values in _untrained_scores(rows).items()
    }


def over_baselines(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[str, list[float]]:
    """Accuracy minus that of each baseline, paired: on the same pairs, so that what they share cancels."""
    right = outcomes(pairs.gap(rows.log_ratio))
    mean = partial(cluster_bootstrap, clusters=rows.prompts[pairs.row], weights=pairs.weight, seed=seed)
    return {
        name: list(mean(right - outcomes(pairs.gap(values))))
        for name, values in _untrained_scores(rows).items()
    }


def log_ratios(rows: Rows, *, seed: int = 0) -> dict[str, list[float]]:
    """Mean log π/ρ of the best responses and of the others: whether both fall, and how far.

    What there is none of (of labelled responses all may be desirable) is left out.
    """
    result: dict[str, list[float]] = {}
    for name, kept in (("chosen", rows.ranks == 0), ("rejected", rows.ranks > 0)):
        row, place = np.nonzero(rows.present & kept)
        if len(row):
            mean = partial(cluster_bootstrap, clusters=rows.prompts[row], seed=seed)
            values, lengths = rows.log_ratio[row, place], rows.lengths[row, place].astype(np.float64)
            result[name] = list(mean(values))
            result[f"{name}_per_token"] = list(mean(values / lengths, weights=lengths))
    return result


def by_length(rows: Rows, pairs: Pairs, *, beta: float, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The pairs whose better response is the longer, the shorter, or as long, apart."""
    longer = np.sign(pairs.gap(rows.lengths))
    parts = {
        "better_is_longer": longer == 1,
        "better_is_shorter": longer == -1,
        "both_are_as_long": longer == 0,
    }
    return {
        name: describe_part(rows, pairs, kept, beta=beta, seed=seed)
        for name, kept in parts.items()
        if kept.any()
    }


def by_source(rows: Rows, pairs: Pairs, *, beta: float, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The pairs of every subset apart, with its baselines."""
    found = {}
    for name in np.unique(rows.sources[pairs.row]):
        part = rows.take(rows.sources == name)
        found[str(name)] = describe_part(
            rows, pairs, rows.sources[pairs.row] == name, beta=beta, seed=seed
        ) | baselines(part, make_pairs(part), seed=seed)
    return found


def describe_part(
    rows: Rows, pairs: Pairs, kept: Bool[np.ndarray, " m"], *, beta: float, seed: int = 0
) -> dict[str, Any]:
    """Some of the pairs: accuracy with ties apart, margin, log-ratios of both sides, calibration."""
    part = Pairs(*(array[kept] for array in pairs))
    clusters = rows.prompts[part.row]
    mean = partial(cluster_bootstrap, clusters=clusters, weights=part.weight, seed=seed)
    gap = part.gap(rows.log_ratio)
    return {
        "pairs": len(gap),
        "prompts": len(np.unique(clusters)),
        "accuracy": list(mean(outcomes(gap))),
        "ties": int((gap == 0).sum()),
        "margin": list(mean(beta * gap)),
        "log_ratio": {
            "chosen": list(mean(rows.log_ratio[part.row, part.better])),
            "rejected": list(mean(rows.log_ratio[part.row, part.worse])),
        },
        "calibration": calibration(beta * gap, part.weight),
    }


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
    """Accuracy, and that of each baseline, every subset counting the same (as in RewardBench)."""
    clusters, sources = rows.prompts[pairs.row], rows.sources[pairs.row]
    mean = partial(mean_of_groups, clusters=clusters, groups=sources, weights=pairs.weight, seed=seed)
    return {
        name: list(mean(outcomes(pairs.gap(values))))
        for name, values in {"accuracy": rows.log_ratio, **_untrained_scores(rows)}.items()
    }


def _untrained_scores(rows: Rows) -> dict[str, Shaped[np.ndarray, "n K"]]:
    """By baseline, what it orders responses by."""
    reference = np.where(rows.present, rows.reference, 0.0)
    return {
        "longer": rows.lengths,
        "reference_logp": reference,
        "reference_logp_per_token": reference / np.maximum(rows.lengths, 1),
    }


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
