"""A small network of (x, t), and a training loop that is one compiled scan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dpo.diffusion.schedule import NoisePredictor, Prediction, Schedule, noise_of, noised, target_of

NUM_FREQUENCIES = 6


class Network(nnx.Module):
    """Fully connected, SiLU, on x and cos, sin of t; its last layer starts at zero."""

    def __init__(self, *, num_dims: int, hidden_size: int, num_layers: int, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, precision="highest")  # float32 on every platform
        sizes = [num_dims + 1 + 2 * NUM_FREQUENCIES, *[hidden_size] * num_layers]
        self.layers = nnx.List(
            [linear(before, after, rngs=rngs) for before, after in itertools.pairwise(sizes)]
        )
        self.out = linear(sizes[-1], num_dims, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "N D"], t: Float[Array, " N"]) -> Float[Array, "N D"]:
        """`t` runs from 0 to 1."""
        angles = t[:, None] * (np.pi / 2.0 * 2.0 ** np.arange(NUM_FREQUENCIES, dtype=np.float32))[None]
        hidden = jnp.concatenate([x, t[:, None], jnp.cos(angles), jnp.sin(angles)], axis=1)
        for layer in self.layers:
            hidden = nnx.silu(layer(hidden))
        return self.out(hidden)


def noise_predictor(network: Network, schedule: Schedule, prediction: Prediction) -> NoisePredictor:
    """ε_θ of a network that outputs `prediction`."""

    def denoiser(x: Float[Array, "N D"], t: Int[Array, " N"]) -> Float[Array, "N D"]:
        return noise_of(schedule, prediction, network(x, t / schedule.num_steps), x, t)

    return denoiser


def denoising_loss(
    network: Network, key: Array, data: Float[Array, "N D"], schedule: Schedule, prediction: Prediction
) -> Float[Array, ""]:
    """Mean square of what the network outputs minus what it should, at uniform times."""
    when, what = jax.random.split(key)
    t = jax.random.randint(when, data.shape[:1], 1, schedule.num_steps + 1)
    noise = jax.random.normal(what, data.shape)
    output = network(noised(schedule, data, t, noise), t / schedule.num_steps)
    return jnp.mean((output - target_of(schedule, prediction, data, noise, t)) ** 2)


def fit(
    network: Network,
    loss: Callable[[Network, Array], Float[Array, ""]],
    *,
    num_updates: int,
    learning_rate: float,
    key: Array,
) -> Float[np.ndarray, " n"]:
    """Adam with cosine decay on loss(network, key of the step), in place; returns the losses."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_updates))
    graph, start = nnx.split(network)

    @jax.jit
    def run(params: nnx.State) -> tuple[nnx.State, Array]:
        def update(carry: tuple, step: Array) -> tuple[tuple, Array]:
            params, state = carry
            value, gradient = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), _key_of(key, step)))(
                params
            )
            change, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, change), state), value

        (params, _), losses = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(num_updates))
        return params, losses

    params, losses = run(start)
    nnx.update(network, params)
    return np.asarray(losses)


def _key_of(key: Array, step: Array) -> Array:
    return jax.random.fold_in(key, step)
