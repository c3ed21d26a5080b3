"""The variance-preserving (DDPM) process: q(x_t|x_0) = N(√α_t x_0, (1 − α_t) I) for any β_1 … β_T.

α_t = Π_{s≤t} (1 − β_s) is the cumulative product (the notation of DDIM; DDPM writes ᾱ_t). Everything about a
process follows from it. Schedules are float64 numpy arrays with an entry for step 0 (β_0 = 0, α_0 = 1), so
that an index is a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo.outcomes import UserError

Prediction = Literal["noise", "data", "velocity"]
"""What a network outputs: ε, x_0, or v = √α_t ε − √(1 − α_t) x_0 (Salimans and Ho 2022, arXiv:2202.00512)."""

ReverseVariance = Literal["posterior", "beta"]
"""Variance of x_{t−1} given x_t in the model: that of q(x_{t−1}|x_t, x_0), or β_t (Ho et al. 2020, §3.2)."""


class Schedule(NamedTuple):
    """β_t and α_t for t = 0 … T."""

    betas: Float[np.ndarray, " T1"]
    alphas: Float[np.ndarray, " T1"]

    @property
    def num_steps(self) -> int:
        return len(self.betas) - 1


def schedule_of(betas: Float[np.ndarray, " T"]) -> Schedule:
    """The process with these β_1 … β_T.

    Raises:
      ValueError: when one of them is not inside (0, 1).
    """
    if len(betas) == 0 or not np.all((betas > 0.0) & (betas < 1.0)):
        raise UserError(
            f"betas run from {np.min(betas, initial=1)} to {np.max(betas, initial=0)}; "
            "allowed: at least one, each inside (0, 1)"
        )
    padded = np.concatenate([[0.0], np.asarray(betas, np.float64)])
    return Schedule(padded, np.cumprod(1.0 - padded))


def linear(num_steps: int, *, low: float = 0.1, high: float = 20.0, largest: float = 0.999) -> Schedule:
    """β_t from low/T to high/T in equal steps: at T = 1000, DDPM's 1e-4 to 0.02 (Ho et al. 2020, §4)."""
    return schedule_of(np.minimum(np.linspace(low, high, num_steps) / num_steps, largest))


def cosine(num_steps: int, *, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """α_t ∝ cos²(π/2 · (t/T + s)/(1 + s)), with β_t capped (Nichol and Dhariwal 2021, Eq. 17)."""
    angle = (np.arange(num_steps + 1) / num_steps + offset) / (1.0 + offset) * np.pi / 2.0
    alphas = np.cos(angle) ** 2
    return schedule_of(np.minimum(1.0 - alphas[1:] / alphas[:-1], largest))


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"linear": linear, "cosine": cosine}


def at_step(values: Float[np.ndarray, " T1"], t: Int[Array, "*N"]) -> Float[Array, "*N 1"]:
    """A schedule's values at steps, ready to multiply samples."""
    return jnp.asarray(values, jnp.zeros(()).dtype)[t][..., None]


def noised(
    schedule: Schedule, x0: Float[Array, "*N D"], t: Int[Array, "*N"], noise: Float[Array, "*N D"]
) -> Float[Array, "*N D"]:
    """x_t = √α_t x_0 + √(1 − α_t) ε, a draw from q(x_t|x_0)."""
    return at_step(np.sqrt(schedule.alphas), t) * x0 + at_step(np.sqrt(1.0 - schedule.alphas), t) * noise


def posterior_coefficients(schedule: Schedule) -> tuple[Float[np.ndarray, " T1"], Float[np.ndarray, " T1"]]:
    """(A_t, B_t) of E[x_{t−1}|x_t, x_0] = A_t x_0 + B_t x_t (Ho et al. 2020, Eq. 7).

    A_t = √α_{t−1} β_t/(1 − α_t) and B_t = √(1 − β_t) (1 − α_{t−1})/(1 − α_t). At t = 1 the mean is x_0.
    """
    betas, alphas, before = schedule.betas, schedule.alphas, _before(schedule.alphas)
    variance = np.where(alphas < 1.0, 1.0 - alphas, 1.0)  # step 0 has nothing before it: 0 and 0
    return np.sqrt(before) * betas / variance, np.sqrt(1.0 - betas) * (1.0 - before) / variance


def posterior_mean(
    schedule: Schedule, x0: Float[Array, "*N D"], xt: Float[Array, "*N D"], t: Int[Array, "*N"]
) -> Float[Array, "*N D"]:
    """E[x_{t−1}|x_t, x_0]."""
    of_data, of_noised = posterior_coefficients(schedule)
    return at_step(of_data, t) * x0 + at_step(of_noised, t) * xt


def posterior_variance(schedule: Schedule) -> Float[np.ndarray, " T1"]:
    """Var[x_{t−1}|x_t, x_0] = β_t (1 − α_{t−1})/(1 − α_t): zero at t = 1, where x_0 is known."""
    return posterior_coefficients(schedule)[1] * schedule.betas / np.sqrt(1.0 - schedule.betas)


def reverse_variance(schedule: Schedule, kind: ReverseVariance) -> Float[np.ndarray, " T1"]:
    """Variance of the model's x_{t−1} given x_t. The last step needs one that isn't zero: β_1 in both."""
    if kind == "beta":
        return schedule.betas
    return np.where(np.arange(schedule.num_steps + 1) == 1, schedule.betas, posterior_variance(schedule))


def elbo_weights(schedule: Schedule, variance: Float[np.ndarray, " T1"]) -> Float[np.ndarray, " T1"]:
    """ω_t of −ELBO = Σ_t ω_t E‖ε − ε_θ(x_t, t)‖² + what no θ changes (Ho et al. 2020, Eq. 12).

    ω_t = β_t²/(2σ_t² (1 − β_t)(1 − α_t)) for the model's reverse variance σ_t²; ω_0 = 0. With the posterior's
    variance it is ½ (SNR_{t−1} − SNR_t)/SNR_t for t > 1, where SNR_t = α_t/(1 − α_t).
    """
    betas, alphas = schedule.betas[1:], schedule.alphas[1:]
    return np.concatenate([[0.0], betas**2 / (2.0 * variance[1:] * (1.0 - betas) * (1.0 - alphas))])


def target_of(
    schedule: Schedule,
    prediction: Prediction,
    x0: Float[Array, "*N D"],
    noise: Float[Array, "*N D"],
    t: Int[Array, "*N"],
) -> Float[Array, "*N D"]:
    """What a network of this kind should output at x_t = noised(x_0, t, ε)."""
    if prediction == "noise":
        return noise
    if prediction == "data":
        return x0
    signal, spread = at_step(np.sqrt(schedule.alphas), t), at_step(np.sqrt(1.0 - schedule.alphas), t)
    return signal * noise - spread * x0


def noise_of(
    schedule: Schedule,
    prediction: Prediction,
    output: Float[Array, "*N D"],
    xt: Float[Array, "*N D"],
    t: Int[Array, "*N"],
) -> Float[Array, "*N D"]:
    """ε from an output of any kind: ε = (x_t − √α_t x_0)/√(1 − α_t) = √(1 − α_t) x_t + √α_t v."""
    if prediction == "noise":
        return output
    signal, spread = at_step(np.sqrt(schedule.alphas), t), at_step(np.sqrt(1.0 - schedule.alphas), t)
    if prediction == "data":
        return (xt - signal * output) / spread
    return spread * xt + signal * output


def data_of(
    schedule: Schedule, noise: Float[Array, "*N D"], xt: Float[Array, "*N D"], t: Int[Array, "*N"]
) -> Float[Array, "*N D"]:
    """x_0 from ε: (x_t − √(1 − α_t) ε)/√α_t."""
    spread = at_step(np.sqrt(1.0 - schedule.alphas), t)
    return (xt - spread * noise) / at_step(np.sqrt(schedule.alphas), t)


def _before(values: Float[np.ndarray, " T1"]) -> Float[np.ndarray, " T1"]:
    return np.concatenate([values[:1], values[:-1]])


NoisePredictor = Callable[[jax.Array, jax.Array], jax.Array]
"""ε_θ: (x_t [N D], t [N]) → [N D]."""
