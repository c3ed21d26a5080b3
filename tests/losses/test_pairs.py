"""Which pairs a ranking gives."""

import jax.numpy as jnp
import numpy as np
import pytest
from score_cases import evaluate, of_log_ratio, random_scores, value

from dpo.losses import MISMATCHED, make_objective
from dpo.losses.pairs import pair_mask

NAMES = "abcd"


def _pairs(kind, ranks, present=None):
    scores = of_log_ratio(
        jnp.zeros((1, len(ranks))), ranks=[ranks], present=None if present is None else [present]
    )
    return {NAMES[i] + NAMES[j] for _, i, j in np.argwhere(np.asarray(pair_mask(scores, kind)))}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("all", "ab ac ad bd cd"), ("adjacent", "ab ac bd cd"), ("best_worst", "ad")],
)
def test_pairs_of_a_ranking_with_a_tie(kind, expected):
    assert _pairs(kind, [0, 1, 1, 2]) == set(expected.split())


def test_absent_responses_are_in_no_pair_and_their_neighbours_become_adjacent():
    assert _pairs("adjacent", [0, 1, 2, 3], [True, False, True, True]) == {"ac", "cd"}
    assert _pairs("best_worst", [0, 1, 2, 3], [True, True, True, False]) == {"ac"}


def test_a_mismatched_response_is_never_compared():
    assert _pairs("all", [0, 1, MISMATCHED, MISMATCHED]) == {"ab"}


@pytest.mark.parametrize("kind", ["all", "adjacent", "best_worst"])
def test_a_pair_has_one_pair_and_a_tie_none(kind):
    assert _pairs(kind, [0, 1]) == {"ab"}
    assert _pairs(kind, [0, 0]) == set()


def test_a_ranking_counts_the_mean_over_its_pairs():
    scores = random_scores(K=3, P=2)
    whole = value(make_objective({"name": "dpo", "pairs": "all"}), scores)
    pair = make_objective({"name": "dpo"})

    def of_pair(i, j):
        return value(pair, of_log_ratio(scores.log_ratio[:, [i, j]]))

    np.testing.assert_allclose(whole, (of_pair(0, 1) + of_pair(0, 2) + of_pair(1, 2)) / 3, rtol=1e-5)


def test_a_prompt_without_pairs_has_loss_zero():
    scores = of_log_ratio(jnp.ones((1, 2)), ranks=[[0, 0]])
    assert float(make_objective({"name": "dpo"})(scores)[0]) == 0.0


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_loss_that_sorts_the_batch_is_one_mean_over_its_pairs(name):
    """A prompt of three responses has three pairs: each counts as much as the other prompt's one."""
    present = np.array([[True, True, True], [True, True, False]])
    scores = random_scores(3, P=2, K=3, present=present)
    better, worse = np.array([0, 0, 1, 3]), np.array([1, 2, 2, 4])
    policy, reference = (np.asarray(x).ravel() for x in (scores.policy, scores.reference))
    if name == "aot":
        left, right = policy[better] - policy[worse], reference[better] - reference[worse]
    else:
        left, right = (policy - reference)[better], (policy - reference)[worse]
    gaps = 0.1 * (np.sort(left) - np.sort(right))
    expected = np.log1p(np.exp(-gaps)).mean()
    np.testing.assert_allclose(evaluate({"name": name}, scores)[0].mean(), expected, rtol=1e-5)
