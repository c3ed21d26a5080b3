"""The optax chain: clip by global norm, AdamW, schedule. Nothing here knows about models."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from dpo.config import OptimizerConfig

_NOT_DECAYED = re.compile(r"norm|bias|scale|magnitude")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, …, num_steps − 1: linear warm-up from zero, then the named decay.

    With w warm-up steps, update i < w uses (i / w) · peak, as in Hugging Face's schedules; without warm-up
    the first update already uses the peak.
    """
    warmup = round(config.warmup_fraction * num_steps)
    decay_steps = max(num_steps - warmup, 1)
    peak = config.learning_rate
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
    }
    decay = decays[config.schedule]()
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def learning_rates(schedule: optax.Schedule, num_steps: int) -> Float[np.ndarray, " S"]:
    """Of every update of a run, on the host."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(num_steps)))  # one program, not one an operation


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on float32 parameters; norms and biases are not decayed."""
    clip = (
        optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    )
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mu_dtype=config.first_moment,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(clip, adamw)


def _decayed(params: Any) -> Any:
    """True for the leaves that weight decay applies to. By name: stacked layers make norms 2-D."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not _NOT_DECAYED.search(jax.tree_util.keystr(path)), params
    )
