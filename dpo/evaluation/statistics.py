"""Bootstrap intervals and tests for means of few, clustered outcomes. Everything that draws takes a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from dpo.intervals import Interval, normal_quantile, wilson
from dpo.outcomes import UserError

FEW = 10
"""Clusters below which a percentile bootstrap covers clearly less than it says."""
_EXACT_UP_TO = 500
"""Outcomes up to which `num_needed` counts by the binomial test itself."""


def cluster_bootstrap(
    values: Float[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"],
    *,
    weights: Float[np.ndarray, " n"] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the (weighted) mean, drawing whole clusters with replacement.

    Rows of one prompt stand or fall together: drawing single rows would make the interval too narrow.

    Raises:
      ValueError: without values, and for one that is not finite.
    """
    weights = np.ones(len(values)) if weights is None else weights
    _check(values, weights)
    _, cluster = np.unique(clusters, return_inverse=True)
    sums = np.bincount(cluster, weights=weights * values)
    sizes = np.bincount(cluster, weights=weights)
    means = _resampled_ratios(sums, sizes, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high))


def bounded_mean(
    values: Float[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"],
    *,
    least: float = 0.0,
    weights: Float[np.ndarray, " n"] | None = None,
    seed: int = 0,
) -> Interval:
    """Mean of values from `least` to 1, with `cluster_bootstrap`'s interval or, without spread, Wilson's.

    Where all clusters came out alike a bootstrap draws the same mean every time, however few they are: an
    interval of no width, though the next cluster may come out otherwise.
    """
    interval = cluster_bootstrap(values, clusters, weights=weights, seed=seed)
    return _with_spread(interval, len(np.unique(clusters)), least=least)


def _with_spread(interval: Interval, count: int, *, least: float = 0.0) -> Interval:
    """Wilson's interval of so many independent outcomes in place of one without width."""
    if interval.low < interval.high:
        return interval
    width = 1.0 - least
    rate = min(max((interval.estimate - least) / width, 0.0), 1.0)
    _, low, high = wilson(rate * count, count)
    return Interval(interval.estimate, least + width * low, least + width * high)


def mean_of_groups(
    values: Float[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    *,
    weights: Float[np.ndarray, " n"],
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the mean of the groups' weighted means, each group counting the same.

    Whole clusters are drawn with replacement among those that are in the same groups: every resample has all
    groups, and what the groups differ by is no part of the spread.

    Raises:
      ValueError: as `cluster_bootstrap` does.
    """
    _check(values, weights)
    names, group = np.unique(groups, return_inverse=True)
    cluster_names, cluster = np.unique(clusters, return_inverse=True)
    shape = len(cluster_names), len(names)
    place = cluster * shape[1] + group
    sums = np.bincount(place, weights=weights * values, minlength=shape[0] * shape[1]).reshape(shape)
    sizes = np.bincount(place, weights=weights, minlength=shape[0] * shape[1]).reshape(shape)
    _, stratum = np.unique(sizes > 0, axis=0, return_inverse=True)
    strata = [np.flatnonzero(stratum.reshape(-1) == index) for index in range(stratum.max() + 1)]
    rng, means = np.random.default_rng(seed), []
    at_a_time = max(1, 4_000_000 // shape[0])
    for start in range(0, resamples, at_a_time):
        counts = np.zeros((min(at_a_time, resamples - start), shape[0]))
        for members in strata:
            even = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), even, size=len(counts))
        means.append(((counts @ sums) / (counts @ sizes)).mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float((sums.sum(0) / sizes.sum(0)).mean()), float(low), float(high))


def without_spread(name: str, interval: Sequence[float], prompts: int) -> list[str]:
    """What to say of the interval that `bounded_mean` gives a rate where all prompts came out alike."""
    if prompts < 2 or not is_without_spread(interval, prompts):
        return []
    return [
        "all prompts came out alike, so that a bootstrap has no spread: the interval of the "
        f"{name} is Wilson's"
    ]


def is_without_spread(interval: Sequence[float], prompts: int) -> bool:
    """Whether the interval of a rate is Wilson's in place of a bootstrap's."""
    return list(interval) == list(_with_spread(Interval(interval[0], 0.0, 0.0), prompts))


def few_clusters(count: int) -> list[str]:
    """What to say of intervals that draw so few prompts; nothing where there are enough."""
    if count >= FEW:
        return []
    if count == 1:
        return [
            "1 prompt: nothing can be drawn, so the intervals over prompts are none, and those of rates are "
            "Wilson's"
        ]
    return [f"{count} prompts: intervals that draw fewer than {FEW} prompts are too narrow"]


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value that wins and losses are equally likely; ties are left out (Dixon & Mood 1946)."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def num_needed(rate: float, *, baseline: float = 0.5, power: float = 0.8, confidence: float = 0.95) -> int:
    """Independent outcomes with which a two-sided test tells `rate` from `baseline` with this power.

    The fewest for the exact test (`sign_test` where the baseline is ½); where that is over 500, by the
    normal approximation, which is too small for rates near 0 or 1.
    """
    if not (0 < baseline < 1 and 0 <= rate <= 1) or rate == baseline:
        raise UserError(f"rate {rate} and baseline {baseline}; allowed are two different rates in [0, 1]")
    spread = normal_quantile(confidence) * np.sqrt(baseline * (1 - baseline))
    spread += stats.norm.ppf(power) * np.sqrt(rate * (1 - rate))
    count = int(np.ceil((spread / (rate - baseline)) ** 2))
    if count > _EXACT_UP_TO:
        return count
    count = max(1, count // 2)
    while _power(count, rate, baseline, confidence) < power:
        count += 1
    return count


def _power(count: int, rate: float, baseline: float, confidence: float) -> float:
    """Probability that an exact two-sided test of `count` outcomes rejects the baseline."""
    wins = np.arange(count + 1)
    tail = np.minimum(stats.binom.cdf(wins, count, baseline), stats.binom.sf(wins - 1, count, baseline))
    return float(stats.binom.pmf(wins, count, rate)[2 * tail <= 1 - confidence].sum())


def _check(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> None:
    if weights.sum() <= 0:
        raise UserError("no value to average; allowed is one or more with a positive weight")
    if not np.isfinite(values).all():
        raise UserError(
            f"{np.sum(~np.isfinite(values))} of {len(values)} values to average are not finite numbers"
        )


def _resampled_ratios(
    sums: Float[np.ndarray, " c"], sizes: Float[np.ndarray, " c"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " b"]:
    """Σ sums / Σ sizes of every resample, some resamples at a time to bound memory."""
    ratios = []
    at_a_time = max(1, 4_000_000 // len(sums))
    for start in range(0, resamples, at_a_time):
        drawn: Int[np.ndarray, "b c"] = rng.integers(
            len(sums), size=(min(at_a_time, resamples - start), len(sums))
        )
        ratios.append(sums[drawn].sum(1) / np.maximum(sizes[drawn].sum(1), 1e-300))
    return np.concatenate(ratios)
