"""The training program of a run's settings, for `dpo train` to run and for `dpo plan` to compile."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from dpo.config import Config, TrainingConfig
from dpo.huggingface.embedded import cache_directory
from dpo.losses import Objective
from dpo.outcomes import UserError
from dpo.parallel.sharding import parameter_rules, parameter_sharding, with_sharding
from dpo.training.optimizer import make_optimizer, make_schedule
from dpo.training.step import Params, TrainState, TrainStep, init_state, make_train_step


class Program(NamedTuple):
    """A compiled step and the state that it starts from."""

    init: Callable[[Params], TrainState]
    """The state before the first update, from the policy's parameters."""
    state: Any
    """Shapes and shardings of the state, a tree like it."""
    step: TrainStep
    schedule: optax.Schedule

    @property
    def sharding(self) -> Any:
        """Where the state lives, a tree like it."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def make_program(
    config: Config,
    objective: Objective,
    *,
    beta: float,
    graphdef: nnx.GraphDef,
    params: Params,
    mesh: Mesh,
    num_steps: int,
) -> Program:
    """Of `params` only shapes and names are used."""
    schedule = make_schedule(config.optimizer, num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)

    def init(params: Params) -> TrainState:
        return init_state(params, optimizer, moving=config.training.reference_every is not None)

    rules = parameter_rules(config.mesh.rules)
    shapes = jax.eval_shape(init, params)
    sharding = parameter_sharding(mesh, shapes, rules)
    step = make_train_step(
        graphdef,
        objective,
        optimizer=optimizer,
        beta=beta,
        micro_batches=config.training.micro_batches,
        chunk=config.model.log_prob_chunk,
        state_sharding=sharding,
        mesh=mesh,
    )
    return Program(init, with_sharding(shapes, sharding), step, schedule)


def count_steps(training: TrainingConfig, num_prompts: int) -> int:
    """Optimiser steps of a run: as set, or whole batches in so many epochs.

    Raises:
      ValueError: when there is not one whole batch.
    """
    if training.steps is not None:
        return training.steps
    num_steps = int(training.epochs * num_prompts / training.batch_size + 1e-9)  # 0.29 * 100 is below 29
    if num_steps == 0:
        raise UserError(
            f"training.epochs {training.epochs} of {num_prompts} prompts is less than one step of "
            f"training.batch_size {training.batch_size}; allowed is at least one whole batch"
        )
    return num_steps


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where (or that not).

    Where nothing can be written that is said once: it costs the time of compiling again, and no result.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    directory = str(cache_directory() / "compiled") if named is None else named
    if named is None:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if not directory or "://" in directory:  # no cache; a bucket, which JAX writes to itself
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept in {directory} ({error.strerror}): the next start compiles "
            "again; DPO_CACHE or JAX_COMPILATION_CACHE_DIR may name a directory that can be written to",
            stacklevel=2,
        )
        for done in ("reading", "writing"):  # said here once, and not by JAX for every program
            warnings.filterwarnings("ignore", f"Error {done} persistent compilation cache entry")
