"""The settings of a run. The YAML files in `configs/` and `runs/*/config.yaml` are this tree, written out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any, Literal

from dpo.config.ranges import check_range
from dpo.outcomes import UserError

IdentityKind = Literal[
    "settings", "data", "tokenizer", "template", "tokens", "weights", "reference", "versions", "steps"
]
"""What a checkpoint belongs to, and a run that continues it must have the same of."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy, and by default the reference."""

    source: str = "embedded:smollm2-135m-instruct"
    """Hugging Face hub id, directory (a peft adapter too), GGUF file, or embedded:smollm2-135m-instruct."""
    reference: str | None = None
    """Source of the frozen reference; the policy's starting weights when not given."""
    reference_store: str | None = None
    """Directory of stored reference log-probs; reference/ in DPO_CACHE (~/.cache/dpo) when not given."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations; parameters, softmax and sums of log-probs stay float32."""
    round_products: Literal["neither", "backward", "both"] | None = None
    """Passes in which linears round the operands of their products to bfloat16 and sum in float32: neither,
    backward (losses stay exact) or both; when not given, both if compute_dtype is bfloat16, else neither."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What the backward pass recomputes: nothing, all but matrix products, or (least memory) whole layers."""
    attention: Literal["auto", "plain", "blocked", "ranges", "splash", "cudnn"] = "auto"
    """The code that computes attention. auto is blocked on CPUs, ranges on GPUs and plain on TPUs. ranges and
    cudnn need a GPU (cudnn with bfloat16), splash needs a TPU."""
    log_prob_chunk: int = 1024
    """Scored tokens of a device that meet the vocabulary at a time (bounds memory to chunk x V floats)."""

    def __post_init__(self) -> None:
        check_range("model.log_prob_chunk", self.log_prob_chunk, low=1)
        if self.attention == "cudnn" and self.compute_dtype == "float32":
            raise UserError(
                "model.attention is cudnn with model.compute_dtype float32; allowed there: bfloat16, because "
                "cuDNN attends in half precision only"
            )
        if self.compute_dtype == "bfloat16" and self.round_products not in (None, "both"):
            raise UserError(
                f"model.round_products is {self.round_products} with model.compute_dtype bfloat16; allowed "
                "there: both, because operands that are bfloat16 already cannot be exact"
            )

    @property
    def forward_dtype(self) -> Literal["float32", "bfloat16"]:
        """The coarsest dtype that log-probs go through."""
        return "bfloat16" if self.round_products == "both" else self.compute_dtype


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters on a frozen model instead of the model; off unless rank or init is given."""

    rank: int | None = None
    """Columns of A and rows of B in x W + s (x A) B; LoRA is off when not given."""
    alpha: float | None = None
    """s is alpha / rank; twice the rank when not given."""
    target_modules: list[str] | str = "all-linear"
    """Linears with an adapter, as in peft: all-linear, a list of ends of names, or a regular expression."""
    use_rslora: bool = False
    """s is alpha / sqrt(rank) instead."""
    use_dora: bool = False
    """DoRA: the length of every output's weights is trained besides."""
    init: str | None = None
    """Directory of a peft adapter that the policy starts from, with its rank, alpha, modules and kind."""
    base_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How frozen kernels are held (embeddings are bfloat16 with int8 too); adapters are float32."""

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, low=1)
        check_range("lora.alpha", self.alpha, above=0.0)
        if self.rank is not None and self.init is not None:
            raise UserError(
                f"lora.rank is {self.rank} and lora.init is {self.init!r}; allowed is one of "
                "them: an adapter has a rank"
            )
        if not self.target_modules:
            raise UserError("lora.target_modules is empty; allowed: all-linear, names, a regular expression")
        owned = ["alpha", "target_modules", "use_rslora", "use_dora", *([] if self.is_on else ["base_dtype"])]
        defaults = {item.name: item.default for item in fields(self)}
        for name in owned if self.rank is None else []:
            if getattr(self, name) != defaults[name]:
                reason = "LoRA is off" if self.init is None else "the adapter in lora.init has its own"
                raise UserError(
                    f"lora.{name} is {getattr(self, name)!r}, but {reason}; allowed where lora.rank is given"
                )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained, and not the model."""
        return self.rank is not None or self.init is not None


@dataclass(frozen=True)
class DataConfig:
    """Where preferences come from and how they become token ids and rows."""

    train: str = "shipped:sentiment_train.jsonl"
    """JSONL or Parquet file, directory, or hub id of the training preferences."""
    eval: str | None = None
    """The held-out preferences, in the same formats; nothing is held out when not given."""
    train_split: str = "train"
    """Split read from a hub data set for training."""
    eval_split: str = "test"
    """Split read from a hub data set for evaluation."""
    max_train: int | None = None
    """Use only the first so many training rows."""
    max_eval: int | None = None
    """Use only the first so many held-out rows."""
    row_layout: str | None = None
    """Layout of the rows, one of those in docs/data.md, such as pair or nectar; recognised by their columns
    when not given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns that have another name than the layout's, such as {prompt: query, chosen: good}."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns that may stay unread although their names (system, context, images, …) say that they matter."""
    expand: Literal["ranking", "best_worst", "adjacent", "all_pairs"] = "ranking"
    """A ranking stays whole, or becomes its best-worst, adjacent or all pairs."""
    max_length: int = 512
    """Longest prompt plus response in tokens."""
    truncation: Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"] = "drop"
    """What happens to a preference with a longer prompt plus response."""
    end_token: Literal["template", "eos_only", "none"] = "template"
    """What ends a scored response: all that the template puts there, the end token alone, or nothing."""
    chat_template: str | None = None
    """File with a jinja2 chat template that replaces the tokenizer's own."""
    template_date: str = "2024-07-26"
    """What chat templates take for today (strftime_now, as in Llama 3's), so that tokens stay the same."""
    layout: Literal["padded", "packed", "shared"] = "shared"
    """One response a row; responses packed into rows; or packed groups that share their prompt."""
    row_length: int | None = None
    """Tokens a row; chosen from the data's lengths when not given."""
    shuffle: bool = True
    """Shuffle each epoch by (seed, epoch); else the file's order."""
    on_error: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run before training, or is skipped and counted."""

    def __post_init__(self) -> None:
        check_range("data.max_length", self.max_length, low=2)
        check_range("data.max_train", self.max_train, low=1)
        check_range("data.max_eval", self.max_eval, low=1)
        check_range("data.row_length", self.row_length, low=8)
        try:
            date.fromisoformat(self.template_date)
        except ValueError as error:
            raise UserError(
                f"data.template_date is {self.template_date!r}; allowed is a date as 2024-07-26"
            ) from error


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay after warm-up (to zero for linear and cosine)."""
    warmup_fraction: float = 0.1
    """Part of all steps over which the rate rises from zero."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (not on norms and biases)."""
    max_grad_norm: float | None = 1.0
    """Global-norm clipping; none when not given."""

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
    """Length, batch, evaluation and saving of a run."""

    seed: int = 0
    """The only source of randomness: everything is a function of (seed, step)."""
    batch_size: int = 8
    """Prompts a step, of all devices and micro-batches together."""
    micro_batches: int = 1
    """Parts that a step's prompts are split into to save memory; the result is the same."""
    memory_limit: float | Literal["device"] | None = None
    """GiB that a device may hold: model.remat, micro_batches and model.log_prob_chunk are chosen to fit it;
    device is all that the device has; nothing is chosen when not given."""
    epochs: float = 1.0
    """Passes over the training data."""
    steps: int | None = None
    """Optimiser steps; overrides epochs."""
    eval_every: int | None = None
    """Steps between held-out evaluations; only after training when not given."""
    eval_samples: int = 0
    """Held-out prompts that the policy answers at each evaluation, for curves of its KL and length."""
    eval_max_new_tokens: int = 64
    """Longest of these answers."""
    save_every: int | None = None
    """Steps between checkpoints; only at the end when not given."""
    save_minutes: float | None = None
    """Minutes between checkpoints, besides save_every."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: Literal["rewards/accuracies", "rewards/margins"] | None = None
    """Also save and keep the checkpoint whose held-out evaluation (eval_every) has the highest of these."""
    max_skipped: int = 3
    """A step whose loss or gradient is not finite is skipped; so many in a row stop the run."""
    reference_every: int | None = None
    """Steps between moves of the reference towards the policy (TR-DPO); it stays fixed when not given."""
    reference_alpha: float = 0.6
    """A move is: reference = alpha x policy + (1 - alpha) x reference; 1 replaces it."""
    resume: Literal["auto", "never"] = "auto"
    """Continue from the newest checkpoint of the run directory, or refuse if there is one."""
    allow_changed: list[IdentityKind] = field(default_factory=list)
    """What may differ from the checkpoint that is continued, such as settings or data; nothing by default."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""

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
        check_range("training.reference_every", self.reference_every, low=1)
        check_range("training.reference_alpha", self.reference_alpha, above=0.0, high=1.0)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product must be the device count (-1: the rest)."""

    data: int = -1
    """Rows are split over this axis, parameters copied."""
    fsdp: int = 1
    """Rows, parameters and optimiser state are split over this axis."""
    tensor: int = 1
    """Heads, hidden units and vocabulary are split over this axis."""
    rules: dict[str, list[Any]] = field(default_factory=dict)
    """Regex of parameter names to axes of their last dimensions; tried before the rules of the code."""

    def __post_init__(self) -> None:
        for axis, size in (("data", self.data), ("fsdp", self.fsdp), ("tensor", self.tensor)):
            if size != -1:
                check_range(f"mesh.{axis}", size, low=1, also="-1 (the rest of the devices)")
        for pattern, spec in self.rules.items():
            _check_rule(pattern, spec)


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes of one run, on one or several hosts; a single process needs nothing here."""

    cluster: Literal["auto", "none", "slurm", "openmpi", "kubernetes", "gke-tpu", "tpu"] = "auto"
    """Whose variables say where the processes are: the launcher's that is found, none's, or this one's."""
    coordinator: str | None = None
    """host:port of process 0, where all meet; the launcher's or JAX_COORDINATOR_ADDRESS when not given."""
    num_processes: int | None = None
    """Processes of the run; the launcher's when not given."""
    process_id: int | None = None
    """Which of them this is, from 0; the launcher's when not given."""
    start_timeout: float = 300.0
    """Seconds to wait for all processes at the start."""
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life after which a process is given up, and all end."""
    step_timeout: float | None = None
    """Seconds that a step may take before the process writes its stacks and ends; no limit when not given."""

    def __post_init__(self) -> None:
        check_range("distributed.num_processes", self.num_processes, low=1)
        check_range("distributed.process_id", self.process_id, low=0)
        for name in ("start_timeout", "heartbeat_timeout"):
            check_range(f"distributed.{name}", getattr(self, name), low=1.0)
        check_range("distributed.step_timeout", self.step_timeout, above=0.0)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = "runs/sentiment_pairs"
    """Everything the run writes goes here."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo"})
    """Name of an objective and its hyper-parameters, such as {name: dpo, beta: 0.1}."""
    objectives: list[dict[str, Any]] = field(default_factory=list)
    """A weighted sum instead of one: [{name: dpo, weight: 0.8}, {name: sft, weight: 1.0}]."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
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
