"""Every setting of a run: frozen dataclasses, one comment a field. Nothing else holds defaults.

The command line, the YAML files in `configs/` and `runs/*/config.yaml` are this tree, written out.
Range checks live in `__post_init__`, so that a bad value stops a command before anything is loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml

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
    attention: Literal["auto", "plain", "blocked", "splash", "cudnn"] = "auto"
    """As measured best for the device and the rows' length, or as named: splash on TPUs, cudnn on GPUs."""
    log_prob_chunk: int = 1024
    """Scored tokens of a device that meet the vocabulary at a time (bounds memory to chunk x V floats)."""

    def __post_init__(self) -> None:
        _check_range("model.log_prob_chunk", self.log_prob_chunk, low=1)
        if self.attention == "cudnn" and self.compute_dtype == "float32":
            raise ValueError(
                "model.attention is cudnn with model.compute_dtype float32; allowed there: bfloat16, because "
                "cuDNN attends in half precision only"
            )
        if self.compute_dtype == "bfloat16" and self.round_products not in (None, "both"):
            raise ValueError(
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
        _check_range("lora.rank", self.rank, low=1)
        _check_range("lora.alpha", self.alpha, above=0.0)
        if self.rank is not None and self.init is not None:
            raise ValueError(
                f"lora.rank is {self.rank} and lora.init is {self.init!r}; allowed is one of "
                "them: an adapter has a rank"
            )
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty; allowed: all-linear, names, a regular expression")
        owned = ["alpha", "target_modules", "use_rslora", "use_dora", *([] if self.is_on else ["base_dtype"])]
        defaults = {item.name: item.default for item in fields(self)}
        for name in owned if self.rank is None else []:
            if getattr(self, name) != defaults[name]:
                reason = "LoRA is off" if self.init is None else "the adapter in lora.init has its own"
                raise ValueError(
                    f"lora.{name} is {getattr(self, name)!r}, but {reason}; allowed where lora.rank is given"
                )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained, and not the model."""
        return self.rank is not None or self.init is not None


@dataclass(frozen=True)
class DataConfig:
    """Where preferences come from and how they become token ids and rows."""

    train: str = "data/sentiment_train.jsonl"
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
        _check_range("data.max_length", self.max_length, low=2)
        _check_range("data.max_train", self.max_train, low=1)
        _check_range("data.max_eval", self.max_eval, low=1)
        _check_range("data.row_length", self.row_length, low=8)
        try:
            date.fromisoformat(self.template_date)
        except ValueError as error:
            raise ValueError(
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
        _check_range("optimizer.learning_rate", self.learning_rate, low=0.0)
        _check_range("optimizer.warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        _check_range("optimizer.beta1", self.beta1, low=0.0, below=1.0)  # at 1 the bias correction is 0 / 0
        _check_range("optimizer.beta2", self.beta2, low=0.0, below=1.0)
        _check_range("optimizer.epsilon", self.epsilon, above=0.0)
        _check_range("optimizer.weight_decay", self.weight_decay, low=0.0)
        _check_range("optimizer.max_grad_norm", self.max_grad_norm, above=0.0)


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
        _check_range("training.seed", self.seed, low=0, high=2**31 - 1)
        _check_range("training.batch_size", self.batch_size, low=1)
        _check_range("training.micro_batches", self.micro_batches, low=1)
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"training.micro_batches is {self.micro_batches} and training.batch_size is "
                f"{self.batch_size}; allowed is at most one part for each of a step's prompts"
            )
        if self.memory_limit != "device":
            _check_range("training.memory_limit", self.memory_limit, above=0.0, also="device")
        _check_range("training.epochs", self.epochs, above=0.0)
        _check_range("training.steps", self.steps, low=1)
        _check_range("training.eval_every", self.eval_every, low=1)
        _check_range("training.eval_samples", self.eval_samples, low=0)
        _check_range("training.eval_max_new_tokens", self.eval_max_new_tokens, low=1)
        _check_range("training.save_every", self.save_every, low=1)
        _check_range("training.save_minutes", self.save_minutes, above=0.0)
        if self.keep_best is not None and self.eval_every is None:
            raise ValueError(
                f"training.keep_best is {self.keep_best} and training.eval_every is not set; allowed: both"
            )
        _check_range("training.keep_checkpoints", self.keep_checkpoints, low=1)
        _check_range("training.max_skipped", self.max_skipped, low=1)
        _check_range("training.reference_every", self.reference_every, low=1)
        _check_range("training.reference_alpha", self.reference_alpha, above=0.0, high=1.0)


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
                _check_range(f"mesh.{axis}", size, low=1, also="-1 (the rest of the devices)")
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
        _check_range("distributed.num_processes", self.num_processes, low=1)
        _check_range("distributed.process_id", self.process_id, low=0)
        for name in ("start_timeout", "heartbeat_timeout"):
            _check_range(f"distributed.{name}", getattr(self, name), low=1.0)
        _check_range("distributed.step_timeout", self.step_timeout, above=0.0)


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
            raise ValueError(
                f"objective is {self.objective} and objectives is {self.objectives}; allowed is one of them "
                "(objective: {name: dpo} is the default)"
            )
        training = self.training
        for name, default in (("eval_every", None), ("eval_samples", 0)):
            asked = getattr(training, name)
            if asked != default and self.data.eval is None:
                raise ValueError(
                    f"training.{name} is {asked} and data.eval is not set; allowed: both, because it is "
                    "about held-out data"
                )


@dataclass(frozen=True)
class InspectConfig:
    """What to show of the preferences that a run's settings (model and data) name."""

    heldout: bool = False
    """Inspect the held-out preferences (data.eval) instead of the training ones."""
    example: int | None = 0
    """Which kept preference to show coloured by what is scored, from 0; none when null."""
    output: str | None = None
    """JSON file for the whole report."""

    def __post_init__(self) -> None:
        _check_range("example", self.example, low=0)


@dataclass(frozen=True)
class PlanConfig:
    """What to compile a step of a run's settings for, without running it."""

    topology: str | None = None
    """Devices, such as v5e:4x4, v5p:2x2x2, v6e:4x4, a100:8, h100:8 or cpu:2; cpu:1 when not given."""
    search: bool = False
    """Try several meshes and show the best."""
    prompt_tokens: int | None = None
    """Assume prompts of so many tokens; the training data's lengths count when not given."""
    response_tokens: int | None = None
    """Assume responses of so many tokens."""
    num_responses: int = 2
    """Assume so many responses a prompt."""
    output: str | None = None
    """JSON file for all figures."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "response_tokens", "num_responses"):
            _check_range(name, getattr(self, name), low=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out figures of a policy against its reference: accuracy, margins, calibration, baselines."""

    run: str | None = None
    """Run directory, whose export, reference, held-out data and settings hold where nothing else is given."""
    policy: str | None = None
    """Policy: directory, GGUF file or hub id; RUN/export when not given."""
    reference: str | None = None
    """Reference, likewise; the run's when not given."""
    data: str | None = None
    """Preferences: file, directory or hub id; the run's held-out data when not given."""
    split: str | None = None
    """Split of a hub data set; the run's or test when not given."""
    limit: int | None = None
    """Use only the first so many rows."""
    beta: float | None = None
    """Strength that turns log-ratios into rewards; the run's or 0.1 when not given."""
    expand: Literal["ranking", "best_worst", "adjacent", "all_pairs"] | None = None
    """A ranking stays whole, or becomes pairs; the run's or ranking when not given."""
    max_length: int | None = None
    """Longest prompt plus response in tokens; the run's or 512 when not given."""
    truncation: Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"] | None = None
    """What happens to a longer one; the run's or drop when not given."""
    on_error: Literal["stop", "skip"] | None = None
    """A malformed row stops, or is skipped and counted; the run's or stop when not given."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations; the run's or float32 when not given."""
    seed: int = 0
    """Of the bootstrap."""
    output: str | None = None
    """JSON file for all figures; RUN/evaluation.json for a run's own policy, reference, data and settings."""

    def __post_init__(self) -> None:
        if self.run is None:
            for name in ("policy", "reference", "data"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is not given; allowed: --{name} SOURCE, or --run DIR of a run")
        _check_range("limit", self.limit, low=1)
        _check_range("beta", self.beta, above=0.0)
        _check_range("max_length", self.max_length, low=2)
        _check_range("seed", self.seed, low=0)


@dataclass(frozen=True)
class ExportConfig:
    """A Hugging Face directory from a checkpoint of a run, finished or not."""

    run: str
    """Run directory."""
    output: str | None = None
    """Directory to write: new, empty or of the same kind; when not given RUN/export (or RUN/adapter), and
    RUN/export-STEP-DTYPE for a step, or a dtype other than float32, that is given."""
    step: int | None = None
    """Checkpoint of so many updates; the newest when not given."""
    format: Literal["merged", "adapter"] = "merged"
    """A model that transformers opens, or the adapters of a LoRA run as peft stores them."""
    dtype: Literal["float32", "bfloat16", "float16", "base"] = "float32"
    """Dtype of a merged model's weights: float32 keeps every bit, base is that of the base's own."""
    hub_id: str | None = None
    """OWNER/NAME on the Hugging Face hub to upload the directory to; nothing is uploaded when not given."""
    hub_private: bool = True
    """A hub repository that has to be made is private."""


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained HTML page about a run, or about several."""

    output: str | None = None
    """The page; RUN/report.html, or comparison.html beside the runs, when not given."""


@dataclass(frozen=True)
class WatchConfig:
    """The curves of a run on the terminal while it goes on."""

    run: str
    """Run directory."""
    interval: float = 1.0
    """Seconds between two looks at the metrics."""
    once: bool = False
    """Draw once and end."""

    def __post_init__(self) -> None:
        _check_range("interval", self.interval, above=0.0)


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint that serves as the judge of `dpo winrate --judge endpoint`."""

    base_url: str | None = None
    """Address up to and without /chat/completions, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; no key is sent where it is not set."""
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})
    """Further fields of every request, sent as they are."""
    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    retries: int = 5
    """Further tries after a time-out, a broken connection, status 429 or 5xx, or a malformed reply."""
    backoff: float = 1.0
    """Seconds before the first retry, doubled for each further one (or what a Retry-After header asks)."""
    cache: str | None = None
    """Directory of kept replies; judge/ in DPO_CACHE (~/.cache/dpo) when not given."""
    price_input: float = 0.0
    """Price of a million prompt tokens, for the cost in the results."""
    price_output: float = 0.0
    """Price of a million completion tokens."""

    def __post_init__(self) -> None:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"endpoint.base_url is {self.base_url!r}; allowed: http:// or https:// addresses"
            )
        _check_range("endpoint.concurrency", self.concurrency, low=1)
        _check_range("endpoint.timeout", self.timeout, above=0.0)
        _check_range("endpoint.retries", self.retries, low=0)
        _check_range("endpoint.backoff", self.backoff, low=0.0)
        _check_range("endpoint.price_input", self.price_input, low=0.0)
        _check_range("endpoint.price_output", self.price_output, low=0.0)


@dataclass(frozen=True)
class WinrateConfig:
    """How often a judge prefers the policy's responses to held-out prompts over an opponent's."""

    run: str | None = None
    """Run directory, whose export, reference, held-out data and settings hold where nothing else is given."""
    policy: str | None = None
    """Policy: directory, GGUF file or hub id; RUN/export when not given."""
    opponent: str | None = None
    """Another model, or data:best or data:worst (the data's responses); the run's reference by default."""
    data: str | None = None
    """Preferences whose prompts are answered; the run's held-out data when not given."""
    split: str | None = None
    """Split of a hub data set; the run's or test when not given."""
    limit: int | None = None
    """Use only the first so many rows."""
    judge: str = "vader"
    """vader, module:function, reward_model:DIR, endpoint, local:MODEL, or a control: first, longer."""
    template: str | None = None
    """File with the jinja2 prompt of an endpoint or local judge; the shipped one when not given."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The endpoint that judges, where the judge is endpoint."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Sampling temperatures, each with its own figures; 0 is greedy."""
    samples: int = 1
    """Responses of each model to each prompt at each temperature."""
    max_new_tokens: int = 128
    """Longest response."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens that reach this probability only."""
    min_p: float | None = None
    """Draw from tokens with at least so much of the highest probability only."""
    batch_size: int = 64
    """Responses that are sampled together; they do not depend on it."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations of all models."""
    kl: bool = True
    """Where the opponent is a model, score the policy's samples under both: mean of log policy/opponent."""
    seed: int = 0
    """Of sampling and of the bootstrap."""
    output: str | None = None
    """Directory for samples.jsonl, verdicts.jsonl and winrate.json; RUN/winrate when a run is given."""

    def __post_init__(self) -> None:
        if self.run is None:
            for name in ("policy", "opponent", "data", "output"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is not given; allowed: --{name} VALUE, or --run DIR of a run")
        if not self.temperatures:
            raise ValueError("temperatures is []; allowed is one or more")
        for temperature in self.temperatures:
            _check_range("temperatures", temperature, low=0.0)
        for name in ("limit", "samples", "max_new_tokens", "top_k", "batch_size"):
            _check_range(name, getattr(self, name), low=1)
        _check_range("top_p", self.top_p, above=0.0, high=1.0)
        _check_range("min_p", self.min_p, low=0.0, high=1.0)
        _check_range("seed", self.seed, low=0)


@dataclass(frozen=True)
class FrontierConfig:
    """The DPO paper's controlled-sentiment experiment at the scale of a laptop: true reward against KL.

    The defaults are what docs/results.md records: about an hour on two cores.
    """

    output: str = "runs/frontier"
    """Directory of all runs, figures and frontier.json; the same command goes on with what is there."""
    model: str = "embedded:smollm2-135m-instruct"
    """Reference, and where every policy starts."""
    train: str = "data/sentiment_train.jsonl"
    """Rankings to train on, the same for all objectives."""
    eval: str = "data/sentiment_eval.jsonl"
    """Held-out rankings, whose prompts are answered."""
    reward: str = "vader"
    """The true reward: vader or module:function."""
    objectives: list[str] = field(default_factory=lambda: ["dpo", "ipo", "plackett_luce"])
    """Objectives, by name."""
    betas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.5, 1.0])
    """Values of beta, each with a run of every objective."""
    only: list[str] = field(default_factory=list)
    """Of these runs, those to train, in this order, such as [dpo:0.1,ipo:0.1]; all when empty."""
    steps: int = 12
    """Optimiser steps of a run."""
    eval_every: int = 4
    """Steps between two points of a run's line."""
    batch_size: int = 4
    """Prompts a step."""
    learning_rate: float = 6e-5
    """Peak learning rate (linear decay)."""
    prompts: int | None = 40
    """Use only the first so many held-out prompts; all when null."""
    max_length: int = 128
    """Longest prompt plus response in training, in tokens."""
    max_new_tokens: int = 32
    """Longest sampled response."""
    best_of: int = 8
    """Responses of the reference to each prompt; best-of-n is drawn for n up to this."""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Sampling temperatures of the win-rates."""
    temperature_beta: float = 0.1
    """The beta whose policies' win-rates are drawn against temperature; one of betas."""
    opponent: str = "data:best"
    """Opponent in these win-rates: data:best, data:worst or a model."""
    seed: int = 0
    """Of data order and sampling."""

    def __post_init__(self) -> None:
        for name in ("objectives", "betas", "temperatures"):
            if not getattr(self, name):
                raise ValueError(f"{name} is []; allowed is one or more")
        for name in ("steps", "eval_every", "batch_size", "prompts", "max_new_tokens", "best_of"):
            _check_range(name, getattr(self, name), low=1)
        for beta in self.betas:
            _check_range("betas", beta, above=0.0)
        for temperature in self.temperatures:
            _check_range("temperatures", temperature, low=0.0)
        if self.temperature_beta not in self.betas:
            raise ValueError(f"temperature_beta is {self.temperature_beta}; allowed are betas: {self.betas}")
        names = [f"{name}:{beta:g}" for name in self.objectives for beta in self.betas]
        for name in self.only:
            if name not in names:
                raise ValueError(f"only has {name!r}; allowed are {', '.join(names)}")
        _check_range("learning_rate", self.learning_rate, above=0.0)
        _check_range("max_length", self.max_length, low=2)
        _check_range("seed", self.seed, low=0, high=2**31 - 1)


@dataclass(frozen=True)
class GenerateConfig:
    """Responses of a model, printed as they are drawn."""

    model: str
    """Directory, GGUF file, hub id or embedded:smollm2-135m-instruct."""
    system: str | None = None
    """System message; the chat template's own when not given."""
    max_new_tokens: int = 256
    """Longest response."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens that reach this probability only."""
    min_p: float | None = 0.05
    """Draw from tokens with at least so much of the highest probability only."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens already there; 1 is off."""
    seed: int = 0
    """Of sampling; the same prompt and seed give the same response."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations."""

    def __post_init__(self) -> None:
        _check_range("max_new_tokens", self.max_new_tokens, low=1)
        _check_range("temperature", self.temperature, low=0.0)
        _check_range("top_k", self.top_k, low=1)
        _check_range("top_p", self.top_p, above=0.0, high=1.0)
        _check_range("min_p", self.min_p, low=0.0, high=1.0)
        _check_range("repetition_penalty", self.repetition_penalty, above=0.0)
        _check_range("seed", self.seed, low=0, high=2**32 - 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion-DPO on a mixture of Gaussians and a linear reward, where the optimum is known."""

    run_dir: str = "runs/diffusion_gaussian"
    """Results and figures go here."""
    means: list[list[float]] = field(default_factory=lambda: [[0.0]])
    """Mean of each component of the data, all of the same weight."""
    variance: float = 0.25
    """Variance of every component in every dimension."""
    reward: list[float] = field(default_factory=lambda: [2.0])
    """g of the reward r(x) = g x that preferences are drawn from, one number a dimension."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo", "beta": 1.0})
    """Name of an objective and its hyper-parameters; weighting and reduction set beta's scale."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of the DDPM process."""
    num_steps: int = 100
    """Steps T of the DDPM process."""
    prediction: Literal["noise", "data", "velocity"] = "velocity"
    """What the network outputs."""
    weighting: Literal["elbo", "uniform"] = "elbo"
    """Weights of time steps: the ELBO's, or one half everywhere as in the released Diffusion-DPO."""
    reverse_variance: Literal["posterior", "beta"] = "beta"
    """The model's variance of x_(t-1) given x_t, which sets the ELBO's weights."""
    reduction: Literal["sum", "mean"] = "sum"
    """Sum of squares over a sample's dimensions (beta is the strength of the KL), or their mean."""
    sharing: Literal["time_and_noise", "time", "nothing"] = "time_and_noise"
    """What the samples of a preference are noised with in common."""
    num_times: int = 16
    """Noised copies of each sample inside the loss."""
    num_preferences: int = 20_000
    """Preferences in the training set."""
    num_samples: int = 2
    """Samples that a preference ranks."""
    batch_size: int = 256
    """Preferences an update."""
    updates: int = 500
    """Updates of the policy."""
    learning_rate: float = 1e-3
    """Peak learning rate of the policy (Adam, cosine decay)."""
    reference_batch_size: int = 1024
    """Samples an update of the reference, and of the network of the variance-exploding process."""
    reference_updates: int = 1500
    """Their updates."""
    reference_learning_rate: float = 3e-3
    """Their peak learning rate."""
    hidden_size: int = 64
    """Width of the network."""
    num_layers: int = 3
    """Hidden layers of the network."""
    eta: float = 1.0
    """Sampler: 0 is DDIM, 1 is DDPM's ancestral sampler."""
    num_drawn: int = 20_000
    """Samples drawn to measure with."""
    process_steps: int = 100
    """Steps of the variance-exploding process (one-dimensional Gaussian data only)."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        if not self.means or any(len(mean) != len(self.reward) for mean in self.means):
            raise ValueError(
                f"means is {self.means} and reward is {self.reward}; allowed: at least one mean, "
                "each with as many numbers as reward"
            )
        for name in ("variance", "learning_rate", "reference_learning_rate"):
            _check_range(name, getattr(self, name), above=0.0)
        counts = ["num_steps", "num_times", "num_preferences", "batch_size", "updates", "num_layers"]
        counts += ["reference_batch_size", "reference_updates", "hidden_size", "process_steps"]
        for name in counts:
            _check_range(name, getattr(self, name), low=1)
        _check_range("num_samples", self.num_samples, low=2)
        _check_range("num_drawn", self.num_drawn, low=2)
        _check_range("eta", self.eta, low=0.0, high=1.0)
        _check_range("seed", self.seed, low=0, high=2**31 - 1)


def heldout_settings(given: EvaluateConfig, run: Config | None) -> Config:
    """The settings of a run (or the defaults) with what was given on the command line in their place.

    `lora` is kept where the reference is the model that the run had adapters on: it says how that is held.
    """
    base = Config() if run is None else run
    is_own_reference = given.reference is None and base.model.reference is None
    data = {
        "eval": given.data,
        "eval_split": given.split,
        "max_eval": given.limit,
        "expand": given.expand,
        "max_length": given.max_length,
        "truncation": given.truncation,
        "on_error": given.on_error,
    }
    model = {
        "source": given.policy or (None if given.run is None else str(Path(given.run) / "export")),
        "reference": given.reference or base.model.reference or base.model.source,
        "compute_dtype": given.compute_dtype,
    }
    return replace(
        base,
        lora=base.lora if is_own_reference else LoraConfig(),
        data=replace(base.data, **{name: value for name, value in data.items() if value is not None}),
        model=replace(base.model, **{name: value for name, value in model.items() if value is not None}),
    )


def save_config(config: Config | DiffusionConfig, path: str | Path) -> None:
    """Write every setting as YAML; `dpo train --config PATH` repeats the run."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    beside = Path(f"{path}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _check_rule(pattern: str, spec: list[Any]) -> None:
    """Raise unless `pattern` is a regex and every entry of `spec` names axes of the mesh or is null."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"mesh.rules has {pattern!r}, which is no regular expression: {error}") from error
    names = [name for entry in spec for name in (entry if isinstance(entry, list) else [entry])]
    unknown = [name for name in names if name not in ("data", "fsdp", "tensor", None)]
    twice = {name for name in names if name is not None and names.count(name) > 1}
    if unknown or twice:
        raise ValueError(
            f"mesh.rules has {pattern!r}: {spec}; allowed are data, fsdp, tensor, a list of them, or null "
            "for each of the last dimensions, and each axis once"
        )


def _check_range(
    key: str,
    value: float | int | None,
    *,
    low: float | int | None = None,
    above: float | int | None = None,
    below: float | int | None = None,
    high: float | int | None = None,
    also: str | None = None,
) -> None:
    """Raise unless low <= value <= high and above < value < below, as far as these are given; None passes."""
    if value is None:
        return
    inside = (low is None or value >= low) and (above is None or value > above)
    inside = inside and (high is None or value <= high) and (below is None or value < below)
    if inside and value not in (float("inf"), float("-inf")):
        return
    bounds = {"at least": low, "more than": above, "at most": high, "less than": below}
    allowed = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
    if low is not None and high is not None:
        allowed = f"from {low} to {high}"
    raise ValueError(f"{key} is {value}; allowed is {allowed}{f' or {also}' if also else ''}")
