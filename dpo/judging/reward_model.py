"""A reward model as judge: a sequence classifier with one label, through our own decoders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from dpo.config import WinrateConfig
from dpo.data.templates import LIMITS
from dpo.data.tokenization import tokenize_answers
from dpo.huggingface.model_names import require_model
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import count_labels, load_classifier
from dpo.judging.judges import JudgeIdentity, Log, Question, Verdict, verdict_of_rewards
from dpo.judging.samples import model_identity
from dpo.models.classifier import classify
from dpo.models.vocabulary import require_known
from dpo.outcomes import UserError


class RewardModelJudge:
    """Prefers the response whose conversation, chat template applied, has the higher score."""

    scores_each: ClassVar[bool] = True

    def __init__(
        self,
        source: str,
        *,
        identity: str,
        compute_dtype: str = "float32",
        batch_size: int = 16,
        template_kwargs: Mapping[str, Any] | None = None,
        template_characters: int = LIMITS.characters,
    ) -> None:
        """`identity` stands for the weights at `source`, which are loaded with the first question.

        Raises:
          ValueError: for a classifier that does not have one label.
        """
        labels = count_labels(open_checkpoint(source))
        if labels != 1:
            raise UserError(
                f"judge reward_model:{source}: the model has {labels} labels; a reward model has 1"
            )
        self._source, self._weights = source, identity
        self._compute_dtype, self._batch_size = compute_dtype, batch_size
        self._template_kwargs, self._template_characters = template_kwargs, template_characters

    @property
    def identity(self) -> JudgeIdentity:
        """Weights (tokenizer and chat template among them) and dtype."""
        identity: JudgeIdentity = {
            "judge": "reward_model",
            "model": self._source,
            "weights": self._weights,
            "compute_dtype": self._compute_dtype,
        }
        if self._template_kwargs:
            identity["template_kwargs"] = dict(self._template_kwargs)
        return identity

    def require_usable(self) -> None:
        """See that the tokenizer is there; the configuration was.

        Raises:
          ValueError: where it is not, or is damaged.
        """
        open_checkpoint(self._source).tokenizer()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """A verdict as soon as both rewards are there; a text that stands in several questions is read once.

        Raises:
          ValueError: where the chat template refuses a conversation, or a text is too long for the model.
        """
        place: dict[str, int] = {}
        pairs: list[list[int]] = []
        for prompt, *responses in questions:
            keys = [json.dumps([prompt, response]) for response in responses]
            pairs.append([place.setdefault(key, len(place)) for key in keys])
        waiting: dict[int, list[int]] = {i: [] for i in place.values()}
        for number, pair in enumerate(pairs):
            for i in set(pair):
                waiting[i].append(number)
        rewards: dict[int, float] = {}
        prompts, responses = zip(*map(json.loads, place), strict=True) if place else ((), ())
        for i, reward in self._score(prompts, responses):
            rewards[i] = reward
            for number in waiting[i]:
                first, second = pairs[number]
                if first in rewards and second in rewards:
                    yield number, verdict_of_rewards(rewards[first], rewards[second])

    def _score(
        self, prompts: Sequence[str | Sequence[Mapping[str, str]]], responses: Sequence[str]
    ) -> Iterator[tuple[int, float]]:
        checkpoint = open_checkpoint(self._source)
        model = load_classifier(checkpoint, compute_dtype=jnp.dtype(self._compute_dtype))
        sequences = tokenize_answers(
            prompts,
            responses,
            checkpoint.tokenizer(),
            template_kwargs=self._template_kwargs,
            template_characters=self._template_characters,
        )
        require_known(sequences, model.config, source=self._source)
        scored = classify(model, sequences, batch_size=self._batch_size)
        yield from ((i, float(logits[0])) for i, logits in scored)


def open_reward_model(given: WinrateConfig, source: str, log: Log) -> RewardModelJudge:
    """The judge `reward_model:SOURCE`."""
    del log
    require_model(source, setting=f"judge {given.judge!r}")
    path = Path(source).expanduser()
    source = str(path) if path.exists() else source
    return RewardModelJudge(
        source,
        identity=model_identity(source),
        compute_dtype=given.compute_dtype,
        template_kwargs=given.judge_template_kwargs,
        template_characters=given.template_characters or LIMITS.characters,
    )
