"""The settings of the commands that look at a run, a model or data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dpo.config.ranges import check_range
from dpo.config.run import Config, LoraConfig
from dpo.outcomes import UserError


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
        check_range("example", self.example, low=0)


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
            check_range(name, getattr(self, name), low=1)


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
                    raise UserError(f"{name} is not given; allowed: --{name} SOURCE, or --run DIR of a run")
        check_range("limit", self.limit, low=1)
        check_range("beta", self.beta, above=0.0)
        check_range("max_length", self.max_length, low=2)
        check_range("seed", self.seed, low=0)


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
        check_range("interval", self.interval, above=0.0)


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
            raise UserError(f"endpoint.base_url is {self.base_url!r}; allowed: http:// or https:// addresses")
        check_range("endpoint.concurrency", self.concurrency, low=1)
        check_range("endpoint.timeout", self.timeout, above=0.0)
        check_range("endpoint.retries", self.retries, low=0)
        check_range("endpoint.backoff", self.backoff, low=0.0)
        check_range("endpoint.price_input", self.price_input, low=0.0)
        check_range("endpoint.price_output", self.price_output, low=0.0)


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
                    raise UserError(f"{name} is not given; allowed: --{name} VALUE, or --run DIR of a run")
        if not self.temperatures:
            raise UserError("temperatures is []; allowed is one or more")
        for temperature in self.temperatures:
            check_range("temperatures", temperature, low=0.0)
        for name in ("limit", "samples", "max_new_tokens", "top_k", "batch_size"):
            check_range(name, getattr(self, name), low=1)
        check_range("top_p", self.top_p, above=0.0, high=1.0)
        check_range("min_p", self.min_p, low=0.0, high=1.0)
        check_range("seed", self.seed, low=0)


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
        check_range("max_new_tokens", self.max_new_tokens, low=1)
        check_range("temperature", self.temperature, low=0.0)
        check_range("top_k", self.top_k, low=1)
        check_range("top_p", self.top_p, above=0.0, high=1.0)
        check_range("min_p", self.min_p, low=0.0, high=1.0)
        check_range("repetition_penalty", self.repetition_penalty, above=0.0)
        check_range("seed", self.seed, low=0, high=2**32 - 1)


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
