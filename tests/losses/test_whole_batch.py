"""Objectives over the whole batch against their formulas in NumPy, at their defaults and away from them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from score_cases import make_scores

from dpo.losses import make_objective

PRESENT = np.array([[True, True, True], [True, True, False], [True, True, True], [True, True, True]])
RANKS = np.array([[0, 1, 2], [0, 1, 2], [0, 0, 1], [1, 0, 2]])
LENGTHS = np.array([[3, 7, 4], [5, 2, 6], [4, 6, 3], [8, 1, 2]])
POLICY = np.array([[-6.1, -17.0, -7.9], [-11.2, -3.3, -9e3], [-9.3, -13.9, -6.2], [-21.0, -2.4, -5.5]])
REFERENCE = np.array([[-7.4, -15.2, -8.8], [-9.7, -4.1, -14.0], [-8.5, -15.1, -7.7], [-19.2, -2.9, -4.0]])
PAIRS = [
    (p, w, x)
    for p in range(4)
    for w in range(3)
    for x in range(3)
    if PRESENT[p, w] and PRESENT[p, x] and RANKS[p, w] < RANKS[p, x]
]


def smoothed(delta: np.ndarray, epsilon: float) -> float:
    losses = (1 - epsilon) * np.log1p(np.exp(-delta)) + epsilon * np.log1p(np.exp(delta))
    return float(losses.mean())


def gaps(values: np.ndarray) -> np.ndarray:
    return np.array([values[p, w] - values[p, x] for p, w, x in PAIRS])


def paired(beta: float, epsilon: float) -> float:
    return smoothed(beta * (np.sort(gaps(POLICY)) - np.sort(gaps(REFERENCE))), epsilon)


def unpaired(beta: float, epsilon: float) -> float:
    s = POLICY - REFERENCE
    better, worse = (np.sort([s[p, side[k]] for p, *side in PAIRS]) for k in (0, 1))
    return smoothed(beta * (better - worse), epsilon)


def likelihood() -> float:
    best = PRESENT & (RANKS == 0)
    return -POLICY[best].sum() / LENGTHS[best].sum()


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ({"name": "aot"}, paired(0.1, 0.0)),
        ({"name": "aot", "beta": 0.4, "label_smoothing": 0.2}, paired(0.4, 0.2)),
        ({"name": "aot_unpaired"}, unpaired(0.1, 0.0)),
        ({"name": "aot_unpaired", "beta": 0.4, "label_smoothing": 0.2}, unpaired(0.4, 0.2)),
        ({"name": "sft"}, likelihood()),
    ],
    ids=str,
)
def test_the_mean_over_the_batch_is_the_formula(specification, expected: float) -> None:
    with jax.enable_x64(True):
        scores = make_scores(POLICY, REFERENCE, present=PRESENT, ranks=RANKS, lengths=LENGTHS)
        found = make_objective(specification)(scores)
        assert float(found.mean()) == pytest.approx(expected, rel=1e-9)


def test_without_a_best_response_there_is_no_likelihood_to_raise() -> None:
    scores = make_scores(POLICY, REFERENCE, present=np.zeros_like(PRESENT), ranks=RANKS, lengths=0 * LENGTHS)
    assert np.asarray(make_objective({"name": "sft"})(scores)).tolist() == [0.0] * 4
