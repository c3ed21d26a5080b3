"""Runs a reader on many mutated inputs, and tells declared errors from crashes.

Inputs that make a reader say what it has not said before (another error, another kind of result) are kept in
memory and mutated further, so that the search reaches beyond the first check without instrumenting code.
"""

from __future__ import annotations

import linecache
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from fuzz_mutation import mutate

import dpo

PACKAGE = str(Path(dpo.__file__).parent)
POOL = 400
"""Inputs that are mutated, the seeds included."""
LONGEST_SECONDS = 20.0
"""Of CPU time for one input; a longer one is a hang, and so is one that waits so long ten times over."""


class Target(NamedTuple):
    """One reader of something that comes from outside."""

    name: str
    seeds: Sequence[bytes]
    """Small valid inputs."""
    words: Sequence[bytes]
    """Of the format: keys, punctuation, values."""
    read: Callable[[bytes], object]
    """Reads an input as the program does; what it returns in a few words tells results apart."""
    refuses: Callable[[BaseException], bool]
    """Whether an exception is how the reader is declared to refuse."""
    quick: int
    """Inputs in the quick tests."""


class Failure(NamedTuple):
    """An input that did what no input may."""

    data: bytes
    what: str


class Outcome(NamedTuple):
    """Of all inputs of one target."""

    inputs: int
    accepted: int
    refused: int
    ways: int
    """Different results and refusals."""
    failures: list[Failure]
    seconds: float
    slowest: float


class _HangError(BaseException):
    """An input took too long."""


def is_own_value_error(error: BaseException) -> bool:
    """A `ValueError` that this project raised on purpose: its traceback ends in a `raise` of the package.

    The same rule by which the command line tells a message for the user from a bug.
    """
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).lstrip()
    return last.filename.startswith(PACKAGE) and line.startswith("raise")


def run(
    target: Target, inputs: int, *, seed: int = 0, stop_after: int = 20, last: Path | None = None
) -> Outcome:
    """Read the seeds and then so many mutated inputs; ends early after `stop_after` failures.

    Each input is in the file `last` while it is read: there it is when the whole process crashes.
    """
    random = Random(f"{target.name} {seed}")
    pool, seen = list(target.seeds), set[str]()
    counts = {"accepted": 0, "refused": 0}
    failures: list[Failure] = []
    started, slowest = time.monotonic(), 0.0
    done = 0
    with ignoring_warnings(), _watchdog():
        for data in _inputs(target, pool, inputs, random):
            if last is not None:
                last.write_bytes(data)
            begun = time.monotonic()
            what, way = _outcome(target, data)
            slowest = max(slowest, time.monotonic() - begun)
            done += 1
            if what == "failed":
                failures.append(Failure(data, way))
                if len(failures) == stop_after:
                    break
                continue
            counts[what] += 1
            if way not in seen:
                seen.add(way)
                if len(pool) < POOL:
                    pool.append(data)
    return Outcome(
        done,
        counts["accepted"],
        counts["refused"],
        len(seen),
        failures,
        time.monotonic() - started,
        slowest,
    )


def _inputs(target: Target, pool: list[bytes], inputs: int, random: Random) -> Iterator[bytes]:
    yield from target.seeds[:inputs]
    for _ in range(inputs - len(target.seeds)):
        # half of the time a seed: what was found by mutation is often broken beyond interest
        parent = random.choice(target.seeds if random.random() < 0.5 else pool)
        yield mutate(parent, random, target.words, pool)


def _outcome(target: Target, data: bytes) -> tuple[str, str]:
    _set_timers(LONGEST_SECONDS)
    try:
        return "accepted", f"read: {target.read(data)}"
    except _HangError:
        return "failed", f"took more than {LONGEST_SECONDS:g} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if target.refuses(error):
            return "refused", f"{type(error).__name__}: {_shape(str(error))}"
        return "failed", "".join(traceback.format_exception(error)[-12:])
    finally:
        _set_timers(0)


def _set_timers(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def _shape(message: str) -> str:
    """A message without the values in it."""
    message = re.sub(r"(?s)(value|setting;|not a mapping).*", "", message.partition("error: ")[2] or message)
    return re.sub(r"\d+|'[^']*'|\"[^\"]*\"|/\S+", "_", message)[:80]


@contextmanager
def ignoring_warnings() -> Iterator[None]:
    """A warning is no crash, whatever a test makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _watchdog() -> Iterator[None]:
    def hang(number: int, frame: object) -> None:
        raise _HangError

    timers = (signal.SIGALRM, signal.SIGPROF)
    before = [signal.signal(timer, hang) for timer in timers]
    try:
        yield
    finally:
        for timer, handler in zip(timers, before, strict=True):
            signal.signal(timer, handler)
