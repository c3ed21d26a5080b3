"""The hand-written derivative of −log σ(δ) is the derivative, and stays finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from score_cases import finite_differences, of_log_ratio

from dpo.losses import make_objective
from dpo.losses.bradley_terry import bradley_terry, negative_log_sigmoid

DELTAS = np.array([-40.0, -3.0, -0.7, 0.0, 0.2, 1.9, 35.0])


def _plain(delta):
    return -jnp.log(1 / (1 + jnp.exp(-delta)))


def test_hand_written_gradient_is_autodiff_of_the_plain_formula_and_finite_differences():
    with jax.enable_x64(True):
        deltas = jnp.asarray(DELTAS)
        by_hand = jax.grad(lambda d: negative_log_sigmoid(d).sum())(deltas)
        by_autodiff = jax.grad(lambda d: _plain(d).sum())(deltas)
        by_differences = finite_differences(lambda d: negative_log_sigmoid(d).sum(), DELTAS)
        np.testing.assert_allclose(by_hand, by_autodiff, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(by_hand, by_differences, atol=1e-8)
        np.testing.assert_allclose(negative_log_sigmoid(deltas), _plain(deltas), rtol=1e-12, atol=1e-15)


def test_weight_is_the_probability_of_ranking_the_pair_wrongly():
    with jax.enable_x64(True):
        for delta in (-3.0, 0.0, 1.2):
            weight = -jax.grad(negative_log_sigmoid)(jnp.asarray(delta))
            assert float(weight) == pytest.approx(1 / (1 + np.exp(delta)), rel=1e-12)  # σ(−δ), not σ(δ)


@pytest.mark.parametrize("delta", [1e4, -1e4])
def test_extreme_deltas_are_finite_in_float32(delta):
    value, slope = jax.value_and_grad(negative_log_sigmoid)(jnp.float32(delta))
    assert (float(value), float(slope)) == ((0.0, -0.0) if delta > 0 else (1e4, -1.0))


def test_label_smoothing_stops_at_the_logit_of_the_noise():
    with jax.enable_x64(True):
        slope = jax.grad(lambda d: bradley_terry(d, label_smoothing=0.2))(jnp.asarray(np.log(0.8 / 0.2)))
        assert abs(float(slope)) < 1e-15


def test_without_smoothing_it_is_the_likelihood_alone_also_where_that_is_certain():
    deltas = jnp.asarray([*DELTAS, np.inf], jnp.float32)
    np.testing.assert_array_equal(bradley_terry(deltas), negative_log_sigmoid(deltas))
    assert float(bradley_terry(deltas)[-1]) == 0.0


def test_dpo_gradient_in_the_policy_is_beta_times_the_weight():
    """∂L/∂log π_w = −β σ(−δ) = −∂L/∂log π_l."""
    with jax.enable_x64(True):
        beta, log_ratio = 0.3, np.array([[1.0, -0.5], [-2.0, 3.0]])
        objective = make_objective({"name": "dpo", "beta": beta})
        scores = of_log_ratio(log_ratio)
        slope = jax.grad(lambda p: objective(scores._replace(policy=p)).sum())(scores.policy)
        weight = 1 / (1 + np.exp(beta * (log_ratio[:, 0] - log_ratio[:, 1])))
        np.testing.assert_allclose(slope, beta * np.stack([-weight, weight], axis=1), rtol=1e-12)
