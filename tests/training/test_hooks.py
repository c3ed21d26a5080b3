"""Hooks are called when they are due, and a checkpoint comes before the evaluation at its step."""

from unittest.mock import Mock, create_autospec

import pytest

from dpo.data.batch import Batch
from dpo.parallel.deadline import Deadline
from dpo.training.hooks import Between, Done, before, every, halt_where_asked, once
from dpo.training.interrupt import StopRequested
from dpo.training.record import Record
from dpo.training.saving import Saver
from dpo.training.step import TrainState


def done(step):
    return Done(step, create_autospec(Batch, instance=True), {}, create_autospec(TrainState, instance=True))


def steps_called(hook_of, steps):
    called = []
    hook = hook_of(lambda done: called.append(done.step))
    for step in steps:
        hook(done(step))
    return called


def test_hooks_are_called_when_they_are_due():
    assert steps_called(lambda hook: every(3, hook), range(1, 8)) == [3, 6]
    assert steps_called(lambda hook: every(None, hook), range(1, 8)) == []
    assert steps_called(lambda hook: before(3, hook), range(1, 8)) == [1, 2]
    assert steps_called(once, range(4, 8)) == [4]


def test_a_stop_is_asked_for_once_a_step():
    asked = iter([False, True])
    halt = halt_where_asked(lambda: next(asked))
    halt(done(1))
    with pytest.raises(StopRequested):
        halt(done(2))


@pytest.mark.parametrize(
    ("due", "best", "expected"),
    [
        (False, False, ["evaluate", "judge"]),
        (True, False, ["save", "evaluate", "judge"]),
        (False, True, ["evaluate", "judge", "save"]),
    ],
)
def test_a_checkpoint_comes_before_the_evaluation_at_its_step(due, best, expected):
    """A run that is killed while it evaluates has lost no step. Only a new best is known afterwards."""
    told = Mock()
    told.saver.due.return_value, told.saver.is_best.return_value = due, best
    told.evaluate.return_value = {}
    parts = {"record": Record, "deadline": Deadline, "saver": Saver}
    for name, kind in parts.items():
        double = create_autospec(kind, instance=True)
        for method in ("flush", "restart_clock", "pause", "due", "is_best", "save", "judge"):
            if hasattr(kind, method):
                setattr(double, method, getattr(getattr(told, name), method))
        parts[name] = double
    between = Between(parts["record"], parts["deadline"], parts["saver"], told.evaluate)
    for hook in (between.save, between.evaluate):
        hook(done(2))
    called = [call[0].rpartition(".")[2] for call in told.mock_calls]
    assert [name for name in called if name in ("save", "evaluate", "judge")] == expected
    first = called.index(expected[0])
    assert {"flush", "pause"} <= set(called[:first]), "the step's line is written, and no deadline runs"
