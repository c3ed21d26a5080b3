"""What a run's metrics say about its health: pure functions of the lines that were written already.

Each looks at the first and at the latest training steps and answers in one sentence, or with None. They run
on the host on numbers that it has read anyway, so they cost the device nothing. A warning never stops a run;
docs/troubleshooting.md has the causes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

START = 50
"""How many of a run's first training steps are kept for comparison."""
RECENT = 100
"""How many of a run's latest training steps are looked at."""
REPEAT = 500
"""Steps after which a warning that still holds is given again."""
GUIDE = "docs/troubleshooting.md"

SPIKE_HISTORY = 20
"""Steps that have to come before a loss that is called a spike."""
SPIKE_SPREADS = 12.0
"""Distance of a spike from the median loss, in standard deviations of the losses before it."""
SPIKE_LEAST = 1.0
"""Least distance of a spike from the median loss, in multiples of that loss (at least of ln 2)."""
STUCK_AFTER = 100
"""Steps after which a loss may be called stuck."""
STUCK_MARGIN = 0.01
"""Largest mean margin, in rewards (β times nats), of a loss that is called stuck."""
STUCK_LOSS = 0.005
"""Largest change of the mean loss since the start, as a part of it, of a loss that is called stuck."""
ZERO_STEPS = 3
"""Steps in a row without a gradient that are warned of."""
ZERO_GRADIENT = 1e-10
"""Largest global norm of a gradient that counts as none."""
COLLAPSE_STEPS = 20
"""Steps over which the chosen responses' log-ratio is averaged."""
COLLAPSE_NATS = 1.0
"""Nats a token that chosen responses may lose against the reference, on average."""
DRIFT_STEPS = 50
"""Steps at the start of the run, and at its end, whose lengths are compared."""
DRIFT_RATIO = 1.5
"""Ratio of the mean lengths then and now, in either direction, that is warned of."""

Line = Mapping[str, int | float]
"""The metrics of one training step."""


class History(NamedTuple):
    """Training steps that were not skipped, oldest first."""

    start: Sequence[Line]
    """The first ones of the run, at most `START`."""
    recent: Sequence[Line]
    """The latest, at most `RECENT`."""


def loss_spike(history: History) -> str | None:
    """The last loss is far above the ones before it: many times their spread, and more than a little."""
    losses = _values(history.recent, "loss")
    if len(losses) <= SPIKE_HISTORY:
        return None
    before, last = losses[:-1], losses[-1]
    usual = float(np.median(before))
    spread = 1.4826 * float(np.median(np.abs(before - usual)))  # σ of a normal distribution
    if last - usual <= max(SPIKE_SPREADS * spread, SPIKE_LEAST * max(abs(usual), math.log(2))):
        return None
    return (
        f"the loss jumped to {last:.3g}, from a median of {usual:.3g} (spread {spread:.2g}) over "
        f"{len(before)} steps: a learning rate that is too high, or rows unlike the others"
    )


def loss_stuck(history: History) -> str | None:
    """After many steps the loss still is what it was before the first: ln 2 for pairs. Nothing is learnt."""
    if len(history.recent) < STUCK_AFTER:
        return None
    first = float(_values(history.start, "loss")[:5].mean())
    loss = float(_values(history.recent, "loss")[-STUCK_AFTER // 2 :].mean())
    margins = _values(history.recent[-STUCK_AFTER // 2 :], "rewards/margins")
    margin = float(margins.mean()) if margins.size else 0.0
    moved = abs(loss - first) > STUCK_LOSS * max(1.0, abs(first))
    if moved or abs(margin) > STUCK_MARGIN:
        return None
    return (
        f"the loss is {loss:.4f} and was {first:.4f} at the start (ln 2 = 0.6931 is the loss of a pair "
        f"without any preference), the margin {margin:.2g}: a learning rate that is too low, or responses "
        "that do not differ"
    )


def zero_gradient(history: History) -> str | None:
    """Several steps in a row had no gradient at all."""
    norms = _values(history.recent, "grad_norm")[-ZERO_STEPS:]
    if len(norms) < ZERO_STEPS or (norms > ZERO_GRADIENT).any():
        return None
    return (
        f"the gradient was zero for {ZERO_STEPS} steps: the objective is saturated (a strength that is too "
        "high, margins beyond what float32 tells from one), or nothing is trained"
    )


def chosen_collapse(beta: float) -> Callable[[History], str | None]:
    """A watchdog for chosen responses that have become much less likely than under the reference.

    rewards/chosen is β times the log-ratio, so that over β and the length it is nats a token.
    """

    def watch(history: History) -> str | None:
        recent = [line for line in history.recent if "rewards/chosen" in line][-COLLAPSE_STEPS:]
        if len(recent) < COLLAPSE_STEPS:
            return None
        lengths = np.maximum(_values(recent, "lengths/chosen"), 1)
        nats = float((_values(recent, "rewards/chosen") / beta / lengths).mean())
        if nats > -COLLAPSE_NATS:
            return None
        return (
            f"chosen responses have lost {-nats:.2f} nats a token against the reference over the last "
            f"{COLLAPSE_STEPS} steps: a learning rate that is too high, a strength (beta) that is too low, "
            "or chosen and rejected responses that are nearly alike"
        )

    return watch


def length_drift(history: History) -> str | None:
    """Responses are much longer or shorter now than at the start: the data is not well mixed."""
    start, recent = history.start[:DRIFT_STEPS], history.recent[-DRIFT_STEPS:]
    if len(history.recent) < RECENT or len(start) < DRIFT_STEPS:
        return None
    sides = [
        side
        for side in ("chosen", "rejected")
        if all(_values(part, f"lengths/{side}").size for part in (start, recent))
    ]
    then, now = (
        sum(float(_values(part, f"lengths/{side}").mean()) for side in sides) for part in (start, recent)
    )
    if min(then, now) <= 0 or 1 / DRIFT_RATIO < now / then < DRIFT_RATIO:
        return None
    return (
        f"chosen and rejected responses have {now:.0f} tokens together over the last {DRIFT_STEPS} steps and "
        f"had {then:.0f} over the first: data sorted by length, or by source, and not shuffled"
    )


def watchdogs(beta: float) -> dict[str, Callable[[History], str | None]]:
    """All watchdogs, by the name of their section in docs/troubleshooting.md."""
    return {
        "loss-spike": loss_spike,
        "loss-stuck": loss_stuck,
        "zero-gradient": zero_gradient,
        "chosen-collapse": chosen_collapse(beta),
        "length-drift": length_drift,
    }


class Watch:
    """Feeds the lines of a run to the watchdogs, and gives each warning once in a while."""

    def __init__(self, beta: float, earlier: Iterable[Line] = ()):
        """`earlier`: the training lines of the parts of the run before this one."""
        self._watchdogs = watchdogs(beta)
        self._start: list[Line] = []
        self._recent: deque[Line] = deque(maxlen=RECENT)
        self._warned: dict[str, float] = {}
        for line in earlier:
            self._remember(line)

    def add(self, step: int, line: Line) -> list[str]:
        """Warnings after one more training step."""
        if not self._remember(line):
            return []
        history = History(self._start, list(self._recent))
        found = []
        for name, watchdog in self._watchdogs.items():
            quiet = step - self._warned.get(name, -math.inf) < REPEAT
            text = None if quiet else watchdog(history)
            if text is not None:
                self._warned[name] = step
                found.append(f"warning, step {step}: {text} ({GUIDE}#{name})")
        return found

    def _remember(self, line: Line) -> bool:
        if line.get("skipped", 0.0):
            return False
        if len(self._start) < START:
            self._start.append(line)
        self._recent.append(line)
        return True


def _values(lines: Sequence[Line], name: str) -> np.ndarray:
    """Of the lines that have it: a batch of labelled responses may have no chosen one, and has no pair."""
    return np.asarray([line[name] for line in lines if name in line], np.float64)
