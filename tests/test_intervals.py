"""Wilson's interval agrees with scipy and with published values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpo.intervals import Interval, normal_quantile, wilson


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (7, 10), (10, 10), (412, 900)])
def test_wilson_is_scipys(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson(successes, count)[1:] == pytest.approx((expected.low, expected.high))


def test_wilson_is_published_values() -> None:
    """R's prop.test(81, 263, correct = FALSE), Newcombe 1998, Table I (a)."""
    np.testing.assert_allclose(wilson(81, 263)[1:], (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 20)[1:], (0.0, 0.1611), atol=5e-5)


@pytest.mark.parametrize("count", [50, 200, 1000])
def test_wilson_covers_19_of_20_on_average_over_the_true_rate(count: int) -> None:
    """Exact: over all outcomes with their binomial probability, no sampling."""
    outcomes = np.arange(count + 1)
    low, high = np.array([wilson(int(k), count)[1:] for k in outcomes]).T
    rates = np.linspace(0.05, 0.95, 181)
    covered = (low[None] <= rates[:, None]) & (rates[:, None] <= high[None])
    probability = stats.binom.pmf(outcomes[None], count, rates[:, None])
    assert np.sum(probability * covered, axis=1).mean() == pytest.approx(0.95, abs=0.006)


@pytest.mark.parametrize("successes", [0.0, 0.5, 1.0])
def test_of_one_outcome_wilson_is_its_formula(successes: float) -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    centre, half = (successes + z2 / 2) / (1 + z2), np.sqrt(z2 * successes * (1 - successes) + z2**2 / 4)
    ends = centre - half / (1 + z2), centre + half / (1 + z2)
    assert wilson(successes, 1) == pytest.approx((successes, *ends), abs=1e-12)


def test_wilson_stays_inside_zero_and_one_to_the_last_bit() -> None:
    """Of all and of none the formula's own rounding leaves it by a bit for some counts."""
    ends = [wilson(int(k * count), count)[1:] for count in range(1, 400) for k in (0, 1)]
    assert min(low for low, _ in ends) == 0.0
    assert max(high for _, high in ends) == 1.0


def test_the_quantile_is_scipys() -> None:
    assert normal_quantile(0.9) == pytest.approx(stats.norm.ppf(0.95))


def test_an_interval_is_short_in_words() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(3, 2), "3 successes of 2"),
        (lambda: wilson(0, 0), "count at least 1"),
        (lambda: wilson(1, 2, confidence=1.0), "confidence is 1.0"),
        (lambda: wilson(1, 2, confidence=0.0), "confidence is 0.0"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
