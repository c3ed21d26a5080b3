"""Extra sums: each is a row of a table, and an objective says which it needs."""

import jax.numpy as jnp
import pytest

from dpo.losses import Objective, Scores
from dpo.losses.sums import EXTRA_SUMS


def test_objectives_find_every_extra_sum_in_a_field_of_scores():
    for extra in EXTRA_SUMS.values():
        assert {extra.policy, extra.reference or extra.policy} <= set(Scores._fields)


def test_the_reference_stores_what_objectives_read_of_it():
    objective = Objective(lambda scores: jnp.zeros(1), needs=frozenset({"head", "log_collision", "scores"}))
    assert objective.sums == {"head", "log_collision"}
    assert objective.reference_sums == {"head"}


def test_a_need_that_nothing_meets_is_refused():
    with pytest.raises(
        ValueError, match="needs are log_colision; allowed: head, log_collision, mismatched, "
    ):
        Objective(lambda scores: jnp.zeros(1), needs=frozenset({"log_colision", "head"}))


def test_single_responses_are_rows_without_order():
    with pytest.raises(ValueError, match="learns_from_ties must be true too"):
        Objective(lambda scores: jnp.zeros(1), learns_from_single_responses=True)
