"""From a checkpoint of a run to a Hugging Face directory, or to its adapters alone."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from dpo.config import Config, ExportConfig
from dpo.models.pretrained import save_pretrained
from dpo.training.adapted import ADAPTER_DIRECTORY, export_adapters, open_policy, plain_model
from dpo.training.checkpoint import Checkpoints
from dpo.training.optimizer import make_optimizer, make_schedule
from dpo.training.sharding import make_mesh
from dpo.training.step import init_state


def export_checkpoint(given: ExportConfig, config: Config) -> tuple[Path, int]:
    """Write the policy as it was at a checkpoint of the run; returns where, and after how many updates.

    Raises:
      ValueError: when the run has no such checkpoint, or a damaged one, or no adapters, or something
        else is in the way.
    """
    if given.format == "adapter" and not config.lora.is_on:
        raise ValueError(
            f"format is 'adapter', but {given.run} has none: its config has no lora.rank or lora.init"
        )
    directory = Path(given.run) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"{directory} is not there: {given.run} has no checkpoint")
    with Checkpoints(directory, keep=config.training.keep_checkpoints, read_only=True) as checkpoints:
        step = _choose_step(checkpoints, directory, given.step)
        _require_whole(checkpoints, step)
        policy = open_policy(config, make_mesh(config.mesh))
        optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1))
        moving = config.training.reference_every is not None
        state = checkpoints.restore(
            step, jax.jit(lambda params: init_state(params, optimizer, moving=moving))(policy.params)
        )
    if given.format == "adapter":
        output = given.output or Path(given.run) / ADAPTER_DIRECTORY
        return export_adapters(policy, state.params, output, source=config.model.source), step
    path = save_pretrained(
        plain_model(policy, state.params),
        given.output or Path(given.run) / "export",
        hf_config=policy.pretrained.config,
        tokenizer=policy.pretrained.tokenizer,
        generation_config=policy.pretrained.generation_config,
        dtype=jnp.dtype(given.dtype),
    )
    return path, step


def _choose_step(checkpoints: Checkpoints, directory: Path, step: int | None) -> int:
    there = checkpoints.steps
    if not there:
        raise ValueError(f"{directory} holds no checkpoint")
    if step is not None and step not in there:
        raise ValueError(f"{directory} has no checkpoint of step {step}; allowed are {there}")
    return there[-1] if step is None else step


def _require_whole(checkpoints: Checkpoints, step: int) -> None:
    problems = checkpoints.damage(step)
    if problems:
        whole = [other for other in checkpoints.steps if not checkpoints.damage(other)]
        raise ValueError(
            f"{checkpoints.path(step)} is damaged ({'; '.join(problems)}); whole are those of steps {whole}"
        )
