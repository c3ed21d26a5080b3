"""From noise to samples. The random numbers are an argument, so that a sampler is a plain function: affine in
(start, noise) when its denoiser is affine, which is how tests find its exact mean and variance.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo.diffusion.schedule import (
    NoisePredictor,
    ReverseVariance,
    Schedule,
    posterior_coefficients,
    posterior_variance,
)
from dpo.outcomes import UserError


def ancestral(
    denoiser: NoisePredictor,
    schedule: Schedule,
    start: Float[Array, "N D"],
    noise: Float[Array, "T N D"],
    *,
    variance: ReverseVariance = "posterior",
) -> Float[Array, "T1 N D"]:
    """DDPM's sampler: x_{t−1} = A_t x̂_0 + B_t x_t + σ_t z (Ho et al. 2020, algorithm 2). No noise at t = 1.

    Returns the path from step T (first) to step 0 (last).
    """
    steps = np.arange(schedule.num_steps, 0, -1)
    of_data, of_noised = posterior_coefficients(schedule)
    spread = posterior_variance(schedule) if variance == "posterior" else schedule.betas
    deviation = np.where(steps > 1, np.sqrt(spread[steps]), 0.0)
    # x̂_0 = (x_t − √(1 − α_t) ε̂)/√α_t turns A_t x̂_0 + B_t x_t into one factor of x_t and one of ε̂
    signal, rest = np.sqrt(schedule.alphas[steps]), np.sqrt(1.0 - schedule.alphas[steps])
    of_xt = of_noised[steps] + of_data[steps] / signal
    of_noise = -of_data[steps] * rest / signal
    return _run(denoiser, start, noise, steps, np.stack([of_xt, of_noise, deviation], axis=1))


def ddim(
    denoiser: NoisePredictor,
    schedule: Schedule,
    start: Float[Array, "N D"],
    noise: Float[Array, "S N D"] | None = None,
    *,
    eta: float = 0.0,
    steps: Int[np.ndarray, " S"] | None = None,
) -> Float[Array, "S1 N D"]:
    """DDIM: x_s = √α_s x̂_0 + √(1 − α_s − σ²) ε̂ + σ z (Song et al. 2021, Eq. 12 and 16).

    σ² = η² (1 − α_s)/(1 − α_t) · (1 − α_t/α_s). η = 0 is deterministic and needs no `noise`; η = 1 is
    `ancestral`. `steps` are the steps visited, descending from T, all of them when not given; the last goes
    to 0. Returns the path, first the start.

    Raises:
      ValueError: for η outside [0, 1], η > 0 without noise, steps that don't descend inside 1 … T.
    """
    if not 0.0 <= eta <= 1.0 or (eta > 0.0 and noise is None):
        given = "no noise" if noise is None else "noise"
        raise UserError(f"eta is {eta} with {given}; allowed: 0, or up to 1 with noise")
    steps = np.arange(schedule.num_steps, 0, -1) if steps is None else steps
    if not (np.all(np.diff(steps) < 0) and steps[-1] >= 1 and steps[0] <= schedule.num_steps):
        raise UserError(f"steps are {steps}; allowed: descending, from {schedule.num_steps} to 1")
    now, then = schedule.alphas[steps], schedule.alphas[np.append(steps[1:], 0)]
    variance = eta**2 * (1.0 - then) / (1.0 - now) * (1.0 - now / then)
    of_xt = np.sqrt(then / now)
    of_noise = np.sqrt(1.0 - then - variance) - of_xt * np.sqrt(1.0 - now)
    if noise is None:
        noise = jnp.zeros((len(steps), *start.shape), start.dtype)
    return _run(denoiser, start, noise, steps, np.stack([of_xt, of_noise, np.sqrt(variance)], axis=1))


def _run(
    denoiser: NoisePredictor,
    start: Float[Array, "N D"],
    noise: Float[Array, "S N D"],
    steps: Int[np.ndarray, " S"],
    factors: Float[np.ndarray, "S 3"],
) -> Float[Array, "S1 N D"]:
    """x ← a x + b ε̂(x, t) + c z along the steps."""

    def step(x: Float[Array, "N D"], inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        t, factor, z = inputs
        predicted = denoiser(x, jnp.full(x.shape[:1], t))
        x = factor[0] * x + factor[1] * predicted + factor[2] * z
        return x, x

    inputs = (jnp.asarray(steps), jnp.asarray(factors, start.dtype), noise)
    _, path = jax.lax.scan(step, start, inputs)
    return jnp.concatenate([start[None], path])
