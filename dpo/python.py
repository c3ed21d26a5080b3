"""The public face in Python: open a model, let it answer, score texts with it, train it.

    import dpo

    model = dpo.load("runs/mine")                       # a run, a directory, a GGUF file, a hub id
    model.generate(["Say hello."], temperature=0)       # one text for each prompt
    scored = model.score(["Say hello."], ["Hello!"])    # scored.logps, scored.token_logps, scored.lengths
    rewards = dpo.implicit_rewards(model, dpo.load("embedded:smollm2-135m-instruct"), rows, beta=0.1)
    result = dpo.train(dpo.Config(run_dir="runs/mine", ...))   # all that `dpo train` does

Texts are made into tokens as in training: a prompt is one user message (or the messages that are given) under
the model's chat template, a response is the assistant's turn with its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dpo.config import Config, DataConfig, MeshConfig, ModelConfig
from dpo.config.home import at_home
from dpo.data.columns import BY_COLUMNS, RowReading
from dpo.data.malformed import MalformedRowError
from dpo.data.messages import Message, Prompt, read_turns
from dpo.data.preferences import ReadSummary, fingerprint
from dpo.data.rows import Preference, digest, parse_row
from dpo.data.settling import settle_rows
from dpo.data.tokenization import tokenize_prompts
from dpo.data.tokenized import TokenizedDataset
from dpo.data.tokenizer_calls import decode_ids
from dpo.data.values import read_text
from dpo.evaluation.token_ratios import score_tokens
from dpo.hub_names import forget
from dpo.huggingface.pretrained import Pretrained, stop_tokens
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate
from dpo.models.vocabulary import require_known
from dpo.outcomes import UserError
from dpo.parallel.sharding import own_mesh
from dpo.runs import model_of
from dpo.training.datasets import require_embeddings
from dpo.training.policy import Policy, load_policy
from dpo.training.reading import Dataset, tokenize_preferences
from dpo.training.same_tokens import has_rows_of
from dpo.training.talk import as_trained

Text = str | Sequence[Message]
"""A text, or the messages of a conversation: {"role": …, "content": …}."""
LONGEST = 1_000_000
"""`data.max_length` where nothing else is said: what is scored is never cut in silence."""


class Scored(NamedTuple):
    """Log-probs of n responses, each given its prompt. N is the length of the longest."""

    logps: Float[np.ndarray, " n"]
    """log π(y|x): the sum over the response's scored tokens, in nats."""
    token_logps: Float[np.ndarray, "n N"]
    """The log-prob of each scored token; 0 behind the last."""
    token_ids: Int[np.ndarray, "n N"]
    """The scored tokens; -1 behind the last."""
    lengths: Int[np.ndarray, " n"]
    """Number of scored tokens."""


class ImplicitRewards(NamedTuple):
    """β (log π(y|x) − log ρ(y|x)) of n rows with up to K responses, best first; 0 where absent."""

    rewards: Float[np.ndarray, "n K"]
    policy_logps: Float[np.ndarray, "n K"]
    reference_logps: Float[np.ndarray, "n K"]
    lengths: Int[np.ndarray, "n K"]
    """Scored tokens of every response."""
    present: Bool[np.ndarray, "n K"]
    ranks: Int[np.ndarray, "n K"]
    """0 is best; equal ranks are ties. A row of HelpSteer2, which has one response, is a row here too."""


class LanguageModel:
    """A model with its tokenizer. `load` makes one."""

    def __init__(self, source: str, policy: Policy, data: DataConfig, mesh: Any) -> None:
        self.source = source
        """What it was loaded from, as it was named."""
        self._policy, self._data, self._mesh = policy, data, mesh

    def __repr__(self) -> str:
        return f"LanguageModel({self.source!r})"

    @property
    def pretrained(self) -> Pretrained:
        """The Flax model, its tokenizer and the configuration that it was read with."""
        return self._policy.pretrained

    def generate(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = 0.05,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[str]:
        """One response for each prompt, which is a text or the messages of a conversation.

        The same prompt and seed give the same response as `dpo generate`, whatever it is sampled beside, but
        for rounding.

        Raises:
          ValueError: for a setting that is out of range, or a prompt that the chat template refuses.
        """
        pretrained, tokenizer = self.pretrained, self.pretrained.tokenizer
        sampling = SamplingConfig(max_new_tokens, repetition_penalty, temperature, top_k, top_p, min_p)
        asked = [
            prompt if isinstance(prompt, str) else tuple(prompt) for prompt in _listed("prompts", prompts)
        ]
        ids = tokenize_prompts(
            asked,
            tokenizer,
            template_date=self._data.template_date,
            template_kwargs=self._data.template_kwargs,
            template_characters=self._data.template_characters,
        )
        require_known(ids, pretrained.model.config, source=self.source)
        drawn = generate(
            pretrained.model,
            ids,
            sampling=sampling,
            seeds=[seed] * len(ids),
            stop_tokens=stop_tokens(pretrained),
            batch_size=min(batch_size, max(1, len(ids))),
        )
        return [decode_ids(tokenizer, tokens, skip_special_tokens=True) for tokens in drawn]

    def score(self, prompts: Sequence[Text], responses: Sequence[Text]) -> Scored:
        """Log-probs of one response for each prompt; repeat a prompt to score several of its responses.

        Raises:
          ValueError: when there are not as many prompts as responses, or for one that cannot be scored: that
            makes no token, say, or is longer than the `max_length` that `load` was given.
        """
        prompts, responses = _listed("prompts", prompts), _listed("responses", responses)
        if len(prompts) != len(responses):
            raise UserError(
                f"{len(prompts)} prompts and {len(responses)} responses; allowed is one response a prompt"
            )
        rows = [
            Preference(
                _said(prompt, f"prompts[{i}]"),
                (_said(response, f"responses[{i}]"),),
                (0,),
                None,
                "score",
                f"responses[{i}]",
            )
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        found, tokens = self._score(rows)
        values = [of_row[0] for of_row in found]
        ids = [tokens.responses(i)[0][tokens.scored_of(i)[0]] for i in range(len(rows))]
        lengths = np.array([len(row) for row in values], np.int64)
        longest = max(map(len, values), default=0)
        return Scored(
            logps=np.array([np.sum(row, dtype=np.float64) for row in values], np.float32),
            token_logps=_padded(values, longest, fill=0.0, dtype=np.float32),
            token_ids=_padded(ids, longest, fill=-1, dtype=np.int64),
            lengths=lengths,
        )

    def _score(self, rows: Sequence[Preference]) -> tuple[list[list[np.ndarray]], TokenizedDataset]:
        """Log-probs by row, response and scored token."""
        tokens = tokenize_preferences(self._data, rows, self.pretrained.tokenizer)
        if len(tokens) != len(rows):
            reason, where = next(iter(tokens.first_dropped.items()))
            raise UserError(f"{where} ({reason}): it cannot be scored")
        summary = ReadSummary(len(rows), {}, [], {}, {})
        content = fingerprint(map(digest, rows))
        dataset = Dataset(summary, tokens, [row.location for row in rows], content)
        require_embeddings(dataset, self.pretrained.model.config, name=self.source)
        return score_tokens(self._data, self._policy, tokens, self._mesh), tokens


def load(
    source: str,
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    data: DataConfig | None = None,
) -> LanguageModel:
    """Open a model: a Hugging Face directory or hub id, a peft adapter, a GGUF file, `embedded:…`, or a run.

    Of a run directory its export is opened, or its adapters where it left no export. `data` says how texts
    become tokens (chat_template, template_kwargs, end_token, max_length); the sources that it names are not
    read.

    Raises:
      ValueError: when there is no such model, or it is of a family that is not read.
    """
    given = at_home(replace(data or DataConfig(max_length=LONGEST), truncation="error"))
    mesh, found = own_mesh(MeshConfig()), model_of(source)
    policy = load_policy(ModelConfig(source=found, compute_dtype=compute_dtype), mesh)
    if data is not None:  # it talks, and ends, as they say; else as `dpo generate` has it
        policy = policy._replace(pretrained=as_trained(policy.pretrained, given))
    return LanguageModel(source, policy, given, mesh)


def implicit_rewards(
    policy: LanguageModel, reference: LanguageModel, rows: Sequence[Mapping[str, Any]], *, beta: float = 0.1
) -> ImplicitRewards:
    """The reward that a policy implies over its reference, of rows as data files have them (docs/data.md).

    Raises:
      ValueError: naming a row that is malformed, or when the two models make different tokens of the rows.
    """
    reading = settle_rows(lambda: map(dict, rows), BY_COLUMNS)
    read = [_read_row(row, f"rows[{i}]", reading) for i, row in enumerate(rows)]
    ours, tokens = policy._score(read)
    theirs, other = reference._score(read)
    if not has_rows_of(other, tokens):
        raise UserError(
            f"{policy.source} and {reference.source} make different tokens of the rows; a log-ratio needs "
            "the same tokenizer and chat template in both (dpo.load(…, data=DataConfig(chat_template=FILE))"
        )
    counts, K = tokens.num_responses, tokens.max_responses
    present = np.arange(K) < counts[:, None]
    policy_logps, reference_logps = (_sums(found, K) for found in (ours, theirs))
    ranks = np.zeros(present.shape, np.int64)
    ranks[present] = np.maximum(tokens.ranks, 0)  # of one response whose neighbours' scores would say it
    rewards = (beta * (policy_logps - reference_logps)).astype(np.float32)
    return ImplicitRewards(rewards, policy_logps, reference_logps, tokens.scored_lengths, present, ranks)


def train(config: Config, *, winrate: str | None = None) -> Any:
    """Everything that `dpo train` does: checks, run, held-out figures, data report, report page, win-rate.

    Returns the run's `RunResult`: `run_dir`, `status` ("finished", "interrupted" or "already finished") and
    `summary`. A run that was interrupted goes on. `winrate` is the judge of `dpo train --winrate`. An
    objective or judge `module:function` is imported: naming it in a program is your word for it.

    Raises:
      ValueError: for what is wrong with settings, data or weights, before the first update; and after
        `training.max_skipped` steps in a row that are not finite.
    """
    from dpo.commands.train import train_and_report

    forget()  # what a run directory named before: these are the program's own words
    word = [f"--objective={term}" for term in (config.objectives or [config.objective])]
    return train_and_report(config, judge=winrate, arguments=[*word, f"--winrate={winrate}"])


def _read_row(row: Mapping[str, Any], where: str, reading: RowReading) -> Preference:
    try:
        return parse_row(dict(row), location=where, source="rows", reading=reading)
    except MalformedRowError as error:
        raise UserError(f"{where}: {error}") from error


def _said(given: Text, where: str) -> Prompt:
    """A text as it is, whatever it looks like, as `generate` takes it; messages as rows have them."""
    return read_text(given, where) if isinstance(given, str) else read_turns(given, where)


def _listed(name: str, given: Sequence[Any]) -> list[Any]:
    if isinstance(given, str):
        raise UserError(f"{name} is one text; allowed is a list of them")
    return list(given)


def _padded(rows: Sequence[np.ndarray], length: int, *, fill: float | int, dtype: Any) -> np.ndarray:
    table = np.full((len(rows), length), fill, dtype)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _sums(found: Sequence[Sequence[np.ndarray]], num_responses: int) -> np.ndarray:
    table = np.zeros((len(found), num_responses), np.float32)
    for row, responses in zip(table, found, strict=True):
        row[: len(responses)] = [np.sum(values, dtype=np.float64) for values in responses]
    return table
