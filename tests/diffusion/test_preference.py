"""Diffusion-DPO's scores: their gradient by hand, what sharing does, and where the optimum is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from dpo.diffusion.mixture import Mixture, exact_denoiser
from dpo.diffusion.preference import Noising, Sharing, diffusion_scores, draw_noising, score_weights
from dpo.diffusion.schedule import elbo_weights, linear, noised, reverse_variance
from dpo.diffusion.shared_noise import score_coefficients, summed_share
from dpo.losses import make_objective

SCHEDULE = linear(12)
FAST = {"xla_backend_optimization_level": 0}
VARIANCE = 0.25


def gaussian_denoiser(mean):
    """The exact denoiser of N(mean, 0.25), from the one of N(0, 0.25) by linearity: `mean` may be traced."""
    centred = exact_denoiser(Mixture(np.ones(1), np.zeros((1, 1)), VARIANCE), SCHEDULE)
    signal = jnp.sqrt(jnp.asarray(SCHEDULE.alphas))
    return lambda x, t: centred(x - signal[t][:, None] * mean, t)


def random_pairs(P: int, K: int, S: int, D: int = 1, *, seed: int = 0, sharing: Sharing = "time_and_noise"):
    rng = np.random.default_rng(seed)
    samples = jnp.asarray(0.5 * rng.normal(size=(P, K, D)))
    return samples, draw_noising(jax.random.key(seed), (P, K, S, D), SCHEDULE.num_steps, sharing=sharing)


def test_the_gradient_is_the_one_by_hand_autodiff_and_finite_differences() -> None:
    """∂L/∂θ = −β σ(−δ) (∂s_w − ∂s_l), ∂s/∂θ = mean over S of 2 ω_t (ε − ε_θ)·∂ε_θ/∂θ.

    The network here is ε_θ = θ₀ x + θ₁ t.
    """
    beta, theta = 0.7, np.array([0.4, -0.1])
    with jax.enable_x64(True):
        samples, noising = random_pairs(5, 2, 3, 2)
        weights = score_weights(SCHEDULE, "elbo")

        def loss(theta):
            scores = diffusion_scores(
                lambda x, t: theta[0] * x + theta[1] * t[:, None],
                lambda x, t: 0.3 * x,
                samples,
                noising,
                schedule=SCHEDULE,
                weights=weights,
            )
            return jnp.mean(make_objective({"name": "dpo", "beta": beta})(scores)), scores

        loss = jax.jit(loss)
        (_, scores), by_jax = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(theta))
        step = 1e-6 * np.eye(2)
        numerically = [(float(loss(theta + h)[0]) - float(loss(theta - h)[0])) / 2e-6 for h in step]
        repeated = jnp.broadcast_to(samples[:, :, None], noising.noise.shape)
        xt = np.asarray(noised(SCHEDULE, repeated, noising.t, noising.noise))
    t, noise = np.asarray(noising.t)[..., None], np.asarray(noising.noise)
    error = noise - (theta[0] * xt + theta[1] * t)
    scale = 2 * weights[t[..., 0]]
    by_parameter = np.stack(
        [(scale * (error * part).sum(-1)).mean(-1) for part in (xt, np.broadcast_to(t, xt.shape))]
    )
    gap = by_parameter[:, :, 0] - by_parameter[:, :, 1]  # [parameter, pair]
    log_ratio = np.asarray(scores.log_ratio)
    delta = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    by_hand = (-beta / (1 + np.exp(delta)) * gap).mean(axis=1)
    assert_allclose(by_jax, by_hand, rtol=1e-8)
    assert_allclose(numerically, by_hand, rtol=1e-6)


def test_the_score_is_the_quadratic_of_the_toy() -> None:
    """c_t (2 m x − m²) − 2 b_t m ε, through the real denoisers."""
    mean = 0.4
    with jax.enable_x64(True):
        samples, noising = random_pairs(6, 3, 1, sharing="nothing")
        weights = score_weights(SCHEDULE, "elbo")
        scores = diffusion_scores(
            gaussian_denoiser(mean),
            gaussian_denoiser(0.0),
            samples,
            noising,
            schedule=SCHEDULE,
            weights=weights,
        )
    signal, spread = score_coefficients(SCHEDULE, VARIANCE, weights)
    t, noise, x = (
        np.asarray(noising.t)[..., 0],
        np.asarray(noising.noise)[..., 0, 0],
        np.asarray(samples)[..., 0],
    )
    expected = signal[t] * (2 * mean * x - mean**2) - 2 * spread[t] * mean * noise
    assert_allclose(scores.log_ratio, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "plackett_luce"])
def test_with_the_whole_elbo_inside_the_optimum_is_the_exact_shift(name: str) -> None:
    """Data N(0, s), reward g x, policy the exact denoiser of N(m, s): stationary at m = g s/β.

    Every step once (S = T), noise shared, every order of a preference weighted by its probability under the
    reward. The ELBO's finite-T curvature 1/(2 s C) is the whole difference from g s/β, so β is taken to it.
    """
    slope, K = 1.5, 2 if name == "dpo" else 3
    with jax.enable_x64(True):
        samples, noising = random_pairs(4, K, SCHEDULE.num_steps)
        weights = score_weights(SCHEDULE, "elbo", variance="beta")
        beta = summed_share(SCHEDULE, VARIANCE, weights)
        objective = make_objective({"name": name, "beta": beta})
        orders = np.array(list(itertools.permutations(range(K))))
        every = [part[:, orders].reshape(-1, *part.shape[1:]) for part in (samples, *noising)]
        rewards = slope * every[0][..., 0]
        stages = [rewards[:, i] - jax.nn.logsumexp(rewards[:, i:], axis=1) for i in range(K)]
        probability = jnp.exp(sum(stages))

        def loss(mean):
            scores = diffusion_scores(
                gaussian_denoiser(mean),
                gaussian_denoiser(0.0),
                every[0],
                Noising(*every[1:]),
                schedule=SCHEDULE,
                weights=weights,
            )
            return jnp.mean(probability * objective(scores))

        gradient, exact = jax.jit(jax.grad(loss), compiler_options=FAST), slope * VARIANCE
        assert abs(float(gradient(exact))) < 1e-6
        assert float(gradient(0.9 * exact)) < -1e-4 < 1e-4 < float(gradient(1.1 * exact))


def test_objectives_take_the_scores_as_they_are() -> None:
    """At policy = reference each has its loss at log-ratio zero: ln 2 for dpo, log K! for Plackett-Luce."""
    samples, noising = random_pairs(3, 3, 2)
    denoiser = gaussian_denoiser(0.0)
    scores = diffusion_scores(
        denoiser, denoiser, samples, noising, schedule=SCHEDULE, weights=score_weights(SCHEDULE, "elbo")
    )
    assert_allclose(scores.log_ratio, 0.0, atol=1e-6)
    for name in ("ipo", "softmax_best"):
        objective = make_objective({"name": name})
        expected = objective.expected_initial_loss(scores)
        assert expected is not None
        assert_allclose(objective(scores), expected, rtol=1e-6)
    assert_allclose(make_objective({"name": "dpo"})(scores), np.log(2), rtol=1e-5)
    assert_allclose(make_objective({"name": "plackett_luce"})(scores), np.log(6), rtol=1e-5)


def test_the_mean_of_squares_asks_for_a_beta_larger_by_the_dimensions() -> None:
    samples, noising = random_pairs(4, 2, 2, 3)
    scores = {
        reduction: diffusion_scores(
            lambda x, t: 0.5 * x,
            lambda x, t: 0.2 * x,
            samples,
            noising,
            schedule=SCHEDULE,
            weights=score_weights(SCHEDULE, "uniform"),
            reduction=reduction,
        )
        for reduction in ("sum", "mean")
    }
    assert_allclose(scores["sum"].log_ratio, 3 * scores["mean"].log_ratio, rtol=1e-5)
    assert_allclose(
        make_objective({"name": "dpo", "beta": 0.6})(scores["mean"]),
        make_objective({"name": "dpo", "beta": 0.2})(scores["sum"]),
        rtol=1e-5,
    )


def test_sharing_is_what_it_says() -> None:
    cases: tuple[tuple[Sharing, bool, bool], ...] = (
        ("time_and_noise", True, True),
        ("time", True, False),
        ("nothing", False, False),
    )
    for sharing, same_time, same_noise in cases:
        t, noise = draw_noising(jax.random.key(1), (4, 3, 5, 2), 100, sharing=sharing)
        assert bool(jnp.all(t == t[:, :1])) == same_time
        assert bool(jnp.all(noise == noise[:, :1])) == same_noise
        assert not bool(jnp.all(t == t[:1]))
        assert len(np.unique(np.asarray(noise)[:, 0])) == 4 * 5 * 2  # fresh in every copy and preference


def test_times_are_stratified_and_uniform() -> None:
    t = np.sort(np.asarray(draw_noising(jax.random.key(0), (50, 2, 8, 1), 8).t), axis=2)
    assert (t == np.arange(1, 9)).all()  # S = T visits every step once
    t = np.asarray(draw_noising(jax.random.key(0), (20_000, 2, 1, 1), 5).t)[:, 0, 0]
    counts = np.bincount(t, minlength=6)
    assert counts[0] == 0
    assert_allclose(counts[1:], 4000, atol=4 * np.sqrt(20_000 * 0.2 * 0.8))


def test_weights_are_for_a_mean_over_times() -> None:
    elbo = elbo_weights(SCHEDULE, reverse_variance(SCHEDULE, "posterior"))
    assert_allclose(score_weights(SCHEDULE, "elbo")[1:].mean(), elbo.sum())
    assert_allclose(score_weights(SCHEDULE, "uniform"), [0.0] + [0.5] * 12)
