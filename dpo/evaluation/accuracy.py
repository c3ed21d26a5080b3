"""What held-out preferences say of a policy: pure functions over numpy arrays of log-probs.

A pair is two responses of one prompt, one ranked above the other. It is ordered correctly when its δ, the
difference of implicit rewards, is positive. Figures are means within a row first, then over rows; a δ that
rounding cannot tell from zero (`Pairs.resolved_gap`) counts ½ and is reported apart; intervals draw prompts,
so that rows of one prompt stay together. Single labelled responses are compared with the reference itself
(`as_pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Shaped

from dpo.evaluation.figures import (
    Baseline,
    CalibrationFigures,
    Estimate,
    HeldoutFigures,
    PartFigures,
    SourceFigures,
)
from dpo.evaluation.ranking import rankings
from dpo.evaluation.rows import Pairs, Rows, as_pairs, check_finite, make_pairs
from dpo.evaluation.statistics import (
    bounded_mean,
    cluster_bootstrap,
    few_clusters,
    is_without_spread,
    mean_of_groups,
    without_spread,
)
from dpo.intervals import Interval, wilson
from dpo.outcomes import UserError

NUM_BINS = 10
BASELINES: dict[Baseline, str] = {
    "longer": "longer is better",
    "reference_logp": "reference's log-prob",
    "reference_logp_per_token": "the same per token",
}
"""Scores that took no training, in words."""


def describe(rows: Rows, *, beta: float, seed: int = 0) -> HeldoutFigures:
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
    delta, resolved = beta * pairs.gap(rows.log_ratio), pairs.resolved_gap(rows)
    result: HeldoutFigures = {
        "prompts": len(np.unique(rows.prompts[pairs.row])),
        "rows": len(np.unique(pairs.row)),
        "pairs": len(pairs.row),
        "unpaired": rows is not given,
        "beta": beta,
        "accuracy": list(accuracy(rows, pairs, resolved, seed=seed)),
        "ties": int((resolved == 0).sum()),
        "margin": list(cluster_bootstrap(delta, rows.prompts[pairs.row], weights=pairs.weight, seed=seed)),
        "log_ratio": log_ratios(given, seed=seed),
        "baselines": baselines(rows, pairs, seed=seed),
        "over_baselines": over_baselines(rows, pairs, seed=seed),
        "by_length": by_length(rows, pairs, beta=beta, seed=seed),
        "calibration": calibration(beta * resolved, pairs.weight),
    }
    if len(pairs.row) == result["prompts"]:  # one pair a prompt: independent outcomes
        result["accuracy_wilson"] = list(wilson(float(outcomes(resolved).sum()), len(delta)))
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


def cautions(figures: HeldoutFigures) -> list[str]:
    """What a reader of the figures has to know of their intervals."""
    found = few_clusters(figures["prompts"])
    found += without_spread("accuracy", figures["accuracy"], figures["prompts"])
    small = [name for name, part in figures.get("by_source", {}).items() if few_clusters(part["prompts"])]
    if small:
        found.append(
            f"the interval of the mean of the sources is too narrow: few prompts in {', '.join(small)}"
        )
    return found


def part_interval(part: PartFigures) -> tuple[Sequence[float] | None, str]:
    """What to show beside the accuracy of a part of the pairs, and a remark on it.

    The bootstrap's interval; of fewer than FEW prompts none; where all of them came out alike, Wilson's.
    """
    if few_clusters(part["prompts"]):
        return None, "too few prompts for an interval"
    return part["accuracy"], "all alike: Wilson's interval" if is_without_spread(
        part["accuracy"], part["prompts"]
    ) else ""


def outcomes(gap: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """1 for a pair ordered correctly, ½ for a tie, 0 otherwise."""
    return (np.sign(gap) + 1) / 2


def accuracy(rows: Rows, pairs: Pairs, gap: Float[np.ndarray, " m"], *, seed: int = 0) -> Interval:
    """Part of the pairs whose `gap`, of the better response over the worse, is above 0; 0 counts ½."""
    return bounded_mean(outcomes(gap), rows.prompts[pairs.row], weights=pairs.weight, seed=seed)


def baselines(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[Baseline, Estimate]:
    """What the same pairs give to scores that took no training: length, and the reference's own log-probs."""
    return {
        name: list(accuracy(rows, pairs, pairs.gap(values), seed=seed))
        for name, values in _untrained_scores(rows).items()
    }


def over_baselines(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[Baseline, Estimate]:
    """Accuracy minus that of each baseline, paired: on the same pairs, so that what they share cancels."""
    right = outcomes(pairs.resolved_gap(rows))
    clusters = rows.prompts[pairs.row]
    mean = partial(cluster_bootstrap, clusters=clusters, weights=pairs.weight, seed=seed)
    return {
        name: list(mean(right - outcomes(pairs.gap(values))))
        for name, values in _untrained_scores(rows).items()
    }


def log_ratios(rows: Rows, *, seed: int = 0) -> dict[str, Estimate]:
    """Mean log π/ρ of the best responses and of the others: whether both fall, and how far.

    What there is none of (of labelled responses all may be desirable) is left out.
    """
    result: dict[str, Estimate] = {}
    for name, kept in (("chosen", rows.ranks == 0), ("rejected", rows.ranks > 0)):
        row, place = np.nonzero(rows.present & kept)
        if len(row):
            mean = partial(cluster_bootstrap, clusters=rows.prompts[row], seed=seed)
            values, lengths = rows.log_ratio[row, place], rows.lengths[row, place].astype(np.float64)
            result[name] = list(mean(values))
            result[f"{name}_per_token"] = list(mean(values / lengths, weights=lengths))
    return result


def by_length(rows: Rows, pairs: Pairs, *, beta: float, seed: int = 0) -> dict[str, PartFigures]:
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


def by_source(rows: Rows, pairs: Pairs, *, beta: float, seed: int = 0) -> dict[str, SourceFigures]:
    """The pairs of every subset apart, with its baselines."""
    found: dict[str, SourceFigures] = {}
    for name in np.unique(rows.sources[pairs.row]):
        part = rows.take(rows.sources == name)
        untrained = baselines(part, make_pairs(part), seed=seed)
        found[str(name)] = {
            **describe_part(rows, pairs, rows.sources[pairs.row] == name, beta=beta, seed=seed),
            "longer": untrained["longer"],
            "reference_logp": untrained["reference_logp"],
            "reference_logp_per_token": untrained["reference_logp_per_token"],
        }
    return found


def describe_part(
    rows: Rows, pairs: Pairs, kept: Bool[np.ndarray, " m"], *, beta: float, seed: int = 0
) -> PartFigures:
    """Some of the pairs: accuracy with ties apart, margin, log-ratios of both sides, calibration."""
    part = Pairs(*(array[kept] for array in pairs))
    clusters = rows.prompts[part.row]
    mean = partial(cluster_bootstrap, clusters=clusters, weights=part.weight, seed=seed)
    gap, resolved = part.gap(rows.log_ratio), part.resolved_gap(rows)
    return {
        "pairs": len(gap),
        "prompts": len(np.unique(clusters)),
        "accuracy": list(bounded_mean(outcomes(resolved), clusters, weights=part.weight, seed=seed)),
        "ties": int((resolved == 0).sum()),
        "margin": list(mean(beta * gap)),
        "log_ratio": {
            "chosen": list(mean(rows.log_ratio[part.row, part.better])),
            "rejected": list(mean(rows.log_ratio[part.row, part.worse])),
        },
        "calibration": calibration(beta * resolved, part.weight),
    }


def calibration(delta: Float[np.ndarray, " m"], weight: Float[np.ndarray, " m"]) -> CalibrationFigures:
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


def mean_of_sources(rows: Rows, pairs: Pairs, *, seed: int = 0) -> dict[str, Estimate]:
    """Accuracy, and that of each baseline, every subset counting the same (as in RewardBench)."""
    clusters, sources = rows.prompts[pairs.row], rows.sources[pairs.row]
    mean = partial(mean_of_groups, clusters=clusters, groups=sources, weights=pairs.weight, seed=seed)
    gaps = {name: pairs.gap(values) for name, values in _untrained_scores(rows).items()}
    return {
        name: list(mean(outcomes(gap)))
        for name, gap in {"accuracy": pairs.resolved_gap(rows), **gaps}.items()
    }


def _untrained_scores(rows: Rows) -> dict[Baseline, Shaped[np.ndarray, "n K"]]:
    """By baseline, what it orders responses by."""
    reference = np.where(rows.present, rows.reference, 0.0)
    return {
        "longer": rows.lengths,
        "reference_logp": reference,
        "reference_logp_per_token": reference / np.maximum(rows.lengths, 1),
    }
