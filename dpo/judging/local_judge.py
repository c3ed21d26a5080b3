"""A causal language model as judge: which verdict, A or B, it finds more probable as its reply."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig, MeshConfig, ModelConfig, WinrateConfig
from dpo.data.templates import LIMITS
from dpo.data.tokenization import tokenize_prompts
from dpo.data.tokenized import make_dataset
from dpo.data.tokenizer_calls import encode_texts
from dpo.huggingface.model_names import require_model
from dpo.huggingface.opening import read_model_config
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.judging.judges import (
    LETTERS,
    JudgeIdentity,
    Log,
    LogProbs,
    Question,
    Template,
    Verdict,
    default_template,
)
from dpo.judging.samples import model_identity
from dpo.models.vocabulary import require_known
from dpo.outcomes import UserError
from dpo.parallel.sharding import make_mesh
from dpo.training.datasets import scoring_loader
from dpo.training.policy import Policy, load_policy, make_score

VERDICTS = ("A", "B")


class LocalJudge:
    """Compares log p(A) and log p(B) after the rendered template; nothing is sampled."""

    scores_each: ClassVar[bool] = False

    def __init__(
        self,
        source: str,
        template: Template,
        *,
        identity: str,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        template_kwargs: Mapping[str, Any] | None = None,
        template_characters: int = LIMITS.characters,
    ) -> None:
        """`identity` stands for the weights at `source`, which are loaded with the first question."""
        self._config = ModelConfig(source=source, compute_dtype=compute_dtype)
        self._template, self._weights = template, identity
        self._template_kwargs, self._template_characters = template_kwargs, template_characters

    @property
    def identity(self) -> JudgeIdentity:
        """Weights, dtype and template."""
        identity: JudgeIdentity = {
            "judge": "local",
            "model": self._config.source,
            "weights": self._weights,
            "compute_dtype": self._config.compute_dtype,
            "template": self._template.sha256,
        }
        if self._template_kwargs:
            identity["template_kwargs"] = dict(self._template_kwargs)
        return identity

    def require_usable(self) -> None:
        """See that the tokenizer is there and has a token for each verdict; no weights are read.

        Raises:
          ValueError: where it has not.
        """
        self._find_letters(load_tokenizer(self._config.source))

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts batch by batch; exactly equal log-probs tie, and one that is not a number is invalid.

        Raises:
          ValueError: when the tokenizer does not give A and B one token each.
        """
        mesh = make_mesh(MeshConfig())
        policy = load_policy(self._config, mesh)
        tokenizer = policy.pretrained.tokenizer
        letters = self._find_letters(tokenizer)
        messages = [[{"role": "user", "content": self._template.render(q)}] for q in questions]
        prompts = tokenize_prompts(
            messages,
            tokenizer,
            template_kwargs=self._template_kwargs,
            template_characters=self._template_characters,
        )
        require_known([*prompts, *letters], policy.pretrained.model.config, source=self._config.source)
        for index, (a, b) in score_texts(policy, prompts, [letters] * len(prompts), mesh=mesh):
            yield index, verdict_of_log_probs(float(a), float(b))

    def _find_letters(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        letters = encode_texts(tokenizer, VERDICTS)
        if [len(ids) for ids in letters] != [1, 1] or letters[0] == letters[1]:
            raise UserError(f"{self._config.source}: A and B are the tokens {letters}; needed is one each")
        return letters


def verdict_of_log_probs(a: float, b: float) -> Verdict:
    """The more probable letter wins, equally probable ones tie; one that is not a number makes it invalid."""
    log_probs = LogProbs(A=a, B=b)
    answer = json.dumps(log_probs)
    if math.isnan(a) or math.isnan(b):
        return Verdict(None, answer, "a log-prob is not a number")
    letter = "A" if a > b else "B" if b > a else "C"
    return Verdict(LETTERS[letter], answer, details={"log_probs": log_probs})


def score_texts(
    policy: Policy, prompts: Sequence[list[int]], responses: Sequence[list[list[int]]], *, mesh: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Log-probs of every prompt's responses, with the prompt's index, batch by batch.

    All prompts must have the same number of responses.
    """
    score = make_score(policy, mesh, chunk=512)(policy.params)
    for batch in scoring_loader(DataConfig(), make_dataset(prompts, responses), mesh).batches():
        logps = score(batch)["logps"]
        for place, index in enumerate(np.asarray(batch.index)):
            if index >= 0:
                yield int(index), logps[place]


def sequence_log_probs(
    source: str,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
) -> np.ndarray:
    """Summed log-prob of one response a prompt under the model at `source`."""
    mesh = make_mesh(MeshConfig())
    policy = load_policy(ModelConfig(source=source, compute_dtype=compute_dtype), mesh)
    logps = np.full(len(prompts), np.nan)
    for index, values in score_texts(policy, prompts, [[mine] for mine in responses], mesh=mesh):
        logps[index] = values[0]
    return logps


def open_local(given: WinrateConfig, source: str, log: Log) -> LocalJudge:
    """The judge `local:SOURCE`.

    Raises:
      ValueError: for a directory that is not a causal language model.
    """
    del log
    require_model(source, setting=f"judge {given.judge!r}")
    config = Path(os.path.expanduser(source)) / "config.json"
    if config.is_file():
        architectures = read_model_config(config).get("architectures") or []
        if any(name.endswith("ForSequenceClassification") for name in architectures):
            raise UserError(
                f"judge {given.judge!r}: {architectures[0]} is a reward model; allowed here are causal "
                f"language models (a reward model is the judge reward_model:{source})"
            )
    characters = given.template_characters or LIMITS.characters
    template = Template(given.template or default_template("local"), characters=characters)
    identity = model_identity(source)
    return LocalJudge(
        source,
        template,
        identity=identity,
        compute_dtype=given.compute_dtype,
        template_kwargs=given.judge_template_kwargs,
        template_characters=characters,
    )
