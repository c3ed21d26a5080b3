"""Signals that ask a run to stop: the first is answered at the next step boundary, the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from dpo.outcomes import STOPPED_AT_ONCE, StopRequested

Given = TypeVar("Given")
Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks for a stop: Ctrl-C, a launcher, a terminal or connection that has gone."""
SAME_REQUEST = 0.3
"""Seconds within which further signals count as the first: launchers deliver one request twice."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """While inside, `SIGNALS` make the given function return True; a second one ends the process.

    The second is answered by a thread that the signal itself wakes: it waits for no computation, and it works
    for the first process of a container, for which the kernel ignores a signal's default action. Ending
    harms nothing that was written, because everything gets its name only when it is whole.
    """
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_end_at_the_second, args=(reader,), name="signals", daemon=True)
    previous = {number: signal.signal(number, request) for number in _answered()}
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield lambda: requested
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def stop_at_once() -> None:
    """From here on, wherever there is nothing to save, `SIGNALS` raise `StopRequested`; a second one ends."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _answered():
            signal.signal(other, lambda *_: os._exit(STOPPED_AT_ONCE.code))
        raise StopRequested("nothing was being saved; the same command goes on from what was")

    for number in _answered():
        signal.signal(number, stop)


def _answered() -> tuple[signal.Signals, ...]:
    """All of them, but for SIGHUP where it is ignored already, as `nohup` has it."""
    hangup = signal.SIGHUP
    return tuple(n for n in SIGNALS if n is not hangup or signal.getsignal(n) is not signal.SIG_IGN)


def stoppable(
    function: Callable[[Given], Result], stop_requested: Callable[[], bool]
) -> Callable[[Given], Result]:
    """The same function, which raises `StopRequested` instead of beginning once a stop was asked for."""

    def begin(given: Given) -> Result:
        if stop_requested():
            raise StopRequested
        return function(given)

    return begin


def _end_at_the_second(reader: int) -> None:
    """Read the numbers of arriving signals until the pipe is closed, or end the process."""
    first: float | None = None
    while received := os.read(reader, 1):
        if received[0] not in SIGNALS:
            continue
        now = time.monotonic()
        first = now if first is None else first
        if now - first > SAME_REQUEST:
            name = signal.Signals(received[0]).name
            with suppress(OSError):  # nobody may be reading any more
                os.write(2, f"stopped at once by a second signal ({name}); whole checkpoints stay\n".encode())
            os._exit(STOPPED_AT_ONCE.code)
