"""Samplers of the DDPM process equal their exact recursions, and approach the data as T grows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine import moments_by_derivative
from numpy.testing import assert_allclose

from dpo.diffusion.mixture import Mixture, ddim_moments, exact_denoiser
from dpo.diffusion.samplers import ancestral, ddim
from dpo.diffusion.schedule import SCHEDULES, cosine, linear, noised

GAUSSIAN = Mixture(np.ones(1), np.array([[0.6]]), 0.25)
START: Any = {"start_mean": 0.2, "start_variance": 0.9}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_has_the_moments_of_its_recursion(eta: float) -> None:
    schedule = cosine(9)
    with jax.enable_x64(True):
        denoiser = exact_denoiser(GAUSSIAN, schedule)
        found = moments_by_derivative(lambda x, z: ddim(denoiser, schedule, x, z, eta=eta), 9, **START)
    exact = ddim_moments(schedule, mean=0.6, variance=0.25, eta=eta, **START)
    assert_allclose(found, [exact.mean[-1], exact.variance[-1]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["posterior", "beta"])
def test_the_ancestral_sampler_has_the_moments_of_its_recursion(kind) -> None:
    schedule = linear(30)
    with jax.enable_x64(True):
        denoiser = exact_denoiser(GAUSSIAN, schedule)
        found = moments_by_derivative(
            lambda x, z: ancestral(denoiser, schedule, x, z, variance=kind), 30, **START
        )
    added = schedule.betas if kind == "beta" else None
    exact = ddim_moments(schedule, mean=0.6, variance=0.25, eta=1.0, noise_variance=added, **START)
    assert_allclose(found, [exact.mean[-1], exact.variance[-1]], rtol=1e-6)


def test_the_ancestral_sampler_is_ddim_with_eta_one() -> None:
    """Also with a denoiser that isn't affine: two components."""
    schedule, rng = linear(12), np.random.default_rng(0)
    mixture = Mixture(np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [1.0, 0.0]]), 0.1)
    with jax.enable_x64(True):
        start, noise = jnp.asarray(rng.normal(size=(4, 2))), jnp.asarray(rng.normal(size=(12, 4, 2)))
        denoiser = exact_denoiser(mixture, schedule)
        assert_allclose(
            ancestral(denoiser, schedule, start, noise),
            ddim(denoiser, schedule, start, noise, eta=1.0),
            rtol=1e-8,
        )


def test_with_a_perfect_denoiser_finite_t_is_still_not_exact() -> None:
    """FIGURES of docs/diffusion.md: data variance 0.25, linear schedule, start N(0, 1)."""
    by_steps = {
        eta: [ddim_moments(linear(T), variance=0.25, eta=eta).variance[-1] for T in (10, 50, 200, 1000)]
        for eta in (0.0, 1.0)
    }
    assert_allclose(by_steps[0.0], [0.129, 0.223, 0.243, 0.249], atol=6e-4)
    assert_allclose(by_steps[1.0], [0.091, 0.197, 0.233, 0.246], atol=6e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_error_halves_when_the_steps_double(name: str, eta: float) -> None:
    """Started from the exact law of x_T, so that only the discretisation is left."""

    def error(num_steps: int) -> float:
        schedule = SCHEDULES[name](num_steps)
        last = schedule.alphas[-1]
        start = last * 0.25 + 1 - last
        found = ddim_moments(schedule, variance=0.25, eta=eta, start_variance=start).variance[-1]
        return abs(found - 0.25)

    assert error(2000) < 3e-3
    assert 0.45 < error(2000) / error(1000) < 0.62  # 1/T, up to a logarithm


def test_samples_agree_with_the_recursion_within_their_interval() -> None:
    schedule, num = linear(20), 20_000
    start, noise = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(num, 1), (20, num, 1)])
    )
    found = np.asarray(ancestral(exact_denoiser(GAUSSIAN, schedule), schedule, start, noise)[-1])
    exact = ddim_moments(schedule, mean=0.6, variance=0.25, eta=1.0)
    assert abs(found.mean() - exact.mean[-1]) < 4 * np.sqrt(exact.variance[-1] / num)
    assert abs(found.var() - exact.variance[-1]) < 4 * exact.variance[-1] * np.sqrt(2 / num)


def test_ddim_may_skip_steps() -> None:
    """Visiting every second step of a schedule is the process with every second α."""
    schedule = linear(20)
    with jax.enable_x64(True):
        start = jnp.array([[0.7], [-1.2]])
        path = ddim(exact_denoiser(GAUSSIAN, schedule), schedule, start, steps=np.arange(20, 0, -2))
        alphas = schedule.alphas[::2]
        coarse = schedule._replace(alphas=alphas, betas=1 - alphas / np.append(1.0, alphas[:-1]))
        assert_allclose(path, ddim(exact_denoiser(GAUSSIAN, coarse), coarse, start), rtol=1e-9)


def test_the_exact_denoiser_is_the_mean_noise_given_the_noised_sample() -> None:
    """E[ε|x_t] by Bayes on a grid of x_0."""
    schedule, t, xt = linear(10), 4, 0.35
    mixture = Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), 0.2)
    x0 = np.linspace(-6, 6, 20_001)
    noise = (xt - np.sqrt(schedule.alphas[t]) * x0) / np.sqrt(1 - schedule.alphas[t])
    density = np.exp(mixture.log_density(x0[:, None]) - noise**2 / 2)
    with jax.enable_x64(True):
        found = exact_denoiser(mixture, schedule)(jnp.array([[xt]]), jnp.array([t])).item()
        back = noised(schedule, jnp.array([[x0[5]]]), jnp.array([t]), jnp.array([[noise[5]]])).item()
    assert_allclose(found, density @ noise / density.sum(), rtol=1e-7)
    assert_allclose(back, xt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.5}, "eta is 0.5 with no noise"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"steps": np.array([3, 5])}, "allowed: descending"),
        ({"steps": np.array([11, 5])}, "allowed: descending"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    schedule = linear(10)
    with pytest.raises(ValueError, match=message):
        ddim(exact_denoiser(GAUSSIAN, schedule), schedule, jnp.zeros((1, 1)), **settings)
