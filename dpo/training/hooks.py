"""What happens after a step: a list of hooks, called in order, and how often each is.

    hooks = [record, halt, save, every(3, evaluate)]
    for hook in hooks:
        hook(Done(step, batch, metrics, state))

A hook that ends the run raises: `StopRequested` where a stop was asked for, `ValueError` where going on would
be wrong. What waits for the device calls `settle` first, so that a step's line is written and its time is
over before anything else begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dpo.data.batch import Batch
from dpo.parallel.deadline import Deadline
from dpo.training.interrupt import StopRequested
from dpo.training.metrics import Metrics
from dpo.training.record import Record
from dpo.training.saving import Saver
from dpo.training.step import TrainState
from dpo.training.validation import Evaluate


class Done(NamedTuple):
    """A step that was dispatched. The next one donates `state`, so nothing may keep it."""

    step: int
    """Updates so far, with this one."""
    batch: Batch
    metrics: Metrics
    state: TrainState


Hook = Callable[[Done], None]


def every(steps: int | None, hook: Hook) -> Hook:
    """`hook` after each so many steps; never where they are None."""

    def call(done: Done) -> None:
        if is_due(done.step, steps):
            hook(done)

    return call


def before(steps: int, hook: Hook) -> Hook:
    """`hook` after each step before the one that makes so many."""

    def call(done: Done) -> None:
        if done.step < steps:
            hook(done)

    return call


def once(hook: Hook) -> Hook:
    """`hook` after the first step that this process takes."""
    left = [hook]

    def call(done: Done) -> None:
        if left:
            left.pop()(done)

    return call


def is_due(step: int, every: int | None) -> bool:
    """Whether what happens `every` so many steps happens after `step` updates."""
    return every is not None and step % every == 0


def halt_where_asked(stop_requested: Callable[[], bool]) -> Hook:
    """Raise `StopRequested` between two steps."""

    def halt(_: Done) -> None:
        if stop_requested():
            raise StopRequested

    return halt


class Between:
    """What is done between two steps, which waits for the device: saving and evaluating."""

    def __init__(self, record: Record, deadline: Deadline, saver: Saver, evaluate: Evaluate) -> None:
        self._record, self._deadline = record, deadline
        self._saver, self._evaluate = saver, evaluate

    def settle(self) -> None:
        """Wait for the last step, write its line, and let what comes take its time."""
        self._record.flush()
        self._deadline.pause()

    def save(self, done: Done) -> None:
        """A checkpoint, where one is due."""
        if self._saver.due(done.step):
            self.save_now(done)

    def save_now(self, done: Done) -> None:
        """A checkpoint, unless there is one of this step."""
        self.settle()
        self._saver.save(done.step, done.state)

    def evaluate(self, done: Done) -> None:
        """Held-out figures; a checkpoint that they show to be the best is saved, if it was not."""
        self.settle()
        self.judge(done.step, done.state)
        if self._saver.is_best(done.step):
            self.save_now(done)

    def judge(self, step: int, state: TrainState) -> None:
        """Held-out figures after `step` updates, which no step's time has in it."""
        try:
            self._saver.judge(step, self._evaluate(state, step))
        finally:
            self._record.restart_clock()
