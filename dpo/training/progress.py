"""What is shown of a run while it goes on: a live bar, plain lines, or nothing."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dpo import terminal
from dpo.parallel.distributed import is_main

MARGIN = "rewards/margins"
MARGIN_DIGITS = 5
"""Decimals of a margin that are shown: log-probs of some hundred nats in float32 are rounded about there,
so that the margin of a first step, where policy and reference are equal, is shown as the 0 that it means."""
SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    MARGIN: "margin",
    "tokens/s": "tokens/s",
}
"""Metrics in the live progress, with the words they go by there."""
PLAIN_INTERVAL = 10.0
"""Seconds between plain progress lines, where there is no terminal."""


def say(text: str) -> None:
    """Print a line before there is anything to track; of several processes the main one speaks."""
    if is_main():
        terminal.print_plain(text)


class TimeLeft:
    """Time left, from the median of the last steps, which compilation does not disturb.

    Of a few steps any may have compiled a program, so that the shortest of them says more than the median.
    """

    FEW = 6

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._durations: deque[float] = deque(maxlen=20)

    def after(self, step: int) -> str:
        """Call once a training step; h:mm:ss, or nothing before three steps were seen."""
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            self._durations.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        if len(self._durations) < 2:
            return ""
        typical = min if len(self._durations) < self.FEW else statistics.median
        return time_left(typical(self._durations) * max(self._total - step - 1, 0))


def time_left(seconds: float) -> str:
    """As h:mm:ss left."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02} left"


class Terminal:
    """A live bar with time left, loss, accuracy, margin and tokens/s."""

    def __init__(
        self, console: Console, *, total_steps: int, first_step: int, clock: Callable[[], float]
    ) -> None:
        self._time_left = TimeLeft(total_steps, clock)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, shown="", left="")
        self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if not _is_training(metrics):
            return self.message(_heldout_line(step, metrics))
        left = self._time_left.after(step)
        self._bar.update(self._task, completed=step + 1, shown=_shown(metrics), left=left)

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class PlainLines:
    """For logs and pipes: the first step, the last, and one line every few seconds between."""

    def __init__(
        self, console: Console, *, total_steps: int, first_step: int, clock: Callable[[], float]
    ) -> None:
        self._console = console
        self._total = total_steps
        self._time_left = TimeLeft(total_steps, clock)
        self._clock = clock
        self._printed = -math.inf

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if not _is_training(metrics):
            return self.message(_heldout_line(step, metrics))
        left = self._time_left.after(step)
        if step + 1 < self._total and self._clock() - self._printed < PLAIN_INTERVAL:
            return None
        self._printed = self._clock()
        self.message(f"step {step + 1}/{self._total}  {_shown(metrics)}  {left}".rstrip())

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Silence:
    """For processes whose main process speaks."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _is_training(metrics: Mapping[str, int | float]) -> bool:
    return "loss" in metrics


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{word} {_figure(name, metrics[name])}" for name, word in SHOWN.items() if name in metrics
    )


def _figure(name: str, value: float) -> str:
    return f"{round(value, MARGIN_DIGITS) + 0.0 if name == MARGIN else value:.4g}"  # + 0.0: no -0


def _heldout_line(step: int, metrics: Mapping[str, float]) -> str:
    """Held-out figures in the words of the training lines; others by their own names."""
    named = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    shown = SHOWN if "rewards/accuracies" in named else named
    figures = "  ".join(
        f"{SHOWN.get(name, name)} {_figure(name, named[name])}" for name in named if name in shown
    )
    return f"held out after {step} steps: {figures}"
