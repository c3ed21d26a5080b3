"""The settings of a run. Its config.yaml is this tree, written out; a file of settings has a part of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from dpo.config.data import DataConfig
from dpo.config.marks import BESIDE, OFF_THE_CARD, OWN, marks
from dpo.config.model import LoraConfig, ModelConfig
from dpo.config.ranges import check_range
from dpo.config.sources import spellings
from dpo.outcomes import UserError

IdentityKind = Literal[
    "settings", "data", "tokenizer", "template", "tokens", "weights", "reference", "versions", "steps"
]
"""What a checkpoint belongs to, and a run that continues it must have the same of."""
ObjectiveSettings = dict[str, Any]
"""An objective: its name and hyper-parameters, in a sum its weight."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-6
    """Learning rate at its peak, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up: not at all (constant), or to zero in a line or a half
    cosine."""
    warmup_fraction: float = 0.1
    """Part of all steps, from 0 to 1, over which the learning rate rises from zero."""
    beta1: float = 0.9
    """Adam's decay of the running mean of gradients."""
    beta2: float = 0.999
    """Adam's decay of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """Adam's constant in the denominator, added to the root of the mean squared gradient."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Precision of Adam's running mean of gradients: bfloat16 takes two bytes a trained parameter instead of
    four, and rounds the mean to two or three digits in every step."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all weights but norms, biases and DoRA's magnitudes."""
    max_grad_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; none are when null."""

    def __post_init__(self) -> None:
        check_range("optimizer.learning_rate", self.learning_rate, low=0.0)
        check_range("optimizer.warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        check_range("optimizer.beta1", self.beta1, low=0.0, below=1.0)  # at 1 the bias correction is 0 / 0
        check_range("optimizer.beta2", self.beta2, low=0.0, below=1.0)
        check_range("optimizer.epsilon", self.epsilon, above=0.0)
        check_range("optimizer.weight_decay", self.weight_decay, low=0.0)
        check_range("optimizer.max_grad_norm", self.max_grad_norm, above=0.0)


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch size, evaluation and saving of a run."""

    seed: int = 0
    """Seed of what a run draws: the order of the data, new adapters, training.eval_samples, the mismatched
    responses of KTO and its like. The batch of a step is a function of (seed, step)."""
    batch_size: int = 8
    """Prompts in a step, each with the responses of one preference, over all devices and micro-batches."""
    micro_batches: int = 1
    """Number of parts into which a step's prompts are split to save memory; the result is the same but for
    rounding."""
    memory_limit: float | Literal["device"] | None = field(default=None, metadata=marks(BESIDE))
    """Memory that a device may use, in GiB, or device for all that JAX can get of it. model.remat,
    training.micro_batches and model.log_prob_chunk are then chosen to fit it; nothing is chosen when not
    given."""
    epochs: float = 1.0
    """Number of passes over the training data; need not be whole."""
    steps: int | None = None
    """Number of optimiser steps; when given, training.epochs does not count."""
    eval_every: int | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD))
    """Steps between held-out evaluations; only after training when not given."""
    eval_samples: int = field(default=0, metadata=marks(BESIDE, OFF_THE_CARD))
    """Number of held-out prompts that the policy answers at each evaluation, for curves of its KL and
    length."""
    eval_max_new_tokens: int = field(default=64, metadata=marks(BESIDE, OFF_THE_CARD))
    """Longest answer that is sampled for training.eval_samples and for dpo train --winrate, in tokens."""
    save_every: int | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD))
    """Steps between checkpoints; when not given, and neither training.save_minutes nor training.keep_best is,
    only at the end and at a stop."""
    save_minutes: float | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD))
    """Minutes between checkpoints, besides those of training.save_every."""
    keep_checkpoints: int = field(default=2, metadata=marks(BESIDE, OFF_THE_CARD))
    """Number of checkpoints that are kept, the newest ones."""
    keep_best: Literal["rewards/accuracies", "rewards/margins"] | None = field(
        default=None, metadata=marks(BESIDE, OFF_THE_CARD)
    )
    """Held-out metric (see training.eval_every) whose best checkpoint is saved and kept besides the newest
    ones."""
    max_skipped: int = field(default=3, metadata=marks(BESIDE))
    """A step whose loss or gradient is not finite is skipped; the run stops after so many in a row."""
    reference_every: int | None = None
    """Steps between moves of the reference towards the policy (TR-DPO); the reference stays fixed when not
    given."""
    reference_alpha: float = 0.6
    """Size of a move of training.reference_every: the reference becomes alpha x policy + (1 - alpha) x
    reference, so that 1 replaces it, which is all that adapters allow."""
    resume: Literal["auto", "never"] = field(default="auto", metadata=marks(BESIDE, OFF_THE_CARD))
    """Continue from the newest checkpoint of the run directory (auto), or refuse to run where there is one
    (never)."""
    allow_changed: list[IdentityKind] = field(default_factory=list, metadata=marks(BESIDE, OFF_THE_CARD))
    """Kinds of things in which the checkpoint that is continued may differ without being refused, such as
    settings or data."""
    profiler_steps: int | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD))
    """Number of steps that JAX's profiler traces into the run directory, for the part of their time in which
    the device works; none when not given."""
    profiler_skip: int = field(default=10, metadata=marks(BESIDE, OFF_THE_CARD))
    """Number of steps of each start before those of training.profiler_steps: the first ones compile."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        default_factory=list, metadata=marks(BESIDE, OFF_THE_CARD)
    )
    """Services that get the metrics too, besides metrics.jsonl in the run directory."""

    def __post_init__(self) -> None:
        check_range("training.seed", self.seed, low=0, high=2**31 - 1)
        check_range("training.batch_size", self.batch_size, low=1)
        check_range("training.micro_batches", self.micro_batches, low=1)
        if self.micro_batches > self.batch_size:
            raise UserError(
                f"training.micro_batches is {self.micro_batches} and training.batch_size is "
                f"{self.batch_size}; allowed is at most one part for each of a step's prompts"
            )
        if self.memory_limit != "device":
            check_range("training.memory_limit", self.memory_limit, above=0.0, also="device")
        check_range("training.epochs", self.epochs, above=0.0)
        check_range("training.steps", self.steps, low=1)
        check_range("training.eval_every", self.eval_every, low=1)
        check_range("training.eval_samples", self.eval_samples, low=0)
        check_range("training.eval_max_new_tokens", self.eval_max_new_tokens, low=1)
        check_range("training.save_every", self.save_every, low=1)
        check_range("training.save_minutes", self.save_minutes, above=0.0)
        if self.keep_best is not None and self.eval_every is None:
            raise UserError(
                f"training.keep_best is {self.keep_best} and training.eval_every is not set; allowed: both"
            )
        check_range("training.keep_checkpoints", self.keep_checkpoints, low=1)
        check_range("training.max_skipped", self.max_skipped, low=1)
        check_range("training.profiler_steps", self.profiler_steps, low=3)
        check_range("training.profiler_skip", self.profiler_skip, low=1)
        check_range("training.reference_every", self.reference_every, low=1)
        check_range("training.reference_alpha", self.reference_alpha, above=0.0, high=1.0)


@dataclass(frozen=True)
class MeshConfig:
    """Numbers of devices along the axes of the mesh, whose product is all devices; -1 stands for the rest."""

    data: int = -1
    """Devices along the axis over which rows of a batch are split and parameters are copied."""
    fsdp: int = 1
    """Devices along the axis over which rows of a batch, weight matrices (not adapters) and their optimiser
    state are split."""
    tensor: int = 1
    """Devices along the axis over which attention heads, hidden units and the vocabulary are split."""
    rules: dict[str, list[Any]] = field(default_factory=dict)
    """Other ways to split parameters: a regular expression of their names to the mesh axes of their last
    dimensions. These rules are tried before the built-in ones."""

    def __post_init__(self) -> None:
        for axis, size in (("data", self.data), ("fsdp", self.fsdp), ("tensor", self.tensor)):
            if size != -1:
                check_range(f"mesh.{axis}", size, low=1, also="-1 (the rest of the devices)")
        for pattern, spec in self.rules.items():
            _check_rule(pattern, spec)


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes of one run, on one host or several. A single process needs nothing here."""

    cluster: Literal["auto", "none", "slurm", "openmpi", "kubernetes", "gke-tpu", "tpu"] = "auto"
    """The launcher whose environment variables say which process this is: auto looks for one, none asks
    none, a name asks that one only."""
    coordinator: str | None = None
    """Address of process 0, where all processes meet, as host:port; when not given JAX_COORDINATOR_ADDRESS,
    or else the launcher's, unless distributed.cluster is none."""
    num_processes: int | None = None
    """Number of processes of the run; the launcher's when not given."""
    process_id: int | None = None
    """Number of this process, from 0; the launcher's when not given."""
    start_timeout: float = 300.0
    """Seconds to wait at the start for all processes to come."""
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life after which a process is given up and all processes end."""
    step_timeout: float | None = None
    """Seconds that a step may take before the process writes where it stands and ends, and half an hour more
    where it has to be compiled; no limit when not given."""

    def __post_init__(self) -> None:
        check_range("distributed.num_processes", self.num_processes, low=1)
        check_range("distributed.process_id", self.process_id, low=0)
        for name in ("start_timeout", "heartbeat_timeout"):
            check_range(f"distributed.{name}", getattr(self, name), low=1.0)
        check_range("distributed.step_timeout", self.step_timeout, above=0.0)


@dataclass(frozen=True)
class Config:
    """The settings of a whole run."""

    run_dir: str = field(default="", metadata=marks(BESIDE, OFF_THE_CARD, OWN))
    """Directory for everything that the run writes; runs/DATA-OBJECTIVE, after data.train and the
    objective, when not given."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveSettings = field(default_factory=lambda: {"name": "dpo"})
    """The objective: its name and hyper-parameters, such as {name: dpo, beta: 0.1}, or singly:
    --objective.name=dpo --objective.beta=0.1; docs/objectives.md lists them."""
    objectives: list[ObjectiveSettings] = field(default_factory=list)
    """Several objectives in a weighted sum, instead of one: [{name: dpo, weight: 0.8}, {name: sft, weight:
    1.0}]."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=marks(BESIDE, OFF_THE_CARD, OWN))
    distributed: DistributedConfig = field(
        default_factory=DistributedConfig, metadata=marks(BESIDE, OFF_THE_CARD, OWN)
    )

    def __post_init__(self) -> None:
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self._data_name()}-{self._objective_name()}")
        if self.objectives and self.objective != {"name": "dpo"}:
            raise UserError(
                f"objective is {self.objective} and objectives is {self.objectives}; allowed is one of them "
                "(objective: {name: dpo} is the default)"
            )
        training = self.training
        for name, default in (("eval_every", None), ("eval_samples", 0)):
            asked = getattr(training, name)
            if asked != default and self.data.eval is None:
                raise UserError(
                    f"training.{name} is {asked} and data.eval is not set; allowed: both, because it is "
                    "about held-out data"
                )

    @property
    def policy_name(self) -> str:
        """The directory in `run_dir` that holds the policy of a finished run."""
        return "adapter" if self.lora.is_all_there_is else "export"

    def _data_name(self) -> str:
        """What data.train is called; of several sources the first three."""
        return "-".join(map(self._source_name, spellings(self.data.train)[:3]))

    def _source_name(self, source: str) -> str:
        """What a source is called, with its folder where the file's name could be anybody's."""
        path = PurePath(re.sub(r"^\w+:", "", source))
        stem = path.name.partition(".")[0] or path.name
        named = f"{path.parent.name}-{stem}" if stem in _ANYBODYS and path.parent.name else stem
        return re.sub(r"[^\w-]+", "_", named) or "data"

    def _objective_name(self) -> str:
        names = [str(term.get("name", "")) for term in self.objectives or [self.objective]]
        return "-".join(re.sub(r"[^\w-]+", "_", name.rpartition(":")[2]) or "objective" for name in names)


_ANYBODYS = ("train", "training", "data", "preferences", "pairs", "dataset")
"""Names of files of which everybody has one."""


def _check_rule(pattern: str, spec: list[Any]) -> None:
    """Raise unless `pattern` is a regex and every entry of `spec` names axes of the mesh or is null."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"mesh.rules has {pattern!r}, which is no regular expression: {error}") from error
    names = [name for entry in spec for name in (entry if isinstance(entry, list) else [entry])]
    unknown = [name for name in names if name not in ("data", "fsdp", "tensor", None)]
    twice = {name for name in names if name is not None and names.count(name) > 1}
    if unknown or twice:
        raise UserError(
            f"mesh.rules has {pattern!r}: {spec}; allowed are data, fsdp, tensor, a list of them, or null "
            "for each of the last dimensions, and each axis once"
        )
