"""From a checkpoint of a run to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from dpo.config import Config
from dpo.models.pretrained import save_pretrained
from dpo.training.checkpoint import Checkpoints
from dpo.training.optimizer import make_optimizer, make_schedule
from dpo.training.setup import load_policy
from dpo.training.sharding import make_mesh
from dpo.training.step import init_state


def export_checkpoint(
    run_dir: str | Path,
    config: Config,
    output: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
) -> tuple[Path, int]:
    """Write the policy after `step` updates (the newest checkpoint's when None); returns where, and the step.

    Raises:
      ValueError: when the run has no such checkpoint, or a damaged one, or `output` holds something that is
        not a model.
    """
    directory = Path(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"{directory} is not there: {run_dir} has no checkpoint")
    with Checkpoints(directory, keep=config.training.keep_checkpoints, read_only=True) as checkpoints:
        step = _choose_step(checkpoints, directory, step)
        _require_whole(checkpoints, step)
        policy = load_policy(config.model, make_mesh(config.mesh))
        optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1))
        moving = config.training.reference_every is not None
        state = checkpoints.restore(
            step, jax.jit(lambda params: init_state(params, optimizer, moving=moving))(policy.params)
        )
    path = save_pretrained(
        policy.merge(state.params),
        output,
        hf_config=policy.pretrained.config,
        tokenizer=policy.pretrained.tokenizer,
        generation_config=policy.pretrained.generation_config,
        dtype=jnp.dtype(dtype),
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
