"""The win-rate that a judge would give if both responses were equally long (Dubois et al. 2024).

AlpacaEval 2 fits a logistic model to the judge's verdicts y, with the difference of the lengths in characters
among its terms, and asks it for the win-rate at no difference:

    P(policy wins) = sigmoid(quality + length · tanh(Δ / std Δ))      length-controlled = sigmoid(quality)

Its third term, the difficulty of each instruction, is estimated from many models' verdicts on AlpacaEval's
own 805 instructions; for other prompts there is none, so it is left out, as are its verdicts on two models
made longer and shorter on purpose. A weak ridge keeps the fit finite where length decides every verdict.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from dpo.intervals import Interval
from dpo.outcomes import UserError

RIDGE = 0.01
"""λ in the penalty λ/2 (quality² + length²) on the summed log-loss: scikit-learn's C = 100."""
_AT_A_TIME = 2_000_000
_MAX_STEPS = 200


class LengthControlled(NamedTuple):
    """The fitted model and what it says of equal lengths."""

    win_rate: Interval
    quality: float
    """Log-odds of a win at equal lengths."""
    length: float
    """Log-odds that a much longer response adds: what the judge gives to length alone."""
    longer: float
    """Part of the pairs in which the policy's response is the longer; near 0 or 1 the figure extrapolates."""


def length_controlled(
    values: Float[np.ndarray, " n"],
    length_gap: Float[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> LengthControlled | None:
    """Fit the model to outcomes (1 win, ½ tie, 0 loss); the interval draws whole clusters and fits each draw.

    `length_gap` is the policy's length minus the opponent's. None where all gaps are equal: then nothing
    tells length from quality (or, all being zero, there is nothing to control for).
    """
    spread = float(np.std(length_gap, ddof=1)) if len(length_gap) > 1 else 0.0
    if spread == 0:
        return None
    features = np.tanh(length_gap / spread)
    quality, length = fit_logistic(features, values, np.ones((1, len(values))))[0]
    names, cluster = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(seed)
    draws: list[Float[np.ndarray, " b"]] = []
    at_a_time = max(1, _AT_A_TIME // len(values))
    for start in range(0, resamples, at_a_time):
        drawn = _draw_counts(len(names), min(at_a_time, resamples - start), rng)
        draws.append(fit_logistic(features, values, drawn[:, cluster].astype(np.float64))[:, 0])
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(_sigmoid(np.concatenate(draws)), tails)
    return LengthControlled(
        win_rate=Interval(float(1 / (1 + np.exp(-quality))), float(low), float(high)),
        quality=float(quality),
        length=float(length),
        longer=float(np.mean((np.sign(length_gap) + 1) / 2)),
    )


def fit_logistic(
    feature: Float[np.ndarray, " n"], target: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b 2"]:
    """Intercept and slope of b ridge logistic regressions that differ in their weights, by Newton's method.

    Targets lie in [0, 1]. The objective is strictly convex; a step is shortened to length 2, which keeps
    Newton's method from overshooting where the data are separable. Raises `ValueError` if it does not settle.
    """
    intercept, slope = np.zeros((2, len(weights)))
    for _ in range(_MAX_STEPS):
        predicted = _sigmoid(intercept[:, None] + slope[:, None] * feature[None])
        residual = weights * (predicted - target[None])
        curvature = weights * predicted * (1 - predicted)
        gradient = residual.sum(1) + RIDGE * intercept, residual @ feature + RIDGE * slope
        a, b, c = curvature.sum(1) + RIDGE, curvature @ feature, curvature @ feature**2 + RIDGE
        determinant = a * c - b * b
        step = np.stack([c * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]])
        step = step / determinant[None]
        norm = np.sqrt((step**2).sum(0))
        step = step * np.minimum(1, 2 / np.maximum(norm, 1e-300))[None]
        intercept, slope = intercept - step[0], slope - step[1]
        if norm.max() < 1e-8:
            return np.stack([intercept, slope], axis=1)
    raise UserError(f"the length-controlled fit did not settle in {_MAX_STEPS} steps")


def _draw_counts(num_clusters: int, num_draws: int, rng: np.random.Generator) -> Int[np.ndarray, "b c"]:
    """How often each cluster is in each resample."""
    return rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_draws)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
