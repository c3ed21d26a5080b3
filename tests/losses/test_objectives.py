"""Objectives from settings: what is accepted, what is refused and how."""

import math

import numpy as np
import pytest
from score_cases import random_scores, value

from dpo.losses import make_objective


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "dop"}, ["name", "'dop'", "dpo", "plackett_luce"]),
        ({"name": ["dpo"]}, ["name is ['dpo']", "allowed: dpo"]),
        ({"beta": 0.1}, ["name is missing", "dpo"]),
        ({"name": "dpo", "gamma": 1.0}, ["objective dpo", "'gamma'", "1.0", "beta, label_smoothing, pairs"]),
        ({"name": "dpo", "beta": "1e-6"}, ["beta", "'1e-6'", "str", "a number > 0"]),
        ({"name": "dpo", "beta": 0}, ["beta is 0", "> 0"]),
        ({"name": "dpo", "beta": float("nan")}, ["beta is nan", "> 0"]),
        ({"name": "dpo", "beta": True}, ["beta is True", "bool"]),
        ({"name": "dpo", "label_smoothing": 0.5}, ["label_smoothing is 0.5", ">= 0 and < 0.5"]),
        ({"name": "dpo", "divergence": 1.5}, ["divergence is 1.5", "reverse_kl", ">= 0 and <= 1"]),
        ({"name": "dpo", "pairs": "some"}, ["pairs is 'some'", "all, adjacent, best_worst"]),
        ({"name": "plackett_luce", "top_k": 0}, ["top_k is 0", "an integer >= 1 or null"]),
        ({"name": "plackett_luce", "top_k": 1.5}, ["top_k is 1.5", "an integer"]),
        ({"name": "plackett_luce", "label_smoothing": 0.1}, ["'label_smoothing'", "top_k"]),
        ([], ["empty"]),
        ([{"name": "dpo"}, {"name": "dpo", "weight": -1.0}], ["objectives[1]", "weight is -1.0", ">= 0"]),
        ([{"name": "dpo", "pi": 3}], ["objectives[0]", "'pi'"]),
        ({"name": "dpo", "weight": 1.0}, ["'weight'"]),
    ],
)
def test_errors_name_the_key_the_value_and_what_is_allowed(spec, words):
    with pytest.raises(ValueError, match=r".") as caught:
        make_objective(spec)
    for word in words:
        assert word in str(caught.value)


def test_whole_numbers_stand_for_real_ones_and_null_for_no_limit():
    scores = random_scores(K=3)
    given, meant = {"beta": 1, "top_k": None}, {"beta": 1.0}
    first, second = (value(make_objective({"name": "plackett_luce", **s}), scores) for s in (given, meant))
    np.testing.assert_array_equal(first, second)


def test_a_list_is_the_weighted_sum():
    scores = random_scores(K=3)
    terms = [{"name": "dpo", "weight": 0.25, "beta": 0.3}, {"name": "plackett_luce"}]
    expected = 0.25 * value(make_objective({"name": "dpo", "beta": 0.3}), scores)
    expected += value(make_objective({"name": "plackett_luce"}), scores)
    np.testing.assert_allclose(value(make_objective(terms), scores), expected, rtol=1e-6)


def test_expected_initial_loss_of_dpo_is_ln_2():
    scores = random_scores(P=3)
    expected = make_objective({"name": "dpo"}).expected_initial_loss(scores)
    assert expected is not None
    np.testing.assert_allclose(expected, math.log(2.0), rtol=1e-6)


def test_specs_are_left_as_they_were():
    spec = {"name": "dpo", "beta": 1}
    make_objective([spec, spec])
    assert spec == {"name": "dpo", "beta": 1}
