"""Signals that ask a run to stop: the first is answered at the next step boundary, the second at once."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from dpo.outcomes import STOPPED_AT_ONCE, StopRequested, command_given, outcome_of

Given = TypeVar("Given")
Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks for a stop: Ctrl-C, a launcher, a terminal or connection that has gone."""
SAME_REQUEST = 0.3
"""Seconds within which further signals count as the first: launchers deliver one request twice."""
SOON = 5.0
"""Seconds after which a process that has nothing to save ends whatever it does."""
NOTHING_LOST = "nothing was being saved; the same command goes on from what was"


@contextmanager
def stop_requests(*, last: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """While inside, `SIGNALS` make the given function return True; a second one ends the process.

    `last` is what is done before it ends, as ending processes that this one has started.

    The second is answered by a thread that the signal itself wakes: it waits for no computation, and it works
    for the first process of a container, for which the kernel ignores a signal's default action. Ending
    harms nothing that was written, because everything gets its name only when it is whole.
    """
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    with _answering(request, partial(_end_at_the_second, last)):
        yield lambda: requested


@contextmanager
def stops_at_once() -> Iterator[None]:
    """While inside, where there is nothing to save, `SIGNALS` raise `StopRequested`; a second one ends."""
    with _raising(lambda number: StopRequested(NOTHING_LOST), unless_ignored=(signal.SIGHUP,)):
        yield


@contextmanager
def ends_at_once() -> Iterator[None]:
    """While inside, in a command that another start begins anew, `SIGNALS` raise `KeyboardInterrupt`.

    Where one is ignored, as Ctrl-C in a command that a script began in the background, it stays so.
    """
    with _raising(_as_interrupt, unless_ignored=SIGNALS):
        yield


def _as_interrupt(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")


@contextmanager
def _raising(
    error_of: Callable[[int], KeyboardInterrupt], *, unless_ignored: Collection[signal.Signals]
) -> Iterator[None]:
    """The first signal raises its error in the main thread; during an import it ends the process by it.

    Where no exception comes through, as in a long compilation, the process ends by itself `SOON` after the
    first.
    """
    requested = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if not requested:
            requested = True
            if is_importing(frame):
                _leave_by(error_of(number))
            raise error_of(number)

    with _answering(stop, partial(_end_soon, error_of), unless_ignored=unless_ignored):
        yield


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where a signal arrived.

    An exception in the middle of a library's C code that sets itself up can end as a segmentation fault.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _answering(
    handler: Callable[[int, FrameType | None], None],
    watch: Callable[[int], None],
    *,
    unless_ignored: Collection[signal.Signals] = (signal.SIGHUP,),
) -> Iterator[None]:
    """`SIGNALS` go to the handler, in the main thread, and their numbers to what `watch` reads in another.

    Those of `unless_ignored` stay as they are where they are ignored already, as `nohup` has it for SIGHUP.
    """
    answered = [n for n in SIGNALS if n not in unless_ignored or signal.getsignal(n) is not signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, args=(reader,), name="signals", daemon=True)
    previous = {number: signal.signal(number, handler) for number in answered}
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, earlier in previous.items():
            signal.signal(number, earlier)
        os.close(writer)
        watcher.join()
        os.close(reader)


_before_a_stop: list[Callable[[], None]] = []
"""What is done before a signal ends the process where no exception comes through."""


@contextmanager
def before_a_stop(action: Callable[[], None]) -> Iterator[None]:
    """While inside, a signal that ends the process at once does this before, as an exception would."""
    _before_a_stop.append(action)
    try:
        yield
    finally:
        _before_a_stop.remove(action)


def hold_signals() -> None:
    """Let `SIGNALS` wait until `answer_held_signals`, also in a program that takes this process's place."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def answer_held_signals() -> None:
    """Let those that came meanwhile arrive, as now they are answered."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def stoppable(
    function: Callable[[Given], Result], stop_requested: Callable[[], bool]
) -> Callable[[Given], Result]:
    """The same function, which raises `StopRequested` instead of beginning once a stop was asked for."""

    def begin(given: Given) -> Result:
        if stop_requested():
            raise StopRequested
        return function(given)

    return begin


def _end_at_the_second(last: Callable[[], None], reader: int) -> None:
    """Read the numbers of arriving signals until the pipe is closed, or end the process."""
    first: float | None = None
    while received := os.read(reader, 1):
        first = _end_if_second(received[0], first, last)


def _end_soon(error_of: Callable[[int], KeyboardInterrupt], reader: int) -> None:
    """The same, and end by the first one's error where the main thread does not come out of what it does."""
    asked_by, first = 0, None
    while True:
        left = None if first is None else max(0.0, first + SOON - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            _leave_by(error_of(asked_by))
        received = os.read(reader, 1)
        if not received:
            return
        asked_by = received[0] if first is None else asked_by
        first = _end_if_second(received[0], first)


def _end_if_second(number: int, first: float | None, last: Callable[[], None] = lambda: None) -> float | None:
    """When the first request came, with this signal; does not return from one that comes later."""
    if number not in SIGNALS:
        return first
    now = time.monotonic()
    if first is not None and now - first > SAME_REQUEST:
        name = signal.Signals(number).name
        with suppress(OSError):
            last()
        _leave(STOPPED_AT_ONCE.code, f"stopped at once by a second signal ({name}); whole checkpoints stay")
    return now if first is None else first


def _leave_by(error: KeyboardInterrupt) -> NoReturn:
    outcome = outcome_of(error)
    _leave(outcome.code, f"{outcome.begins}: {error}")


def _leave(code: int, text: str) -> NoReturn:
    for action in _before_a_stop:
        with suppress(OSError):
            action()
    with suppress(OSError):  # nobody may be reading any more
        os.write(2, f"{_speaker()}{text}\n".encode())
    os._exit(code)


def _speaker() -> str:
    """The command that a message is of, where this process is the program `dpo` and no script of a user's."""
    program = Path(sys.argv[0])
    is_ours = program.name == "dpo" or program.parts[-2:] == ("dpo", "__main__.py")
    return f"{command_given()}: " if is_ours else ""
