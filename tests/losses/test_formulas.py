"""Every objective against its paper's formula, in plain NumPy, at its documented defaults and away from them.

`w` is the better response of a pair, `x` the worse.

The rows are what a fault shows on: a ragged ranking with a tie, an absent response with enormous log-probs,
and lengths, scores and log-ratios that no sum or sign can exchange. The formulas share no code with the
package and write each default as docs/objectives.md gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import jax
import numpy as np
import pytest
from score_cases import make_scores, value

from dpo.losses import MISMATCHED, make_objective

PRESENT = np.array([[True, True, True, True], [True, True, False, True], [True, True, True, True]])
RANKS = np.array([[0, 1, 1, 2], [1, 0, 0, 2], [2, 0, 1, MISMATCHED]])
LENGTHS = np.array([[3, 7, 4, 9], [5, 2, 6, 8], [4, 6, 3, 5]])
POLICY = np.array([[-6.1, -17.0, -7.9, -22.4], [-11.2, -3.3, -9e3, -15.7], [-9.3, -13.9, -6.2, -12.8]])
REFERENCE = np.array([[-7.4, -15.2, -8.8, -19.3], [-9.7, -4.1, -14.0, -16.9], [-8.5, -15.1, -7.7, -11.1]])
SCORES = np.array([[2.3, 0.9, 1.1, -0.7], [0.4, 1.7, 50.0, -1.2], [-0.6, 1.9, 0.3, 9.0]])


class Response(NamedTuple):
    """A response as a formula names it: s is log π − log ρ."""

    rank: int
    p: float
    s: float
    length: int
    score: float


PROMPTS = [
    [
        Response(RANKS[i, k], POLICY[i, k], POLICY[i, k] - REFERENCE[i, k], LENGTHS[i, k], SCORES[i, k])
        for k in range(4)
        if PRESENT[i, k] and RANKS[i, k] != MISMATCHED
    ]
    for i in range(3)
]


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def nls(x: float) -> float:
    """−log σ(x)."""
    return float(np.logaddexp(0, -x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def smoothed(x: float, flips: float) -> float:
    return (1 - flips) * nls(x) + flips * nls(-x)


def on_pairs(loss: Callable[[Response, Response], float]) -> np.ndarray:
    """The mean over the pairs of responses of which one is better."""
    of_prompt = []
    for responses in PROMPTS:
        pairs = [sorted(pair, key=lambda r: r.rank) for pair in combinations(responses, 2)]
        of_prompt.append(np.mean([loss(w, x) for w, x in pairs if w.rank < x.rank]))
    return np.array(of_prompt)


def on_lists(loss: Callable[[list[Response]], float]) -> np.ndarray:
    return np.array([loss(sorted(responses, key=lambda r: r.rank)) for responses in PROMPTS])


def exo(beta: float, flips: float) -> np.ndarray:
    def loss(w: Response, x: Response) -> float:
        q = sigmoid(beta * (w.s - x.s))
        return q * np.log(q / (1 - flips)) + (1 - q) * np.log((1 - q) / flips)

    return on_pairs(loss)


def orpo(beta: float, weight: float) -> np.ndarray:
    def log_odds(r: Response) -> float:
        return r.p / r.length - np.log1p(-np.exp(r.p / r.length))

    return on_pairs(lambda w, x: -weight * w.p / w.length + beta * nls(log_odds(w) - log_odds(x)))


def discopop(beta: float, tau: float) -> np.ndarray:
    def loss(w: Response, x: Response) -> float:
        delta = beta * (w.s - x.s)
        gate = sigmoid(delta / tau)
        return (1 - gate) * nls(delta) + gate * np.exp(-delta)

    return on_pairs(loss)


def softmax_best(beta: float) -> np.ndarray:
    def loss(ranking: list[Response]) -> float:
        weights = [np.exp(beta * r.s) for r in ranking]
        best = [w for w, r in zip(weights, ranking, strict=True) if r.rank == ranking[0].rank]
        return -np.log(sum(best) / sum(weights))

    return on_lists(loss)


def infonca(beta: float, alpha: float) -> np.ndarray:
    def loss(ranking: list[Response]) -> float:
        target = np.exp([r.score / alpha for r in ranking])
        rewards = np.array([beta * r.s for r in ranking])
        return float(-np.dot(target / target.sum(), rewards - np.log(np.exp(rewards).sum())))

    return on_lists(loss)


def lipo_lambda(beta: float, *, from_scores: bool) -> np.ndarray:
    def loss(ranking: list[Response]) -> float:
        place = {id(r): k for k, r in enumerate(sorted(ranking, key=lambda r: -r.s), 1)}
        worse = [sum(other.rank > r.rank for other in ranking) for r in ranking]
        gain = [
            2 ** (r.score if from_scores else n / (len(ranking) - 1))
            for r, n in zip(ranking, worse, strict=True)
        ]
        total = 0.0
        for (i, w), (j, x) in combinations(enumerate(ranking), 2):
            discount = abs(1 / np.log1p(place[id(w)]) - 1 / np.log1p(place[id(x)]))
            total += (w.rank < x.rank) * abs(gain[i] - gain[j]) * discount * nls(beta * (w.s - x.s))
        return total

    return on_lists(loss)


def kto(beta: float, up: float, down: float, baseline: float) -> np.ndarray:
    def loss(ranking: list[Response]) -> float:
        gains = [(r.rank == 0, beta * (r.s - baseline)) for r in ranking]
        return mean([up * sigmoid(-gain) if good else down * sigmoid(gain) for good, gain in gains])

    return on_lists(loss)


def bco(beta: float, up: float, down: float, shift: float) -> np.ndarray:
    def loss(ranking: list[Response]) -> float:
        logits = [(r.rank == 0, beta * (r.s - shift)) for r in ranking]
        return mean([up * nls(logit) if good else down * nls(-logit) for good, logit in logits])

    return on_lists(loss)


MISMATCHED_MEAN = max(0.0, POLICY[2, 3] - REFERENCE[2, 3])
OWN_MEAN = max(0.0, mean([r.s for responses in PROMPTS for r in responses]))
SHIFT = 0.4

FORMULAS = [
    ({"name": "dpo"}, on_pairs(lambda w, x: nls(0.1 * (w.s - x.s)))),
    (
        {"name": "dpo", "beta": 0.7, "label_smoothing": 0.2},
        on_pairs(lambda w, x: smoothed(0.7 * (w.s - x.s), 0.2)),
    ),
    ({"name": "all_pairs"}, on_pairs(lambda w, x: nls(0.1 * (w.s - x.s)))),
    ({"name": "all_pairs", "label_smoothing": 0.2}, on_pairs(lambda w, x: smoothed(0.1 * (w.s - x.s), 0.2))),
    ({"name": "ipo"}, on_pairs(lambda w, x: (w.s - x.s - 5) ** 2)),
    ({"name": "ipo_norm"}, on_pairs(lambda w, x: (w.s / w.length - x.s / x.length - 5) ** 2)),
    ({"name": "hinge"}, on_pairs(lambda w, x: max(0, 1 - 0.1 * (w.s - x.s)))),
    (
        {"name": "robust"},
        on_pairs(lambda w, x: (0.9 * nls(0.1 * (w.s - x.s)) - 0.1 * nls(-0.1 * (w.s - x.s))) / 0.8),
    ),
    ({"name": "dpo_norm"}, on_pairs(lambda w, x: nls(5 * (w.s / w.length - x.s / x.length)))),
    ({"name": "exo"}, exo(0.1, 1e-3)),
    ({"name": "exo", "beta": 0.4, "label_smoothing": 0.1}, exo(0.4, 0.1)),
    ({"name": "nca"}, on_pairs(lambda w, x: nls(0.1 * w.s) + nls(-0.1 * w.s) / 2 + nls(-0.1 * x.s) / 2)),
    ({"name": "bco_pair"}, on_pairs(lambda w, x: nls(0.1 * w.s) + nls(-0.1 * x.s))),
    ({"name": "sppo_hard"}, on_pairs(lambda w, x: (w.s - 500) ** 2 + (x.s + 500) ** 2)),
    ({"name": "apo_zero"}, on_pairs(lambda w, x: 1 - sigmoid(0.1 * w.s) + sigmoid(0.1 * x.s))),
    ({"name": "apo_down"}, on_pairs(lambda w, x: sigmoid(0.1 * w.s) + 1 - sigmoid(0.1 * (w.s - x.s)))),
    ({"name": "discopop"}, discopop(0.1, 0.05)),
    ({"name": "discopop", "beta": 0.3, "tau": 0.5}, discopop(0.3, 0.5)),
    ({"name": "dpop"}, on_pairs(lambda w, x: nls(0.3 * (w.s - x.s - 50 * max(0, -w.s))))),
    ({"name": "cal_dpo"}, on_pairs(lambda w, x: nls(w.s - x.s) + (w.s - 5) ** 2 + (x.s + 5) ** 2)),
    ({"name": "r_dpo"}, on_pairs(lambda w, x: nls(0.1 * (w.s - x.s) + 0.01 * (w.length - x.length)))),
    ({"name": "odpo"}, on_pairs(lambda w, x: nls(0.1 * (w.s - x.s) - np.log(w.score - x.score)))),
    (
        {"name": "odpo", "alpha": 0.5, "scaling": "identity"},
        on_pairs(lambda w, x: nls(0.1 * (w.s - x.s) - 0.5 * (w.score - x.score))),
    ),
    ({"name": "reward_distillation"}, on_pairs(lambda w, x: (0.1 * (w.s - x.s) - (w.score - x.score)) ** 2)),
    ({"name": "simpo"}, on_pairs(lambda w, x: nls(2 * (w.p / w.length - x.p / x.length) - 1))),
    ({"name": "cpo"}, on_pairs(lambda w, x: nls(0.1 * (w.p - x.p)) - w.p / w.length)),
    (
        {"name": "cpo", "label_smoothing": 0.2, "nll_weight": 0.5},
        on_pairs(lambda w, x: smoothed(0.1 * (w.p - x.p), 0.2) - 0.5 * w.p / w.length),
    ),
    ({"name": "orpo"}, orpo(0.1, 1.0)),
    ({"name": "orpo", "beta": 0.25, "nll_weight": 0.5}, orpo(0.25, 0.5)),
    ({"name": "softmax_best"}, softmax_best(0.1)),
    ({"name": "softmax_best", "beta": 0.6}, softmax_best(0.6)),
    ({"name": "infonca"}, infonca(0.1, 1.0)),
    ({"name": "infonca", "beta": 0.6, "alpha": 0.5}, infonca(0.6, 0.5)),
    ({"name": "lipo_lambda"}, lipo_lambda(0.05, from_scores=False)),
    ({"name": "lipo_lambda", "beta": 0.6, "gains": "scores"}, lipo_lambda(0.6, from_scores=True)),
    ({"name": "kto"}, kto(0.1, 1, 1, MISMATCHED_MEAN)),
    ({"name": "kto", "desirable_weight": 1.3, "baseline": "batch"}, kto(0.1, 1.3, 1, OWN_MEAN)),
    ({"name": "kto", "undesirable_weight": 0.6, "baseline": "none"}, kto(0.1, 1, 0.6, 0)),
    ({"name": "bco"}, bco(0.1, 1, 1, SHIFT)),
    (
        {"name": "bco", "desirable_weight": 1.3, "undesirable_weight": 0.6, "shift": "batch"},
        bco(0.1, 1.3, 0.6, mean([r.s for responses in PROMPTS for r in responses])),
    ),
]


@pytest.mark.parametrize(
    ("spec", "expected"), FORMULAS, ids=lambda given: str(given) if isinstance(given, dict) else ""
)
def test_an_objective_is_its_formula(spec: dict, expected: np.ndarray) -> None:
    with jax.enable_x64(True):
        scores = make_scores(
            POLICY,
            REFERENCE,
            lengths=LENGTHS,
            present=PRESENT,
            ranks=RANKS,
            scores=SCORES,
            shift=np.asarray(SHIFT),
        )
        np.testing.assert_allclose(value(make_objective(spec), scores), expected, rtol=1e-9)
