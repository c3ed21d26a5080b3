"""What `winrate.json` and `verdicts.jsonl` hold, as the types of their JSON objects."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from dpo.judging.judges import Choice, JudgeIdentity, VerdictDetails
from dpo.typed_json import Length

Estimate = Annotated[list[float], Length(3)]
"""[estimate, low, high] of a 95% interval."""


class JudgeFigures(TypedDict):
    """How far a judge decides by position or by length; None where it had no chance to show it."""

    says_first: float | None
    flips: float | None
    agrees_with_longer: float | None


class ControlledFigures(TypedDict):
    """The win-rate at equal lengths, and the fitted model behind it (`length_control`)."""

    win_rate: Estimate
    quality: float
    length: float
    policy_longer: float


class Lengths(TypedDict):
    """Mean characters of a response."""

    policy: float
    opponent: float


class CutFigures(TypedDict):
    """Which part of each side's responses was cut off, of all that were sampled."""

    at: int | None
    """Tokens of the longest response."""
    policy: float
    opponent: float | None
    """None where the opponent is the data."""
    pairs_left_out: int


class WinrateFigures(TypedDict):
    """All figures of one temperature."""

    pairs: int
    prompts: int
    wins: int
    ties: int
    losses: int
    ties_flipped: int
    ties_identical: int
    invalid: int
    win_rate: Estimate
    win_rate_if_invalid: Annotated[list[float], Length(2)]
    """With all invalid pairs lost, and won."""
    sign_test: float
    prompts_needed: int | None
    length_controlled: ControlledFigures | None
    mean_length: Lengths
    judge: JudgeFigures
    win_rate_wilson: NotRequired[Estimate]
    """Where every prompt has one pair."""
    verdicts: NotRequired[list[Annotated[list[str], Length(2)]]]
    """Keys in verdicts.jsonl of each pair's two verdicts."""
    reward: NotRequired[dict[str, Estimate]]
    log_ratio: NotRequired[dict[str, Estimate]]
    cut: NotRequired[CutFigures]
    """Results of versions before this was counted have none."""


class Usage(TypedDict):
    """Tokens behind the verdicts of a paid judge, and their cost."""

    answers: int
    from_cache: int
    unreported: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class MatchResult(TypedDict):
    """The whole of winrate.json."""

    policy: str
    policy_files: NotRequired[str | None]
    """`listed_files` of the policy; versions before did not say."""
    opponent: str
    data: list[Any] | str | None
    judge: JudgeIdentity
    settings: dict[str, Any]
    """Those of RESULT_SETTINGS and `read_as`, by name, as they were used."""
    temperatures: dict[str, WinrateFigures]
    usage: NotRequired[Usage]


class AskedLine(TypedDict):
    """A line of verdicts.jsonl without its verdict."""

    key: str
    order: str
    prompt: Any
    policy: str
    opponent: str
    temperature: float
    number: int
    judge: JudgeIdentity


class VerdictLine(AskedLine):
    """A line of verdicts.jsonl."""

    winner: str | None
    choice: Choice | None
    answer: str
    problem: str | None
    was_asked: bool
    details: VerdictDetails | None
