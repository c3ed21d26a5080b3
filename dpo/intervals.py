"""An estimate with its confidence interval, and Wilson's interval of a proportion: a leaf, like files.py."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

from dpo.outcomes import UserError


class Interval(NamedTuple):
    """An estimate between the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:z.3f} [{self.low:z.3f}, {self.high:z.3f}]"


def wilson(successes: float | int, count: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion of independent outcomes (Wilson 1927); a tie may count as ½.

    Unlike the normal approximation it stays inside [0, 1] and works at 0 and at `count` successes.
    """
    if not 0 <= successes <= count or count < 1:
        raise UserError(f"{successes} successes of {count}; allowed is 0 to count, count at least 1")
    z = normal_quantile(confidence)
    rate = successes / count
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return Interval(rate, max(centre - half, 0.0), min(centre + half, 1.0))


def normal_quantile(confidence: float) -> float:
    """z with this probability between −z and z."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; allowed is between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
