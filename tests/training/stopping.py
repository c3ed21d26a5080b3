"""A run that is asked to stop at a given step."""

import itertools
import os
import signal

from dpo.training import program


def stop_after(num_steps, monkeypatch):
    """SIGTERM arrives in the step of that number, counted over all runs of the test."""
    make_train_step, numbers = program.make_train_step, itertools.count(1)

    def make(*args, **kwargs):
        train_step = make_train_step(*args, **kwargs)

        def step(*args):
            if next(numbers) == num_steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args)

        step.lower = train_step.lower  # pyright: ignore[reportFunctionMemberAccess] (training.memory_limit)
        return step

    monkeypatch.setattr(program, "make_train_step", make)
