"""Intervals cover what they say they cover; tests agree with scipy; the n asked for gives the power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpo.evaluation.statistics import (
    bounded_mean,
    cluster_bootstrap,
    few_clusters,
    mean_of_groups,
    num_needed,
    sign_test,
    without_spread,
)


@pytest.mark.parametrize(("clusters", "rows"), [(100, 1), (150, 4)])
def test_the_clustered_interval_covers_19_of_20(clusters: int, rows: int) -> None:
    """Each prompt has its own chance of a correct row; what is estimated is the mean chance, 0.7."""
    rng = np.random.default_rng(1)
    names = np.repeat(np.arange(clusters), rows)
    covered = np.zeros(1500)
    for trial in range(len(covered)):
        chance = np.repeat(rng.beta(1.4, 0.6, clusters), rows)
        values = (rng.random(clusters * rows) < chance).astype(float)
        interval = cluster_bootstrap(values, names, seed=trial, resamples=400)
        covered[trial] = interval.low <= 0.7 <= interval.high
    assert covered.mean() == pytest.approx(0.95, abs=0.015)


def test_drawing_rows_one_by_one_would_be_too_narrow() -> None:
    """Twenty copies of every row carry no more information: the clustered interval doesn't shrink."""
    values = np.random.default_rng(0).random(80).round()
    once = cluster_bootstrap(values, np.arange(80))
    copied = cluster_bootstrap(np.repeat(values, 20), np.repeat(np.arange(80), 20))
    pretended = cluster_bootstrap(np.repeat(values, 20), np.arange(1600))
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=1e-6)
    assert pretended.high - pretended.low < 0.3 * (once.high - once.low)


FEW_VALUES = np.array([1.0, 0.0, 0.5, 1.0, 0.25])
FEW_NAMES = np.array(["a", "a", "b", "c", "c"])
FEW_WEIGHTS = np.array([1.0, 2.0, 1.0, 0.5, 1.0])


def of_clusters(row: np.ndarray) -> np.ndarray:
    """Sums by cluster of the few values above."""
    return np.array([row[name == FEW_NAMES].sum() for name in "abc"])


def test_the_interval_is_the_quantiles_of_the_means_of_drawn_clusters() -> None:
    """The defaults written out: 2,000 draws from seed 0, 95%."""
    sums, sizes = of_clusters(FEW_WEIGHTS * FEW_VALUES), of_clusters(FEW_WEIGHTS)
    drawn = np.random.default_rng(0).integers(3, size=(2000, 3))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    expected = (sums.sum() / sizes.sum(), *np.quantile(means, [0.025, 0.975]))
    assert cluster_bootstrap(FEW_VALUES, FEW_NAMES, weights=FEW_WEIGHTS) == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_groups_is_the_quantiles_of_their_mean() -> None:
    """One cluster in both groups, one in each alone: three strata of which every draw has all."""
    groups = np.array(["x", "y", "x", "y", "y"])
    found = mean_of_groups(FEW_VALUES, FEW_NAMES, groups, weights=FEW_WEIGHTS)
    of_x, of_y = (np.average(FEW_VALUES[groups == g], weights=FEW_WEIGHTS[groups == g]) for g in "xy")
    assert found == pytest.approx(((of_x + of_y) / 2,) * 3), "a stratum of one is always drawn"

    names = np.arange(5)
    found = mean_of_groups(FEW_VALUES, names, np.full(5, "all"), weights=FEW_WEIGHTS)
    counts = np.random.default_rng(0).multinomial(5, [0.2] * 5, size=2000)
    means = (counts @ (FEW_WEIGHTS * FEW_VALUES)) / (counts @ FEW_WEIGHTS)
    assert found[1:] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)


def test_a_cluster_without_weight_is_drawn_and_counts_nothing() -> None:
    found = cluster_bootstrap(np.array([1.0, 1.0]), np.array(["a", "b"]), weights=np.array([1.0, 0.0]))
    assert (found.estimate, found.high) == (1.0, 1.0)


def test_weights_are_repetitions() -> None:
    values, names = np.array([1.0, 0.0, 1.0]), np.array(["a", "a", "b"])
    weighted = cluster_bootstrap(values, names, weights=np.array([2.0, 1.0, 3.0]))
    repeated = cluster_bootstrap(np.array([1.0, 1, 0, 1, 1, 1]), np.array(["a", "a", "a", "b", "b", "b"]))
    assert weighted == pytest.approx(repeated)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids="last in the {0[1]}".format)
def test_what_groups_differ_by_is_no_part_of_the_spread_of_their_mean(names: tuple[str, str]) -> None:
    """The last cluster may be in the first group alone."""
    values, groups = np.repeat([1.0, 0.0], [5, 40]), np.repeat(names, [5, 40])
    found = mean_of_groups(values, np.arange(45), groups, weights=np.ones(45))
    assert found == (0.5, 0.5, 0.5)


def test_the_mean_of_one_group_has_the_clustered_interval() -> None:
    rng = np.random.default_rng(0)
    values, names, weights = rng.random(200), np.arange(200) // 4, rng.random(200) + 0.5
    found = mean_of_groups(values, names, np.full(200, "all"), weights=weights)
    assert found == pytest.approx(cluster_bootstrap(values, names, weights=weights), abs=0.01)
    assert found.estimate == pytest.approx(np.average(values, weights=weights))


def test_a_cluster_in_two_groups_is_drawn_for_both() -> None:
    """Where one group holds the complements of the other's values the mean is ½, whatever is drawn."""
    values = np.random.default_rng(0).random(30)
    found = mean_of_groups(
        np.concatenate([values, 1 - values]),
        np.tile(np.arange(30), 2),
        np.repeat(["a", "b"], 30),
        weights=np.ones(60),
    )
    assert found == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.ci
def test_the_interval_of_the_mean_of_groups_covers_19_of_20() -> None:
    """Three groups of unlike size and chance; their mean chance is 0.6."""
    rng = np.random.default_rng(1)
    groups = np.repeat([0, 1, 2], [40, 60, 120])
    chance, covered = np.array([0.3, 0.9, 0.6])[groups], np.zeros(1500)
    for trial in range(len(covered)):
        values = (rng.random(220) < chance).astype(float)
        found = mean_of_groups(
            values, np.arange(220), groups, weights=np.ones(220), seed=trial, resamples=400
        )
        covered[trial] = found.low <= 0.6 <= found.high
    assert covered.mean() == pytest.approx(0.95, abs=0.015)


def test_an_interval_without_spread_comes_with_wilsons() -> None:
    assert without_spread("rate", [0.8, 0.7, 0.9], 20) == []
    assert without_spread("rate", [1.0, 1.0, 1.0], 1) == [], "that one prompt gives none is said elsewhere"
    alike = bounded_mean(np.ones(20), np.arange(20))
    assert alike == pytest.approx((1.0, 0.8389, 1.0), abs=1e-4), "not 1.000 to 1.000"
    assert "the interval of the rate is Wilson's" in without_spread("rate", alike, 20)[0]


def test_the_mean_of_what_came_out_alike_has_an_interval_between_its_bounds() -> None:
    clusters = np.arange(12)
    assert bounded_mean(np.zeros(12), clusters, least=-1.0).low == pytest.approx(
        -bounded_mean(np.zeros(12), clusters, least=-1.0).high
    )
    lowest = bounded_mean(-np.ones(12), clusters, least=-1.0)
    assert lowest.low == -1.0
    assert -1.0 < lowest.high < 0.0
    spread = np.array([0.0, 1.0] * 6)
    assert bounded_mean(spread, clusters, seed=3) == cluster_bootstrap(spread, clusters, seed=3)
    wide, narrow = (bounded_mean(np.ones(n), np.arange(n)).low for n in (3, 300))
    assert wide < narrow < 1.0


def test_the_sign_test_is_scipys_and_symmetric() -> None:
    assert sign_test(60, 40) == pytest.approx(stats.binomtest(60, 100).pvalue)
    assert sign_test(60, 40) == sign_test(40, 60)
    assert sign_test(0, 0) == 1.0


def test_the_n_asked_for_gives_the_power_asked_for() -> None:
    n = num_needed(0.6, power=0.8)
    wins = np.arange(n + 1)
    rejected = np.abs(wins - n / 2) > 1.96 * np.sqrt(n) / 2
    assert stats.binom.pmf(wins, n, 0.6)[rejected].sum() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("rate", [1.0, 0.95, 0.8, 0.6, 0.3])
def test_the_n_asked_for_is_enough_for_the_sign_test_and_one_less_is_not(rate: float) -> None:
    """By the p-values that are printed beside it; all wins, for one, need six."""

    def power(n: int) -> float:
        wins = np.arange(n + 1)
        rejected = np.array([sign_test(int(w), int(n - w)) <= 0.05 for w in wins])
        return float(stats.binom.pmf(wins, n, rate)[rejected].sum())

    n = num_needed(rate)
    assert power(n) >= 0.8 > power(n - 1)
    assert rate < 1 or n == 6


def test_both_ends_are_rates_and_the_defaults_are_written_out() -> None:
    assert num_needed(0.0) == num_needed(1.0) == 6
    assert num_needed(0.7) == num_needed(0.7, baseline=0.5, power=0.8, confidence=0.95)
    assert num_needed(0.7, power=0.9) > num_needed(0.7) > num_needed(0.7, confidence=0.9)
    assert num_needed(0.99, baseline=0.01) == 1, "one outcome tells these"
    assert num_needed(1.0, confidence=0.5) == 2, "two wins have p = 0.5, which is enough"


def test_small_differences_take_the_normal_approximation() -> None:
    assert num_needed(0.51) == pytest.approx((1.96 * 0.5 + 0.8416 * 0.4999) ** 2 / 0.01**2, rel=1e-3)


def test_up_to_500_the_test_itself_is_asked() -> None:
    """The normal approximation says 500 of this rate."""
    assert num_needed(0.5625) > 500


def test_one_value_is_its_own_mean() -> None:
    assert cluster_bootstrap(np.array([0.3]), np.zeros(1)) == pytest.approx((0.3, 0.3, 0.3))


def test_few_prompts_are_said_to_be_few() -> None:
    assert few_clusters(10) == []
    assert "too narrow" in few_clusters(9)[0]
    assert "are none" in few_clusters(1)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster_bootstrap(np.zeros(0), np.zeros(0)), "no value to average"),
        (
            lambda: cluster_bootstrap(np.array([1.0, np.nan, np.inf]), np.arange(3)),
            "2 of 3 values to average",
        ),
        (lambda: cluster_bootstrap(np.ones(2), np.arange(2), weights=np.zeros(2)), "no value to average"),
        (lambda: num_needed(0.5), "two different rates"),
        (lambda: num_needed(1.01), "two different rates"),
        (lambda: num_needed(-0.01), "two different rates"),
        (lambda: num_needed(0.5, baseline=0.0), "two different rates"),
        (lambda: num_needed(0.5, baseline=1.0), "two different rates"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
