"""`dpo diffusion`: preferences from a known reward, a denoiser trained on them, its samples held to π*.

Data come from a mixture of Gaussians ρ and the reward is linear, so that π* ∝ ρ exp(r/β) is a mixture again
and every figure has an exact value beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dpo.config import DiffusionConfig, is_config, save_config
from dpo.diffusion import variance_exploding
from dpo.diffusion.mixture import Mixture, ddim_moments
from dpo.diffusion.network import Network, denoising_loss, fit, noise_predictor
from dpo.diffusion.preference import Sharing, diffusion_scores, draw_noising, score_weights
from dpo.diffusion.samplers import ddim
from dpo.diffusion.schedule import SCHEDULES, Schedule
from dpo.diffusion.shared_noise import recovered_share, summed_share
from dpo.experiments import diffusion_figures as figures
from dpo.experiments.diffusion_results import (
    DiffusionResults,
    PathFigures,
    ProcessFigures,
    SampleFigures,
    SharingFigures,
)
from dpo.experiments.diffusion_text import processes_as_text, samples_as_text, sharing_as_text
from dpo.files import replace_text, require_writable
from dpo.losses import make_objective, reward_scale
from dpo.outcomes import UserError
from dpo.overwriting import require_own
from dpo.runs import CONFIG_FILE

RESULT_FILE = "results.json"
WRITTEN = (CONFIG_FILE, RESULT_FILE, "samples.svg", "variances.svg", "shared_noise.svg")
PATH_SAMPLERS = ("mean_only", "stochastic", "deterministic")
STEP_COUNTS = (10, 20, 50, 100, 200, 500, 1000)
TIME_COUNTS = (1, 2, 4, 8, 16)
SHARINGS: tuple[Sharing, ...] = ("time_and_noise", "time", "nothing")


class _OneDimension(TypedDict, total=False):
    """What there is of one Gaussian in one dimension only."""

    processes: ProcessFigures
    shared_noise: SharingFigures


def run(config: DiffusionConfig, *, log: Callable[[str], None]) -> DiffusionResults:
    """The whole example; returns what results.json holds. Everything is a function of the settings.

    Raises:
      ValueError: when the objective needs more than log-probs.
    """
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    is_own = is_config(DiffusionConfig, run_dir / CONFIG_FILE)
    require_own(run_dir, WRITTEN, is_own=is_own, setting="run_dir", kind="diffusion example")
    require_writable(run_dir, "the example")
    save_config(config, run_dir / CONFIG_FILE)
    mixture, beta = mixture_of(config), reward_scale(config.objective)
    slope = np.array(config.reward)
    optimum = mixture.tilted(slope, beta)
    schedule = SCHEDULES[config.schedule](config.num_steps)
    keys = dict(zip(("reference", "data", "policy", "sample", "process"), _keys(config.seed, 5), strict=True))
    exact: _OneDimension = {}

    if mixture.means.shape == (1, 1):
        exact["processes"] = compare_processes(config, keys["process"], run_dir)
        log(processes_as_text(exact["processes"]))
        exact["shared_noise"] = measure_sharing(config, schedule, beta, run_dir)
        log(sharing_as_text(exact["shared_noise"]))

    network, losses = train_reference(config, mixture, schedule, keys["reference"])
    log(f"reference: {config.reference_updates} updates, denoising loss {losses[-50:].mean():.4f}")
    policy, losses = train_policy(config, network, mixture, schedule, keys["data"], keys["policy"])
    log(f"policy: {config.updates} updates, loss {losses[:50].mean():.4f} to {losses[-50:].mean():.4f}")

    drawn = {
        name: np.asarray(draw_samples(config, model, schedule, keys["sample"]))
        for name, model in (("before", network), ("after", policy))
    }
    figures.draw_samples(run_dir / "samples.svg", drawn, mixture, optimum)
    results: DiffusionResults = {
        **exact,
        "before": describe(drawn["before"], mixture, slope),
        "after": describe(drawn["after"], optimum, slope),
        "share_of_shift": shift_share(drawn["before"], drawn["after"], mixture, optimum),
        "seconds": time.perf_counter() - started,
    }
    replace_text(run_dir / RESULT_FILE, json.dumps(results, indent=1) + "\n", what="the results")
    log(samples_as_text(results))
    return results


def mixture_of(config: DiffusionConfig) -> Mixture:
    """ρ: components of equal weight."""
    means = np.array(config.means, float)
    return Mixture(np.full(len(means), 1.0 / len(means)), means, config.variance)


def draw_preferences(
    key: Array, mixture: Mixture, slope: Float[np.ndarray, " D"], *, num: int, num_samples: int
) -> Float[Array, "P K D"]:
    """Samples of ρ, best first: by reward plus Gumbel noise, which is Plackett-Luce in the rewards."""
    what, luck = jax.random.split(key)
    samples = mixture.sample(what, num * num_samples).reshape(num, num_samples, -1)
    utility = samples @ jnp.asarray(slope, samples.dtype) + jax.random.gumbel(luck, (num, num_samples))
    return jnp.take_along_axis(samples, jnp.argsort(-utility, axis=1)[..., None], axis=1)


def train_reference(
    config: DiffusionConfig, mixture: Mixture, schedule: Schedule, key: Array
) -> tuple[Network, Float[np.ndarray, " n"]]:
    """A denoiser of ρ, from fresh samples at every update."""
    network = Network(
        num_dims=mixture.means.shape[1],
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        rngs=nnx.Rngs(config.seed),
    )

    def loss(network: Network, key: Array) -> Float[Array, ""]:
        draw, noise = jax.random.split(key)
        data = mixture.sample(draw, config.reference_batch_size)
        return denoising_loss(network, noise, data, schedule, config.prediction)

    losses = fit(
        network,
        loss,
        num_updates=config.reference_updates,
        learning_rate=config.reference_learning_rate,
        key=key,
    )
    return network, losses


def train_policy(
    config: DiffusionConfig,
    reference: Network,
    mixture: Mixture,
    schedule: Schedule,
    data_key: Array,
    key: Array,
) -> tuple[Network, Float[np.ndarray, " n"]]:
    """A copy of the reference, trained by the objective on a fixed set of preferences."""
    objective = make_objective(config.objective)
    if objective.needs or objective.whole_batch:
        raise UserError(
            f"objective.name is {config.objective['name']!r}, which needs more than log-probs; "
            "allowed: one that needs only log-probs, such as dpo, ipo or plackett_luce"
        )
    preferences = draw_preferences(
        data_key, mixture, np.array(config.reward), num=config.num_preferences, num_samples=config.num_samples
    )
    policy = nnx.clone(reference)
    frozen = noise_predictor(reference, schedule, config.prediction)
    weights = score_weights(schedule, config.weighting, variance=config.reverse_variance)

    def loss(network: Network, key: Array) -> Float[Array, ""]:
        which, noise = jax.random.split(key)
        chosen = jax.random.randint(which, (config.batch_size,), 0, config.num_preferences)
        samples = preferences[chosen]
        P, K, D = samples.shape
        noising = draw_noising(noise, (P, K, config.num_times, D), schedule.num_steps, sharing=config.sharing)
        scores = diffusion_scores(
            noise_predictor(network, schedule, config.prediction),
            frozen,
            samples,
            noising,
            schedule=schedule,
            weights=weights,
            reduction=config.reduction,
        )
        return jnp.mean(objective(scores))

    losses = fit(policy, loss, num_updates=config.updates, learning_rate=config.learning_rate, key=key)
    return policy, losses


def draw_samples(
    config: DiffusionConfig, network: Network, schedule: Schedule, key: Array
) -> Float[Array, "N D"]:
    """Samples of a network by DDIM(η), from N(0, I)."""
    shape = (config.num_drawn, len(config.reward))
    first, rest = jax.random.split(key)

    @jax.jit
    def sample(state: nnx.State) -> Float[Array, "N D"]:
        denoiser = noise_predictor(nnx.merge(graph, state), schedule, config.prediction)
        noise = jax.random.normal(rest, (schedule.num_steps, *shape))
        return ddim(denoiser, schedule, jax.random.normal(first, shape), noise, eta=config.eta)[-1]

    graph, state = nnx.split(network)
    return sample(state)


def describe(
    samples: Float[np.ndarray, "N D"], target: Mixture, slope: Float[np.ndarray, " D"]
) -> SampleFigures:
    """Figures of samples, each beside what the target has; intervals are 95%, of the sampling alone."""
    rewards = samples @ slope
    half = 1.96 / np.sqrt(len(samples))
    parts = target.responsibilities(samples).mean(axis=0)
    return {
        "mean": samples.mean(axis=0).tolist(),
        "mean_half_width": (half * samples.std(axis=0)).tolist(),
        "exact_mean": target.mean.tolist(),
        "covariance": np.atleast_2d(np.cov(samples.T)).tolist(),
        "exact_covariance": target.covariance.tolist(),
        "reward": float(rewards.mean()),
        "reward_half_width": float(half * rewards.std()),
        "exact_reward": float(target.mean @ slope),
        "component_weights": parts.tolist(),
        "exact_component_weights": target.weights.tolist(),
    }


def shift_share(
    before: Float[np.ndarray, "N D"], after: Float[np.ndarray, "N D"], mixture: Mixture, optimum: Mixture
) -> float:
    """How far the samples' mean moved along the way from ρ's mean to π*'s, as a part of that way."""
    way = optimum.mean - mixture.mean
    return float((after.mean(axis=0) - before.mean(axis=0)) @ way / (way @ way))


def compare_processes(config: DiffusionConfig, key: Array, run_dir: Path) -> ProcessFigures:
    """Variances along the reverse path for the three samplers, exact and by a trained network; DDPM's and
    DDIM's output variance by T."""
    variance = config.variance
    network = train_mean_network(config, key)
    mean = variance_exploding.mean_from_data_estimate(network, config.process_steps)
    shape = (config.num_drawn, 1)
    first, rest = jax.random.split(jax.random.fold_in(key, 1))
    start, noise = jax.random.normal(first, shape), jax.random.normal(rest, (config.process_steps, *shape))
    paths: dict[str, PathFigures] = {}
    for sampler in PATH_SAMPLERS:
        coefficients = variance_exploding.SAMPLERS[sampler](variance, config.process_steps)
        path = jax.jit(partial(variance_exploding.sample, mean, coefficients=coefficients))(start, noise)
        paths[sampler] = {
            "exact": variance_exploding.moments(sampler, variance, config.process_steps).variance.tolist(),
            "network": np.asarray(path).var(axis=1)[:, 0].tolist(),
            "limit": variance_exploding.limit_variance(sampler, variance),
        }

    def by_steps(eta: float) -> list[float]:
        schedules = [SCHEDULES["linear"](T) for T in STEP_COUNTS]
        return [float(ddim_moments(s, variance=variance, eta=eta).variance[-1]) for s in schedules]

    results: ProcessFigures = {
        "variance": variance,
        "steps": config.process_steps,
        "paths": paths,
        "by_steps": {"T": list(STEP_COUNTS), "ddim": by_steps(0.0), "ddpm": by_steps(1.0)},
    }
    figures.draw_processes(run_dir / "variances.svg", results)
    return results


def train_mean_network(config: DiffusionConfig, key: Array) -> Network:
    """An estimate of E[X_0|X_t] of the variance-exploding process, by regression on X_0."""
    network = Network(
        num_dims=1,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        rngs=nnx.Rngs(config.seed),
    )
    mixture = Mixture(np.ones(1), np.zeros((1, 1)), config.variance)

    def loss(network: Network, key: Array) -> Float[Array, ""]:
        draw, noise = jax.random.split(key)
        data = mixture.sample(draw, config.reference_batch_size)
        drawn = variance_exploding.regression_data(noise, data, config.process_steps)
        return jnp.mean((network(drawn.x, drawn.t) - drawn.data) ** 2)

    fit(
        network,
        loss,
        num_updates=config.reference_updates,
        learning_rate=config.reference_learning_rate,
        key=key,
    )
    return network


def measure_sharing(
    config: DiffusionConfig, schedule: Schedule, beta: float, run_dir: Path
) -> SharingFigures:
    """The one-parameter toy: part of the exact shift that is recovered, by what is shared and by S."""
    weights = score_weights(schedule, config.weighting, variance=config.reverse_variance)
    whole = summed_share(schedule, config.variance, weights)
    shares: dict[Sharing, list[list[float]]] = {}
    for sharing in SHARINGS:
        found = [
            recovered_share(
                schedule,
                config.variance,
                weights,
                slope=config.reward[0],
                beta=beta,
                sharing=sharing,
                num_times=num,
                num_pairs=20_000,
                seed=config.seed,
            )
            for num in TIME_COUNTS
        ]
        shares[sharing] = [[value, error] for value, error in found]
    results: SharingFigures = {"S": list(TIME_COUNTS), "summed": whole, "shares": shares}
    figures.draw_sharing(run_dir / "shared_noise.svg", results)
    return results


def _keys(seed: int, num: int) -> list[Array]:
    return list(jax.random.split(jax.random.key(seed), num))
