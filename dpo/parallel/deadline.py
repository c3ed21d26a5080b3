"""Steps that hang: a watch beside the run ends the process, and says where every thread was."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress

import jax

from dpo.outcomes import HANG, NO_PROGRESS, Outcome

_GOES_ON = "the same command goes on from the newest checkpoint"
_TWICE = "an earlier start ended so too, with nothing saved since; allowed is a longer one"
COMPILE_SECONDS = 1800.0
"""What a step of a new shape may take longer, since it is compiled."""


class Deadline:
    """Ends the process when a step takes too long, and says where every thread was."""

    def __init__(self, timeout: float | None, *, fruitless: Callable[[], bool] = lambda: False):
        """`timeout` in seconds; None never ends anything.

        `fruitless` says whether an earlier start has ended so too, with nothing saved since: another would
        not help then, and the process does not end as one that goes on.
        """
        self._timeout, self._fruitless = timeout, fruitless
        self._seen: set[Hashable] = set()
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    def __enter__(self) -> Deadline:
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def step(self, shape: Hashable) -> None:
        """A step begins; one of a new shape may take `COMPILE_SECONDS` longer."""
        if self._timeout is not None:
            extra = 0.0 if shape in self._seen else COMPILE_SECONDS
            self._seen.add(shape)
            self._set(time.monotonic() + self._timeout + extra)

    def pause(self) -> None:
        """What comes now may take as long as it likes."""
        self._set(None)

    def _set(self, deadline: float | None) -> None:
        with self._changed:
            self._deadline = deadline
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if self._ended:
                return
        outcome = self._outcome()
        try:
            advice = {HANG: _GOES_ON, NO_PROGRESS: _TWICE}[outcome]
            text = (
                f"dpo train: {outcome.begins}: process {jax.process_index()} of {jax.process_count()}: a "
                f"step took longer than {self._timeout:g} s (distributed.step_timeout). Another process may "
                f"hang or have gone; {advice}. Stacks of all threads:\n"
            )
            with suppress(OSError):  # nobody may be reading any more
                os.write(2, text.encode())
            faulthandler.dump_traceback(2, all_threads=True)
        finally:
            os._exit(outcome.code)

    def _outcome(self) -> Outcome:
        """By which the process ends; as one that goes on where nothing can be written down of starts."""
        try:
            return NO_PROGRESS if self._fruitless() else HANG
        except OSError:
            return HANG
