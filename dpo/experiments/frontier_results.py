"""What frontier.json holds, as the types of its JSON objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from dpo.evaluation.figures import Estimate
from dpo.judging.judges import JudgeIdentity


class Drawn(TypedDict):
    """A policy's answers to the held-out prompts at one step, in the order of the prompts."""

    log_ratio: list[float]
    """log policy − log reference of each, in nats."""
    length: list[int]
    """Tokens."""
    texts: list[str]


class Point(TypedDict):
    """A policy at one step."""

    step: int
    reward: Estimate
    kl: Estimate
    """Nats, sampled."""
    length: float
    """Mean tokens of a response."""


class Line(TypedDict):
    """One policy through its training."""

    objective: str
    beta: float
    points: list[Point]


class BestOf(TypedDict):
    """The best of n samples of the reference."""

    n: int
    reward: Estimate
    kl: float
    """A bound, in nats."""


class TemperatureLine(TypedDict):
    """One policy's win-rates by sampling temperature."""

    policy: str
    beta: float | None
    """None of the reference."""
    win_rates: dict[str, Estimate]
    cut: dict[str, float]
    """Which part of the policy's responses was cut off at `max_new_tokens`."""


class FrontierResult(TypedDict):
    """The whole file."""

    settings: Mapping[str, Any]
    """Those of the experiment, by name."""
    reward: JudgeIdentity
    prompts: int
    best_of_n: list[BestOf]
    lines: list[Line]
    temperatures: list[TemperatureLine]
