import jax.numpy as jnp
from numpy.testing import assert_allclose

from dpo.losses.scores import MISMATCHED, Scores
from dpo.training.metrics import as_numbers, preference_metrics


def scores(policy, reference, present=None, ranks=None):
    policy, reference = jnp.asarray(policy, jnp.float32), jnp.asarray(reference, jnp.float32)
    default_ranks = jnp.broadcast_to(jnp.arange(policy.shape[1])[None], policy.shape)
    return Scores(
        policy=policy,
        reference=reference,
        lengths=jnp.full(policy.shape, 5),
        present=jnp.ones(policy.shape, bool) if present is None else jnp.asarray(present),
        ranks=default_ranks if ranks is None else jnp.asarray(ranks),
        scores=jnp.full(policy.shape, jnp.nan),
    )


def test_pairs_are_trls_definitions():
    metrics = preference_metrics(scores([[-10, -12], [-20, -18]], [[-11, -11], [-20, -19]]), 0.5)
    assert_allclose(metrics["rewards/chosen"], (0.5 + 0.0) / 2)
    assert_allclose(metrics["rewards/rejected"], (-0.5 + 0.5) / 2)
    assert_allclose(metrics["rewards/margins"], (1.0 - 0.5) / 2)
    assert_allclose(metrics["rewards/accuracies"], 0.5)
    assert_allclose(metrics["logps/chosen"], -15)
    assert_allclose(metrics["logps/rejected"], -15)


def test_a_tied_reward_counts_one_half():
    """As in the held-out figures: a policy that is its reference is right about half of the pairs."""
    assert preference_metrics(scores([[-1, -1]], [[-1, -1]]), 0.1)["rewards/accuracies"] == 0.5


def test_a_difference_in_the_last_digits_counts_one_half_and_a_real_one_does_not():
    """The reference of a first step was scored in a batch of another shape, and is the same model."""
    policy = [[-300.0, -250.0], [-300.0, -250.0], [-300.0, -250.0]]
    reference = [[-300.00003, -250.0], [-299.999, -250.0], [-300.01, -250.0]]
    metrics = preference_metrics(scores(policy, reference), 0.1)
    assert_allclose(metrics["rewards/accuracies"], (0.5 + 0.5 + 1) / 3)
    assert preference_metrics(scores([[-0.001, -0.001]], [[-0.002, -0.001]]), 0.1)["rewards/accuracies"] == 1


def test_rankings_count_every_strictly_ordered_present_pair():
    """Ranks 0, 1, 1 and an absent fourth: pairs (0,1) right and (0,2) wrong; the tied pair does not count."""
    metrics = preference_metrics(
        scores([[2, 1, 3, 99]], [[0, 0, 0, 0]], present=[[True, True, True, False]], ranks=[[0, 1, 1, 2]]),
        1.0,
    )
    assert_allclose(metrics["rewards/accuracies"], 0.5)
    assert_allclose(metrics["rewards/margins"], (1 - 1) / 2)
    assert_allclose(metrics["rewards/rejected"], 2)


def test_single_responses_are_told_by_their_label_and_mismatched_ones_left_out():
    ranks = [[0, MISMATCHED], [1, MISMATCHED]]
    metrics = preference_metrics(scores([[3, 50], [1, 70]], [[0, 0], [0, 0]], ranks=ranks), 1.0)
    assert_allclose([metrics["rewards/chosen"], metrics["rewards/rejected"]], [3, 1])
    assert {"rewards/accuracies", "rewards/margins"}.isdisjoint(as_numbers(metrics))  # there is no pair


def test_what_a_batch_has_none_of_is_left_out_and_a_loss_that_is_no_number_is_not():
    metrics = preference_metrics(scores([[3], [1]], [[0], [0]], ranks=[[1], [1]]), 1.0)
    numbers = as_numbers(metrics | {"loss": jnp.asarray(jnp.nan)})
    assert set(numbers) == {"rewards/rejected", "logps/rejected", "lengths/rejected", "loss"}
    assert numbers["rewards/rejected"] == 2
