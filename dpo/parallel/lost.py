"""What remains to be said when another process of the run is lost.

JAX's coordination client ends a process by `abort()`, from a thread of its own, as soon as the coordinator
is gone or a task has missed its heartbeats; a launcher sees SIGABRT, which looks like a crash. Here that
signal is answered first: where the coordination service does not answer either, the process ends with the
code of a lost peer, which launchers go on from. An abort while all are well is left to be one.

A process that ends by an error says so to the others through the same service, so that they end by its cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

from dpo.outcomes import OUTCOMES, PEER_LOST, Outcome, describe, failure_of, outcome_of

ANSWER_SECONDS = 2.0
"""How long the coordination service may take to answer; a lost one never does."""
LISTEN_SECONDS = 1.0
"""How often a process asks what the others have said."""
ADVICE = "The same command goes on from the newest checkpoint, when all processes are started again."
GIVEN_UP = 0.5
"""Of `distributed.heartbeat_timeout`: the silence after which the others may have given a process up. They
count from its last sign of life, which is up to half of that time before."""
_SAID = "dpo/ended"
"""Where processes say by what they ended, in the service's table."""


def describe_loss(reason: str) -> str:
    """The message of a process that has lost another."""
    return (
        f"process {distributed.global_state.process_id} of {distributed.global_state.num_processes} can't go "
        f"on: another process has ended or is out of reach. {ADVICE} ({reason})"
    )


def describe_absence(who: str, where: str | None, seconds: float) -> str:
    """The message of a process that has waited in vain for another to come."""
    return (
        f"{who} did not meet the others at {where} within {seconds:g} s (distributed.start_timeout). {ADVICE}"
    )


_meeting: list[str] = []
"""What an abort means while processes meet; nothing once they have."""


@contextlib.contextmanager
def meeting(text: str) -> Iterator[None]:
    """While inside, an abort is one that `text` describes: JAX waits by itself, and gives up by `abort()`."""
    _meeting.append(text)
    try:
        yield
    finally:
        _meeting.pop()


def end_with_the_others() -> None:
    """From here on SIGABRT in this process is `_answer_abort`'s."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, _answer_abort)


class _Silence:
    """Whether this process was stopped for so long that the others have given it up (SIGSTOP, a frozen host).

    It finds them ended when it goes on, and where it is the coordinator its own service still answers.
    """

    def __init__(self) -> None:
        self._limit, self._awake, self._longest = math.inf, 0.0, 0.0

    def watch(self, limit: float) -> None:
        """Count from now, in seconds."""
        self._limit, self._awake, self._longest = limit, time.monotonic(), 0.0

    def note(self) -> None:
        """To be called by a thread every second or so."""
        now = time.monotonic()
        self._longest, self._awake = max(self._longest, now - self._awake), now

    def was_too_long(self) -> bool:
        """Whether it was, or is: whoever asks may be awake before the thread that notes it."""
        return max(self._longest, time.monotonic() - self._awake) > self._limit


_SILENCE = _Silence()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _answer_abort(number: int) -> None:
    """Runs in the thread that called `abort()`; when it returns, the process is aborted after all."""
    if _meeting:
        text = _meeting[-1]
    elif _SILENCE.was_too_long():
        text = describe_loss("this process was stopped for a time, and the others have given it up")
    elif _is_answered():
        return
    else:
        text = describe_loss("JAX's coordination service is gone, or has given a process up")
    os.write(2, f"dpo train: {PEER_LOST.begins}: {text}\n".encode())
    os._exit(PEER_LOST.code)


def _is_answered() -> bool:
    """Whether the service still answers, which it does not where it has counted a process as lost."""

    def ask(client: Any) -> bool:
        try:
            client.key_value_try_get(_SAID)
        except jax.errors.JaxRuntimeError as error:
            return "NOT_FOUND" in str(error)
        return True

    return _within_limit(ask) is True


def say_outcome(outcome: Outcome, text: str) -> None:
    """Tell the others by what this process ends, if the service still listens."""
    content = json.dumps({"cause": outcome.cause, "text": text})

    def say(client: Any) -> None:
        client.key_value_set(f"{_SAID}/{distributed.global_state.process_id}", content)

    _within_limit(say)


def heard_failure() -> BaseException | None:
    """The error by which another process ended, where it said one that does not go on by itself."""

    def hear(client: Any) -> list[tuple[str, str]]:
        return client.key_value_dir_get(f"{_SAID}/")

    for key, content in _within_limit(hear) or []:
        said = json.loads(content)
        outcome = OUTCOMES[said["cause"]]
        if not outcome.goes_on and key != f"{_SAID}/{distributed.global_state.process_id}":
            return failure_of(outcome, f"process {key.rpartition('/')[2]} stopped: {said['text']}")
    return None


@contextlib.contextmanager
def listening(heartbeat_timeout: float) -> Iterator[None]:
    """While inside, an error that another process says ends this one too, also where it waits for the other.

    It may wait in a collective, where no exception reaches it before the other's connections are closed.
    """
    ended = threading.Event()
    _SILENCE.watch(GIVEN_UP * heartbeat_timeout)

    def listen() -> None:
        while not ended.wait(LISTEN_SECONDS):
            _SILENCE.note()
            failure = heard_failure()
            if failure is not None and not ended.is_set():
                os.write(2, f"{describe('dpo train', failure)}\n".encode())
                os._exit(outcome_of(failure).code)

    threading.Thread(target=listen, name="listening", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _within_limit(ask: Callable[[Any], Any]) -> Any:
    """What the coordination service answers within `ANSWER_SECONDS`; None when it does not."""
    client, answers = distributed.global_state.client, []
    if client is None:
        return None

    def run() -> None:
        try:
            answers.append(ask(client))
        except Exception:  # a service that is gone says so in many ways
            answers.append(None)

    thread = threading.Thread(target=run, name="coordination", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else None
