"""The settings of the commands that look at a run, a model or data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dpo.config.addresses import check_address
from dpo.config.data import DataConfig, TemplateArguments, check_template_arguments
from dpo.config.model import LoraConfig
from dpo.config.ranges import check_range
from dpo.config.run import Config
from dpo.config.sources import spellings
from dpo.outcomes import UserError


@dataclass(frozen=True)
class InspectConfig:
    """Show the preferences that a run's settings name, as its model's tokenizer sees them."""

    heldout: bool = False
    """Inspect the held-out preferences (data.eval) instead of the training ones."""
    rows: int | None = None
    """Inspect the first so many rows only, of each source; as many as a run reads when not given."""
    example: int | None = 0
    """Number of the preference to show, from 0, with colours for what is scored; none when null."""
    output: str | None = None
    """JSON file to write the whole report to."""

    def __post_init__(self) -> None:
        check_range("rows", self.rows, low=1)
        check_range("example", self.example, low=0)


@dataclass(frozen=True)
class PlanConfig:
    """Compile a step of a run's settings for given devices, without running it."""

    topology: str | None = None
    """The devices, such as v5e:4x4, v5p:2x2x2, v6e:4x4, a100:8, h100:8, h100pcie:2, l40s:1, rtx4090:1 or
    cpu:2; cpu:1 when not given, or gpu:1 with --memory."""
    memory: float | None = None
    """Memory of an accelerator, in GiB, for any GPU (gpu:1) or in place of the topology's own; the chip's
    when not given."""
    search: bool = False
    """Try several meshes, with model.remat, training.micro_batches and model.log_prob_chunk as they are set,
    and show the fastest that fits."""
    prompt_tokens: int | None = None
    """Assume prompts of this many tokens, where response_tokens is given too; the training data's lengths
    when neither is."""
    response_tokens: int | None = None
    """Assume responses of this many tokens, where prompt_tokens is given too; the training data's lengths
    when neither is."""
    num_responses: int = 2
    """Responses to each prompt, where prompt_tokens and response_tokens are given; else the training data's
    own."""
    output: str | None = None
    """JSON file to write all figures to."""

    def __post_init__(self) -> None:
        check_range("memory", self.memory, above=0.0)
        for name in ("prompt_tokens", "response_tokens", "num_responses"):
            check_range(name, getattr(self, name), low=1)


@dataclass(frozen=True)
class HeldoutConfig:
    """What the commands that measure a policy on held-out data share."""

    run: str | None = None
    """Run directory; its export, reference, held-out data and settings are used where nothing else is
    given."""
    policy: str | None = None
    """The model to judge: directory, GGUF file or hub id; RUN/export when not given, or RUN/adapter where the
    run left adapters alone."""
    data: list[Any] | str | None = None
    """The preferences: file, directory or hub id, or a list of them, named like data.eval; the run's
    held-out data when not given."""
    split: str | None = None
    """Split of a hub data set or of a directory; the run's, or else test, when not given."""
    limit: int | None = None
    """Use the first so many rows only, of each source; the run's data.max_eval, or else all, when not
    given."""
    row_layout: str | None = None
    """Layout of the rows, as data.row_layout names it; the run's, or else recognised by the columns, when
    not given."""
    columns: dict[str, str] | None = None
    """Other names of the layout's columns, as data.columns has them; the run's, or else none, when not
    given."""
    ignore_columns: list[str] | None = None
    """Columns not to read, as data.ignore_columns has them; the run's, or else none, when not given."""
    chat_template: str | None = None
    """File with the chat template (jinja2) of both models; the run's, or else each model's own, when not
    given."""
    template_kwargs: TemplateArguments | None = None
    """Arguments of the chat template, such as {enable_thinking: false}; the run's, or else none, when not
    given."""

    template_characters: int | None = None
    """Characters that a template may write for a text, as data.template_characters has it; the run's, or
    else 100,000, when not given."""

    def check_data(self) -> None:
        """Refuse numbers and template arguments that nothing can be done with."""
        check_range("template_characters", self.template_characters, low=1000)
        check_range("limit", self.limit, low=1)
        check_template_arguments("template_kwargs", self.template_kwargs or {})


@dataclass(frozen=True)
class EvaluateConfig(HeldoutConfig):
    """Held-out figures of a policy against its reference: accuracy, margins, calibration, baselines."""

    reference: str | None = None
    """The model it is compared with, named like the policy; the run's reference when not given."""
    beta: float | None = None
    """Factor from log-ratios to rewards; when not given that of the run's objective (1 where it has none), or
    0.1 without a run."""
    expand: Literal["ranking", "best_worst", "adjacent", "all_pairs"] | None = None
    """Keep rankings whole, or turn them into pairs, as data.expand does; the run's, or else ranking, when
    not given."""
    max_length: int | None = None
    """Longest prompt plus response, in tokens; the run's, or else 512, when not given."""
    truncation: Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"] | None = None
    """What is done with a prompt plus response longer than max_length; the run's, or else drop, when not
    given."""
    on_error: Literal["stop", "skip"] | None = None
    """What is done with a malformed row: stop, or skip and count it; the run's, or else stop, when not
    given."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the activations; the run's, or else float32, when not given."""
    seed: int = 0
    """Seed of the bootstrap that makes the intervals."""
    output: str | None = None
    """JSON file to write all figures to, with a few pairs token by token beside it (.tokens.json). When not
    given, RUN/evaluation.json where nothing else is given but run, seed and rows; otherwise none."""
    rows: str | None = None
    """Table to write too, one line for each held-out response with its log-probs, whole and token by token:
    a file that ends with .parquet or .jsonl."""

    def __post_init__(self) -> None:
        if self.run is None:
            for name in ("policy", "reference", "data"):
                if getattr(self, name) is None:
                    raise UserError(f"{name} is not given; allowed: --{name} SOURCE, or --run DIR of a run")
        self.check_data()
        check_range("beta", self.beta, above=0.0)
        check_range("max_length", self.max_length, low=2)
        check_range("seed", self.seed, low=0)


WeightDtype = Literal["float32", "bfloat16", "float16", "base"]
GgufDtype = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
ExportDtype = Literal[WeightDtype, GgufDtype]
"""Of the weights of a directory; of the matrices of a GGUF file, where a directory's names serve as well."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint of a run, finished or not, as a Hugging Face directory or a GGUF file."""

    run: str
    """Run directory that holds the checkpoint."""
    output: str | None = None
    """Directory to write, which must be new, empty or an earlier export, or the .gguf file to write. When not
    given, RUN/export (or RUN/adapter, or RUN/export.gguf), and RUN/export-STEP-DTYPE where a step or a dtype
    other than float32 is given."""
    step: int | None = None
    """The checkpoint to write, by its number of updates; the newest when not given."""
    format: Literal["merged", "adapter", "gguf"] = "merged"
    """merged writes a model that transformers opens; adapter writes the adapters of a LoRA run as peft
    stores them; gguf writes one file that llama.cpp opens, adapters merged."""
    dtype: ExportDtype = "float32"
    """Dtype of a merged model's weights. float32 keeps every bit; base is the dtype that the base model's
    configuration names. f32, f16, bf16 and the quantised q8_0 to q4_0 are how a GGUF file stores matrices.
    Adapters are float32."""
    base_name: str | None = None
    """With format adapter, the hub id or path that the adapters name as their base; the run's lora.base_name,
    or else its model.source, when not given."""
    hub_id: str | None = None
    """Repository on the Hugging Face hub, OWNER/NAME, to upload the directory to; nothing is uploaded when
    not given."""
    hub_private: bool = True
    """Make the hub repository private, where it has to be made."""

    def __post_init__(self) -> None:
        if self.format != "gguf" and self.dtype in get_args(GgufDtype):
            raise UserError(
                f"dtype is {self.dtype}, in which a GGUF file stores matrices, and format is {self.format}; "
                f"allowed: {', '.join(get_args(WeightDtype))}, or --format gguf"
            )
        if self.format == "adapter" and self.dtype != "float32":
            raise UserError(
                f"dtype is {self.dtype}, and format is adapter; allowed there: float32, in which adapters "
                "are trained and written"
            )
        if self.format != "adapter" and self.base_name is not None:
            raise UserError(
                f"base_name is {self.base_name!r}, and format is {self.format}; allowed with --format adapter"
            )
        if self.format == "gguf" and self.output is not None and not self.output.endswith(".gguf"):
            raise UserError(f"output is {self.output}, and format is gguf; allowed: a file named *.gguf")
        if self.format == "gguf" and self.hub_id is not None:
            raise UserError(
                "hub_id uploads a directory, and format gguf writes a file; allowed: merged, adapter"
            )


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a run, or about several."""

    output: str | None = None
    """File to write the page to; when not given, RUN/report.html, or comparison.html in the folder that holds
    all the runs."""


@dataclass(frozen=True)
class WatchConfig:
    """Draw the curves of a run on the terminal while it goes on."""

    run: str
    """Run directory to follow."""
    interval: float = 1.0
    """Seconds between two readings of the metrics."""
    once: bool = False
    """Draw the curves once and end, instead of following the run."""

    def __post_init__(self) -> None:
        check_range("interval", self.interval, above=0.0)


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint that is the judge of dpo winrate --judge endpoint."""

    base_url: str | None = None
    """Address of the endpoint, without its last part /chat/completions, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name under which the endpoint serves the judging model."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; no key is sent where it is not set."""
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})
    """Further fields of every request, sent unchanged, but that max_tokens becomes max_completion_tokens for
    a model that wants it by that name."""
    concurrency: int = 8
    """Number of requests under way at a time."""
    timeout: float = 60.0
    """Seconds that an answer may take from the request to its last byte."""
    patience: float = 300.0
    """Seconds for which a server that cannot be reached is tried again."""
    retries: int = 5
    """How often a request is tried again after a time-out, a broken connection, status 408, 409, 425, 429
    (but of an account without credit) or 5xx, or a malformed reply."""
    backoff: float = 1.0
    """Seconds at most before the first retry, half of them at least, doubled for each further one up to a
    minute. A server that asks for more (Retry-After) is left alone for as long, up to an hour; a longer wait
    stops the command."""
    cache: str | None = None
    """Directory in which replies are kept; judge/ in DPO_CACHE (~/.cache/dpo) when not given."""
    price_input: float = 0.0
    """Price of a million prompt tokens, from which the results compute the cost."""
    price_output: float = 0.0
    """Price of a million completion tokens, from which the results compute the cost."""

    def __post_init__(self) -> None:
        if self.base_url is not None:
            check_address("endpoint.base_url", self.base_url)
        check_range("endpoint.concurrency", self.concurrency, low=1)
        check_range("endpoint.timeout", self.timeout, above=0.0)
        check_range("endpoint.patience", self.patience, low=0.0)
        check_range("endpoint.retries", self.retries, low=0)
        check_range("endpoint.backoff", self.backoff, low=0.0)
        check_range("endpoint.price_input", self.price_input, low=0.0)
        check_range("endpoint.price_output", self.price_output, low=0.0)


@dataclass(frozen=True)
class WinrateConfig(HeldoutConfig):
    """Measure how often a judge prefers the policy's responses to held-out prompts over an opponent's."""

    data: list[Any] | str | None = None
    """The preferences whose prompts are answered: file, directory or hub id, or a list of them, named like
    data.eval; the run's held-out data when not given."""
    opponent: str | None = None
    """The model it plays against, or data:best or data:worst for the data's own responses (of labelled single
    ones the desirable or the undesirable); the run's reference when not given."""
    judge: str | None = None
    """Who decides: endpoint, local:MODEL, reward_model:DIR, module:function, vader, or a control (first,
    longer). For the shipped data it is vader when not given; for other data it has to be given."""
    template: str | None = None
    """File with the jinja2 prompt that an endpoint or local judge gets; the shipped one when not given."""
    judge_template_kwargs: TemplateArguments | None = None
    """Arguments of the chat template of a local judge or a reward model, {} for none; those of
    template_kwargs when not given."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The endpoint that is asked where the judge is endpoint."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Sampling temperatures, each with figures of its own; 0 takes the most probable token."""
    samples: int = 1
    """Number of responses of each model to each prompt at each temperature."""
    max_new_tokens: int | None = None
    """Longest response that is sampled, in tokens; as long as 99% of the data's responses when not given,
    rounded up to a multiple of 64, or 256 where the data are prompts alone."""
    leave_out_cut: bool = False
    """Leave out pairs in which a response was cut off at that length; the shares are shown either way."""
    top_k: int | None = None
    """Draw from the k most probable tokens only; from all when not given."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens that together reach this probability only; from all when
    not given."""
    min_p: float | None = None
    """Draw from the tokens with at least this part of the highest probability only; from all when not
    given."""
    batch_size: int = 64
    """Number of responses that are sampled together. But for rounding, the responses do not depend on it."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations of all models."""
    kl: bool = True
    """Estimate the KL from the opponent, where it is a model with the same tokens: the mean of log
    policy/opponent over the policy's samples, which both models score (at temperature 1, of all that can be
    drawn, with none left out; else it is a log-ratio)."""
    seed: int = 0
    """Seed of the sampling and of the bootstrap that makes the intervals."""
    output: str | None = None
    """Directory to write the figures to (winrate.json, of another judge or opponent beside it
    winrate-JUDGE.json and the like), and what they are made of (samples.jsonl, verdicts.jsonl and others);
    RUN/winrate when not given."""

    def __post_init__(self) -> None:
        if self.run is None:
            for name in ("policy", "opponent", "data", "output"):
                if getattr(self, name) is None:
                    raise UserError(f"{name} is not given; allowed: --{name} VALUE, or --run DIR of a run")
        if not self.temperatures:
            raise UserError("temperatures is []; allowed is one or more")
        self.check_data()
        check_template_arguments("judge_template_kwargs", self.judge_template_kwargs or {})
        for temperature in self.temperatures:
            check_range("temperatures", temperature, low=0.0)
        for name in ("samples", "max_new_tokens", "top_k", "batch_size"):
            check_range(name, getattr(self, name), low=1)
        check_range("top_p", self.top_p, above=0.0, high=1.0)
        check_range("min_p", self.min_p, low=0.0, high=1.0)
        check_range("seed", self.seed, low=0)


@dataclass(frozen=True)
class GenerateConfig:
    """Answer a prompt with a model, printing the response as it is drawn."""

    model: str
    """The model that answers: a run (its export, or its adapters where it left them alone), directory, GGUF
    file, hub id or embedded:smollm2-135m-instruct."""
    system: str | None = None
    """System message before the prompt; the chat template's own when not given."""
    template_kwargs: TemplateArguments = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}."""
    template_characters: int = 100_000
    """Characters that the chat template may write for a text, beside twice those of its messages; a
    template that writes more is refused, and raising this says that it is trusted."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    temperature: float = 0.7
    """Number that the logits are divided by before drawing; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only; from all when not given."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens that together reach this probability only; from all when
    not given."""
    min_p: float | None = 0.05
    """Draw from the tokens with at least this part of the highest probability only; from all when null."""
    repetition_penalty: float = 1.0
    """Above 1 it makes the tokens of prompt and response less probable: their logits are divided by it where
    positive and multiplied where negative."""
    seed: int = 0
    """Seed of the sampling; the same prompt and seed give the same response."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations."""

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, low=1)
        check_range("temperature", self.temperature, low=0.0)
        check_range("top_k", self.top_k, low=1)
        check_range("top_p", self.top_p, above=0.0, high=1.0)
        check_range("min_p", self.min_p, low=0.0, high=1.0)
        check_range("repetition_penalty", self.repetition_penalty, above=0.0)
        check_range("seed", self.seed, low=0, high=2**32 - 1)
        check_template_arguments("template_kwargs", self.template_kwargs)
        check_range("template_characters", self.template_characters, low=1000)


_OPTIONS_OF_DATA = {"eval": "data", "eval_split": "split", "max_eval": "limit"} | {
    name: name
    for name in (
        *("expand", "max_length", "truncation", "on_error", "row_layout", "columns", "ignore_columns"),
        *("chat_template", "template_kwargs", "template_characters"),
    )
}
"""What of a run's `data` the commands on held-out data take, and as which option."""
_SETTING_OF_DATA = re.compile(rf"\bdata\.({'|'.join(_OPTIONS_OF_DATA)})\b(?!\[)")


def with_options(text: str, command: type[HeldoutConfig]) -> str:
    """A message about a run's settings with the options that this command has for them."""

    def option(setting: re.Match[str]) -> str:
        name = _OPTIONS_OF_DATA[setting[1]]
        return f"--{name}" if name in command.__dataclass_fields__ else setting[0]

    return _SETTING_OF_DATA.sub(option, text)


def heldout_settings(given: EvaluateConfig, run: Config | None) -> Config:
    """The settings of a run (or the defaults) with what was given on the command line in their place.

    `lora` is kept where the reference is the model that the run had adapters on, and the policy is written as
    it was trained: it says how that is held. Adapters alone are read on their base in float32.
    """
    base = Config() if run is None else run
    is_held = given.reference is None and base.model.reference is None and not base.lora.is_all_there_is
    data = {name: getattr(given, option) for name, option in _OPTIONS_OF_DATA.items()}
    data["eval_split"] = given.split or _split_of(given.data)
    model = {
        "source": given.policy or (None if given.run is None else _policy_source(given.run, base)),
        "reference": given.reference or reference_source(base),
        "compute_dtype": given.compute_dtype,
    }
    return replace(
        base,
        lora=base.lora if is_held else LoraConfig(),
        data=replace(base.data, **{name: value for name, value in data.items() if value is not None}),
        model=replace(base.model, **{name: value for name, value in model.items() if value is not None}),
    )


def _split_of(data: str | list[Any] | None) -> str | None:
    """No split but the usual one where files take the place of a run's data; else the run's."""
    is_files = data is not None and all(Path(name).is_file() for name in spellings(data))
    return DataConfig().eval_split if is_files else None


def _policy_source(run_dir: str, run: Config) -> str:
    """What a run's policy is opened from: adapters alone are on its own model, whatever base they name."""
    place = str(Path(run_dir) / run.policy_name)
    return f"{place} on {run.model.source}" if run.lora.is_all_there_is else place


def reference_source(run: Config) -> str:
    """What a run's reference is opened from."""
    return run.model.reference or starting_source(run)


def starting_source(run: Config) -> str:
    """What a run's policy is as it starts, tokenizer included: adapters of its start are on its model."""
    return run.model.source if run.lora.init is None else f"{run.lora.init} on {run.model.source}"
