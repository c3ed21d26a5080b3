"""Token statistics: LD-DPO's head and WPO's collision probability, from per-token arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from score_cases import evaluate, random_scores

from dpo.losses.sums import in_head, log_collision
from dpo.losses.weighting import with_policy_weights, with_tail_weight

# Two prompts; responses of 3 and 1 tokens, and of 2 and 2; owner 4 is padding.
#   row 0: prompt of 2, response 0 (a a a), response 1 (b);  row 1: prompt of 4, responses 2 (c c), 3 (d d)
OWNER = jnp.array([[0, 0, 0, 1, 4], [2, 2, 3, 3, 4]])
LENGTHS = jnp.array([[3, 1], [2, 2]])


def test_the_head_is_as_long_as_the_prompts_shortest_response():
    head = in_head(OWNER, LENGTHS, jnp.ones((2, 2), bool))
    np.testing.assert_array_equal(head, [[1, 0, 0, 1, 0], [1, 1, 1, 1, 0]])


def test_absent_responses_do_not_shorten_the_head():
    owner = jnp.where(OWNER == 1, 4, OWNER)
    head = in_head(owner, LENGTHS.at[0, 1].set(0), jnp.array([[True, False], [True, True]]))
    np.testing.assert_array_equal(head, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_collision_is_the_log_of_the_sum_of_squared_probabilities():
    logits = jnp.array([[0.0, 1.0, -2.0], [50.0, 0.0, 0.0]])
    expected = np.log((np.asarray(jax.nn.softmax(logits)) ** 2).sum(axis=1))
    np.testing.assert_allclose(log_collision(logits), expected, rtol=1e-5, atol=1e-6)


def test_tail_weight_one_is_the_plain_objective_and_zero_reads_heads_only():
    scores = random_scores(K=2)
    plain, _ = evaluate({"name": "dpo"}, scores)
    np.testing.assert_allclose(evaluate({"name": "dpo", "ld_alpha": 1.0}, scores)[0], plain, rtol=1e-5)
    heads = scores._replace(policy=scores.policy_head, reference=scores.reference_head)
    expected, _ = evaluate({"name": "dpo"}, heads)
    np.testing.assert_allclose(evaluate({"name": "dpo", "ld_alpha": 0.0}, scores)[0], expected, rtol=1e-5)


def test_wpo_multiplies_the_loss_of_a_pair_and_is_not_differentiated():
    scores = random_scores(K=2)
    assert scores.log_collision is not None
    weights = np.exp((scores.policy - scores.log_collision) / scores.lengths).prod(axis=1)
    losses, slope = evaluate({"name": "dpo"}, scores)
    weighted, weighted_slope = evaluate({"name": "dpo", "wpo": True}, scores)
    np.testing.assert_allclose(weighted, weights * losses, rtol=1e-5)
    np.testing.assert_allclose(weighted_slope, weights[:, None] * slope, rtol=1e-5)
    np.testing.assert_array_equal(evaluate({"name": "dpo", "wpo": False}, scores)[0], losses)


def test_a_response_of_one_token_is_weighted_by_that_token_and_an_absent_one_by_one():
    scores = random_scores(K=2)
    scores = scores._replace(lengths=jnp.ones_like(scores.lengths).at[0, 1].set(0))
    assert scores.log_collision is not None
    collision = scores.log_collision.at[0, 1].set(0.0)
    scores = scores._replace(policy=scores.policy.at[0, 1].set(0.0), log_collision=collision)
    weights = with_policy_weights(scores).weights
    assert weights is not None
    np.testing.assert_allclose(weights, np.exp(scores.policy - collision), rtol=1e-6)
    assert float(weights[0, 1]) == 1.0


def test_half_a_tail_counts_half():
    scores = random_scores(K=2)
    assert scores.policy_head is not None
    assert scores.reference_head is not None
    found = with_tail_weight(scores, 0.5)
    np.testing.assert_allclose(found.policy, (scores.policy + scores.policy_head) / 2, rtol=1e-6)
    np.testing.assert_allclose(found.reference, (scores.reference + scores.reference_head) / 2, rtol=1e-6)
