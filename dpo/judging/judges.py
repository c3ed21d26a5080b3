"""Who says which of two responses is better: the question, the verdict, and judges that need no model.

A judge sees a prompt and two responses, called first and second, and knows nothing of who wrote them. Judges
that read text are asked with a prompt template, a jinja2 file that the user can replace; its hash is part of
the judge's identity, so that verdicts given under another template are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Required,
    TypedDict,
    final,
    runtime_checkable,
)

from dpo.config import WinrateConfig
from dpo.data.messages import response_text
from dpo.data.templates import LIMITS, SandboxedTemplate, read_template
from dpo.judging.rewards import REWARDS, Prompt, Reward
from dpo.outcomes import UserError
from dpo.own_code import fingerprint_code, import_function
from dpo.typed_json import Length

Log = Callable[[str], None]
Choice = Literal["first", "second", "tie"]
LETTERS: dict[str, Choice] = {"A": "first", "B": "second", "C": "tie"}
"""What a judge that reads text calls the two responses, and a tie."""


class Question(NamedTuple):
    """Two responses to one prompt."""

    prompt: Prompt
    first: str
    second: str


@final
class Rewarded(TypedDict):
    """Behind a reward's answer."""

    rewards: Annotated[list[float], Length(2)]
    """Of the first response and of the second."""


class LogProbs(TypedDict):
    """Of the letters that a local judge answers with."""

    A: float
    B: float


@final
class Preferred(TypedDict):
    """Behind a local judge's answer."""

    log_probs: LogProbs


@final
class Counted(TypedDict):
    """Behind an endpoint's answer: tokens as it counts them, 0 where it reports none."""

    cached: bool
    prompt_tokens: int
    completion_tokens: int


@final
class Identical(TypedDict):
    """Behind a tie about which nobody was asked, since there was nothing to compare."""

    identical: bool


VerdictDetails = Rewarded | Preferred | Counted | Identical
"""What is behind an answer."""


class JudgeIdentity(TypedDict, total=False):
    """All that a judge's verdicts depend on besides the question: of each kind of judge some of it."""

    judge: Required[str]
    """The kind."""
    reward: str
    version: str
    """Hash of the file that a reward function stands in."""
    control: str
    url: str
    model: str | None
    options: dict[str, object]
    """An endpoint's."""
    weights: str
    compute_dtype: str
    template: str
    """Hash of the prompt template."""
    template_kwargs: dict[str, object]


class Verdict(NamedTuple):
    """What a judge said."""

    choice: Choice | None
    """None: invalid, for the reason in `problem`."""
    answer: str
    """The answer as the judge gave it."""
    problem: str | None = None
    was_asked: bool = True
    """False: no answer could be had, and a later run asks again."""
    details: VerdictDetails | None = None
    """What is behind the answer."""


@runtime_checkable
class Judge(Protocol):
    """Anything that gives verdicts."""

    scores_each: ClassVar[bool]
    """Whether it scores each response by itself: it is asked about identical ones too, for the means."""

    @property
    def identity(self) -> JudgeIdentity:
        """All that its verdicts depend on besides the question."""
        ...

    def require_usable(self) -> None:
        """See what can be seen of it, before responses are sampled for it to judge.

        Raises:
          UserError: for a judge that can give no verdict.
          EnvironmentFailure: for one that is out of reach.
        """
        ...

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """The verdict on each question with its index, in any order, as soon as it is there."""
        ...


@dataclass(frozen=True)
class RewardJudge:
    """Prefers the response with the higher reward; equal rewards tie."""

    name: str
    reward: Reward
    version: str
    scores_each: ClassVar[bool] = True

    @property
    def identity(self) -> JudgeIdentity:
        """The function's name, and the hash of the file that it stands in."""
        return {"judge": "reward", "reward": self.name, "version": self.version}

    def require_usable(self) -> None:
        """The function is there, or the judge were not."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts in order; a reward that is not a finite number makes its verdict invalid."""
        for index, (prompt, first, second) in enumerate(questions):
            yield index, verdict_of_rewards(self.score(prompt, first), self.score(prompt, second))

    def score(self, prompt: Prompt, response: str) -> float:
        """The reward of one response, which may be nan or infinite.

        Raises:
          ValueError: where the function gives something that is no number.
        """
        value = self.reward(prompt, response)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward {self.name} gave {value!r} for the response {response[:80]!r}; allowed is a number"
            ) from error


def verdict_of_rewards(first: float, second: float) -> Verdict:
    """The higher reward wins, equal ones tie; one that is not a finite number makes the verdict invalid."""
    answer = json.dumps([first, second])
    if not (math.isfinite(first) and math.isfinite(second)):
        return Verdict(None, answer, "a reward is not a finite number")
    choice: Choice = "tie" if first == second else "first" if first > second else "second"
    return Verdict(choice, answer, details={"rewards": [first, second]})


@dataclass(frozen=True)
class ControlJudge:
    """A judge with a known fault; the figures of `dpo winrate` have to expose it."""

    name: str
    scores_each: ClassVar[bool] = False

    @property
    def identity(self) -> JudgeIdentity:
        """Its name in CONTROLS."""
        return {"judge": "control", "control": self.name}

    def require_usable(self) -> None:
        """It always is."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts in order."""
        for index, question in enumerate(questions):
            choice = CONTROLS[self.name](question)
            yield index, Verdict(choice, choice)


def _prefer_first(question: Question) -> Choice:
    return "first"


def _prefer_longer(question: Question) -> Choice:
    first, second = len(question.first), len(question.second)
    return "first" if first > second else "second" if second > first else "tie"


CONTROLS: dict[str, Callable[[Question], Choice]] = {"first": _prefer_first, "longer": _prefer_longer}
"""`first` decides by position alone: every pair flips. `longer` decides by length alone."""


def open_control(given: WinrateConfig, source: str, log: Log) -> ControlJudge:
    """The control that `--judge` names."""
    del source, log
    assert given.judge is not None
    return ControlJudge(given.judge)


def open_reward(given: WinrateConfig, source: str, log: Log) -> RewardJudge:
    """The reward that `--judge` names."""
    del source, log
    assert given.judge is not None
    return reward_judge(given.judge, setting="judge")


def reward_judge(name: str, *, setting: str) -> RewardJudge:
    """The judge of a reward in REWARDS, or of any importable function as `module:function`.

    Raises:
      ValueError: when there is no such reward, module or function.
    """
    if name not in REWARDS and ":" not in name:
        raise UserError(f"{setting} is {name!r}; allowed: {', '.join([*REWARDS, 'module:function'])}")
    reward: Reward = REWARDS.get(name) or import_function(name, setting=setting)
    return RewardJudge(name, reward, fingerprint_code(reward))


class Template:
    """A jinja2 file that turns a question into the message that a judge reads.

    It sees `messages` (the conversation, each with role and content), `first` and `second`, and `mark`, a
    word that stands in none of them: what is drawn with it, no response can close. What responses contain
    is put in as text and never run as a template.
    """

    def __init__(self, path: str | Path, *, characters: int = LIMITS.characters) -> None:
        text = read_template(path, name="template")
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        try:
            limits = LIMITS._replace(characters=characters)
            what = f"template {path}"
            self._template = SandboxedTemplate(
                text, name=what, dialect="judge", limits=limits, setting="template_characters"
            )
            self.render(Question("?", "one", "two"))
        except ValueError as error:
            raise UserError(f"{error}; it may use messages, first, second and mark") from error

    def render(self, question: Question) -> str:
        """The message for one question."""
        messages = as_messages(question.prompt)
        variables = {"messages": messages, "first": question.first, "second": question.second}
        return self._template.render({**variables, "mark": draw_mark(question)})


def draw_mark(question: Question) -> str:
    """A word of 16 hexadecimal digits that does not stand in the question.

    It is drawn from the question itself, the same in both orders: so a question that was paid for is known
    again, and yet no response can hold its own mark.
    """
    texts = [json.dumps(question.prompt), *sorted([question.first, question.second])]
    mark = json.dumps(texts)
    while (mark := hashlib.sha256(mark.encode()).hexdigest()[:16]) in "\n".join(texts):
        pass
    return mark


def default_template(kind: Literal["endpoint", "local"]) -> Path:
    """The template that is used when none is given."""
    return Path(__file__).with_name(f"judge_{kind}.jinja")


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as the messages of a conversation."""
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return [{"role": turn["role"], "content": response_text((turn,))} for turn in turns]
