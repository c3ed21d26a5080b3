"""`training.memory_limit`: settings traded for memory, the quickest first, until what is compiled fits.

    peak of a device = other + max(step, state + scoring, state + sampling)

    step      arguments + results − aliases + temporaries of the compiled step, at the run's largest shape
    scoring   temporaries of the compiled scoring of rows without a gradient
    sampling  temporaries of `training.eval_samples`: decoding with its cache, and scoring what was drawn
    other     what no program knows of: on a CPU the process itself; copies that are kept while steps run

A run that goes on reads its state into the place of the parameters that it opened: it never holds two.
On a CPU a checkpoint is copied and written in the same memory: beside scoring always, since the last one is
written while the held-out rows are scored, and beside steps where there are saves between them.

Rematerialisation, micro-batches and smaller chunks leave the mathematics as it is, and change results by
rounding. A run keeps what was chosen when it began (`MEMORY_FILE`), so that one which goes on gives the same
bits; a checkpoint's identity holds the settings as chosen. Programs pass through the persistent compilation
cache, so that the chosen one is not compiled again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dpo.config import Config
from dpo.data.loader import Loader
from dpo.data.tokenized import TokenizedDataset
from dpo.files import replace_text
from dpo.losses import Objective
from dpo.outcomes import UserError
from dpo.parallel.distributed import from_main, on_main
from dpo.parallel.sharding import row_multiple
from dpo.runs import MEMORY_FILE, ChosenMemory
from dpo.training.datasets import make_loader, scoring_loader
from dpo.training.device_memory import (
    GIB,
    Limit,
    compiled_bytes,
    device_bytes,
    gib,
    limit_of,
    other_bytes,
    saves_between_steps,
    saving_bytes,
    temporary_bytes,
)
from dpo.training.identity import settings_fingerprint
from dpo.training.memory_choices import Choice, Remat, candidates
from dpo.training.on_policy import lower_programs
from dpo.training.placement import place_batch
from dpo.training.policy import Policy
from dpo.training.program import Program, make_program
from dpo.training.reference_model import reference_kind
from dpo.training.step import make_eval_step


class Fit(NamedTuple):
    """A choice of settings, and the memory that a device needs with it."""

    choice: Choice
    peak: float
    """Most memory that a device holds at a time, in bytes, as expected from the compiled programs."""
    limit: float
    """Memory that a device may hold, in bytes."""
    tried: tuple[tuple[str, float], ...] = ()
    """Choices that were tried before this one and needed too much, each in words and with its bytes."""
    kept: bool = False
    """True where an earlier start of the run made the choice."""

    @property
    def text(self) -> str:
        """The choice and its memory, as a line of the log."""
        before = "; ".join(f"{name}: {gib(peak)}" for name, peak in self.tried)
        return (
            f"memory: {self.choice.text}: {self.peak / GIB:.2f} of {gib(self.limit)} a device"
            + (f" (too much: {before})" if before else "")
            + (", as chosen when the run began" if self.kept else "")
        )

    def as_numbers(self) -> ChosenMemory:
        """The choice and its memory as plain numbers and texts, to be kept as JSON."""
        return {
            "remat": self.choice.remat,
            "micro_batches": self.choice.micro_batches,
            "log_prob_chunk": self.choice.log_prob_chunk,
            "peak_gib": self.peak / GIB,
            "limit_gib": self.limit / GIB,
            "too_much_gib": {name: None if math.isinf(peak) else peak / GIB for name, peak in self.tried},
        }


class Parts(NamedTuple):
    """All that a run's compiled programs depend on besides its settings."""

    objective: Objective
    beta: float
    policy: Policy
    tokens: TokenizedDataset
    heldout: TokenizedDataset | None
    mesh: Mesh
    num_steps: int


def choose_memory(config: Config, parts: Parts, *, run_dir: Path) -> Fit:
    """What the run was begun with for these settings and this limit, or else the first choice that fits.

    Raises:
      ValueError: when nothing fits, with the least that was found and what to change.
    """
    path = run_dir / MEMORY_FILE
    kept = on_main(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
    if kept is None or kept["asked"] != _asked(config.training.memory_limit, settings_fingerprint(config)):
        return find_fit(config, parts)
    chosen = kept["chosen"]
    choice = Choice(*(chosen[name] for name in Choice._fields))
    return Fit(choice, chosen["peak_gib"] * GIB, chosen["limit_gib"] * GIB, kept=True)


def keep_choice(fit: Fit, run_dir: Path, *, limit: Limit, settings: str) -> None:
    """Write down what was chosen for a limit and for the fingerprint of the settings as they were given."""
    content = {"asked": _asked(limit, settings), "chosen": fit.as_numbers()}
    text = json.dumps(content, indent=1)
    replace_text(run_dir / MEMORY_FILE, text, what="the choice for training.memory_limit")


def find_fit(config: Config, parts: Parts) -> Fit:
    """Compile the run's programs with one choice after the other, until one fits.

    Raises:
      ValueError: when none does.
    """
    mesh, training = parts.mesh, config.training
    limit = limit_of(training.memory_limit, mesh)
    other = float(from_main(np.float32(other_bytes(mesh) + kept_bytes(config, parts.policy))))
    trained = _program(config, parts).state
    state = device_bytes((trained, parts.policy.frozen))
    saved = saving_bytes(trained, mesh.devices.flat[0].platform)
    if other + state + saved > limit:
        copy = f", a copy for checkpoints {gib(saved)}" if saved else ""
        raise UserError(
            f"training.memory_limit is {gib(limit)} a device; parameters and the optimiser's state take "
            f"{gib(state)}{copy}, the process itself {gib(other)}, before anything is computed. {_ADVICE}"
        )
    steps: dict[tuple, float] = {}
    programs: dict[Any, float] = {}

    def peak(choice: Choice) -> float:
        key, chunk = _step_key(config, parts, choice), choice.log_prob_chunk
        beside = saved if saves_between_steps(training) else 0.0
        if other + beside + least_step(steps, choice, state=state) > limit:
            return math.inf
        step = beside + _memoised(steps, key, lambda: step_bytes(config, parts, choice))
        if other + step > limit:
            return other + step
        scoring = _memoised(programs, chunk, lambda: scoring_bytes(config, parts, chunk))
        sampling = _memoised(programs, ("sampling", chunk), lambda: sampling_bytes(config, parts, chunk))
        return other + max(step, state + saved + max(scoring, sampling))

    return first_that_fits(candidates(config, lambda count: _scored(config, parts, count)), peak, limit=limit)


def least_step(compiled: Mapping[tuple, float], choice: Choice, *, state: float) -> float:
    """What a step takes at least, by those that are compiled: a program that is not looked at saves minutes.

    So many times the micro-batches leave that part of what a step takes beside the state, or more.
    """
    return max(
        (
            state + (size - state) * micro_batches / choice.micro_batches
            for (remat, micro_batches, chunk), size in compiled.items()
            if remat == choice.remat
            and micro_batches < choice.micro_batches
            and chunk <= choice.log_prob_chunk
            and math.isfinite(size)
        ),
        default=0.0,
    )


def first_that_fits(choices: Iterable[Choice], peak: Callable[[Choice], float], *, limit: float) -> Fit:
    """The first choice whose peak is within the limit; no later one is looked at.

    Raises:
      ValueError: when there is none.
    """
    tried: list[tuple[str, float]] = []
    for choice in choices:
        needed = peak(choice)
        if needed <= limit:
            return Fit(choice, needed, limit, tuple(tried))
        tried.append((choice.text, needed))
    name, least = min(tried, key=lambda one: one[1])
    raise UserError(
        f"training.memory_limit is {gib(limit)} a device, and the least of {len(tried)} programs takes "
        f"{gib(least)} ({name}). {_ADVICE}"
    )


_ADVICE = (
    "Allowed is a limit above that; less is needed with shorter rows (data.max_length), fewer prompts a step "
    "(training.batch_size), adapters (lora.rank), or parameters split over more devices (mesh.fsdp)"
)


def with_remat(policy: Policy, remat: Remat) -> Policy:
    """The same arrays in a model that recomputes more, or less."""
    model = policy.merge(policy.params)
    model.remat = remat
    return policy._replace(graphdef=nnx.graphdef(model))


def step_bytes(config: Config, parts: Parts, choice: Choice) -> float:
    """Bytes on a device while the step of the run's largest shape runs, its arguments included."""
    config = choice.apply(config)
    program = _program(config, parts)
    loader = _loader(config, parts)
    batch = place_batch(parts.mesh, _largest(loader))
    zeros = np.zeros(batch.present.shape, np.float32)
    sums = dict.fromkeys(sorted({"logps", *parts.objective.reference_sums}), zeros)
    return compiled_bytes(
        lambda: program.step.lower(program.state, parts.policy.frozen, batch, sums),  # type: ignore[attr-defined]
        lambda compiled: compiled.memory_analysis().argument_size_in_bytes + temporary_bytes(compiled),
    )


def scoring_bytes(config: Config, parts: Parts, chunk: int) -> float:
    """Bytes on a device that scoring without a gradient takes besides parameters."""
    policy, needs = parts.policy, parts.objective.sums
    score = make_eval_step(policy.graphdef, chunk=chunk, needs=needs, mesh=parts.mesh)
    loaders = [
        scoring_loader(config.data, tokens, parts.mesh)
        for tokens in (parts.tokens, parts.heldout)
        if tokens is not None
    ]
    batch = max((_largest(loader) for loader in loaders), key=lambda batch: batch.tokens.size)
    placed = place_batch(parts.mesh, batch)
    return compiled_bytes(
        lambda: score.lower(policy.params, policy.frozen, placed),  # type: ignore[attr-defined]
        temporary_bytes,
    )


def sampling_bytes(config: Config, parts: Parts, chunk: int) -> float:
    """Bytes on a device that drawing and scoring the policy's own answers take besides parameters."""
    if config.training.eval_samples == 0:
        return 0.0
    assert parts.heldout is not None, "the settings allow eval_samples with data.eval only"
    config = replace(config, model=replace(config.model, log_prob_chunk=chunk))
    programs = lower_programs(config, parts.policy, parts.heldout, parts.mesh)
    return max(compiled_bytes(lambda lowered=lowered: lowered, temporary_bytes) for lowered in programs)


def _program(config: Config, parts: Parts) -> Program:
    """The training program of these settings."""
    policy = with_remat(parts.policy, config.model.remat)
    return make_program(
        config,
        parts.objective,
        beta=parts.beta,
        graphdef=policy.graphdef,
        params=policy.params,
        mesh=parts.mesh,
        num_steps=parts.num_steps,
    )


def kept_bytes(config: Config, policy: Policy) -> float:
    """Bytes on a device of the model that samples of the policy are compared with, where there is a copy."""
    if config.training.eval_samples == 0:
        return 0.0
    match reference_kind(config, policy):
        case "another model":
            return device_bytes((policy.base or policy).params)
        case "the model without adapters":  # the arrays that are frozen
            return 0.0
        case "the policy as it starts":
            return device_bytes(policy.params)


def _loader(config: Config, parts: Parts) -> Loader:
    return make_loader(config.data, config.training, parts.tokens, parts.mesh, num_steps=parts.num_steps)


def _largest(loader: Loader) -> Any:
    """A batch of the largest shape."""
    shapes = [loader.shape(step) for step in range(loader.num_steps)]
    return loader.batch(shapes.index(loader.shapes[-1]))


def _scored(config: Config, parts: Parts, micro_batches: int) -> int:
    """Scored tokens of a device and micro-batch in the largest shape."""
    training = replace(config.training, micro_batches=micro_batches)
    shape = _loader(replace(config, training=training), parts).shapes[-1]
    return shape.rows * shape.scored // micro_batches // row_multiple(parts.mesh)


def _step_key(config: Config, parts: Parts, choice: Choice) -> tuple:
    """Equal for choices with the same program: a chunk is no larger than a micro-batch."""
    scored = _scored(config, parts, choice.micro_batches)
    return choice.remat, choice.micro_batches, min(choice.log_prob_chunk, scored)


def _asked(limit: Limit, settings: str) -> dict[str, object]:
    return {"settings": settings, "memory_limit": limit}


def _memoised(found: dict[Any, float], key: Any, compute: Callable[[], float]) -> float:
    if key not in found:
        found[key] = compute()
    return found[key]
