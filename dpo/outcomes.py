"""How a command can end: by which cause, its exit code, how its message begins, whether it may be repeated.

An error is sorted by its cause, never by the place that it was raised at: by its class where the class is
ours, and by the status in its text where a library's class says nothing (a lost connection of gloo is a
`ValueError` when a call is made, a `JaxRuntimeError` when its result is waited for). The command line, the
processes of a run, `launch/` and the table in docs/reliability.md follow it.
"""

from __future__ import annotations

import errno
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dpo.hidden import cut_secrets


class Outcome(NamedTuple):
    """One way to end."""

    cause: str
    code: int
    """Exit code of the command."""
    begins: str
    """How the message begins, after the command's name."""
    goes_on: bool
    """Whether who started it starts the same command again by itself, to go on from what was saved."""


FINISHED = Outcome("finished", 0, "", False)
BUG = Outcome("a bug", 1, "unexpected error", False)
ENVIRONMENT = Outcome("the environment", 1, "error", False)
OUT_OF_MEMORY = Outcome("out of memory", 1, "out of memory", False)
NO_PROGRESS = Outcome("no progress", 1, "no progress", False)
USER = Outcome("settings or data", 2, "error", False)
STOPPED = Outcome("asked to stop", 75, "stopped as asked", True)
PEER_LOST = Outcome("another process was lost", 75, "another process was lost", True)
HANG = Outcome("a step hangs", 75, "a step hangs", True)
STOPPED_AT_ONCE = Outcome("stopped at once", 130, "stopped at once", False)

OUTCOMES = {
    outcome.cause: outcome
    for outcome in (
        FINISHED,
        BUG,
        ENVIRONMENT,
        OUT_OF_MEMORY,
        NO_PROGRESS,
        USER,
        STOPPED,
        PEER_LOST,
        HANG,
        STOPPED_AT_ONCE,
    )
}


class UserError(ValueError):
    """Settings, data or a command line are wrong: what was given, where, what is allowed."""


class EnvironmentFailure(OSError):  # noqa: N818 (EnvironmentError is Python's)
    """What is outside of the run refused: a disk, a permission, the hub, an endpoint, the network."""


class OutOfMemoryError(RuntimeError):
    """A device or the host has no room for what was asked."""


class PeerLostError(RuntimeError):
    """Another process of the run has ended, hangs or is out of reach."""


class NoProgressError(RuntimeError):
    """Starts in a row have saved nothing: another one would not either."""


class StopRequested(KeyboardInterrupt):
    """A stop was asked for where there is nothing to save that is not saved already.

    As Ctrl-C's, it passes by whoever expects errors (`except Exception`), in libraries too.
    """


class BugError(RuntimeError):
    """An error that nobody meant, in another process of the run."""


CLASSES: dict[type[BaseException], Outcome] = {
    UserError: USER,
    EnvironmentFailure: ENVIRONMENT,
    OutOfMemoryError: OUT_OF_MEMORY,
    PeerLostError: PEER_LOST,
    NoProgressError: NO_PROGRESS,
    BugError: BUG,
    StopRequested: STOPPED,
    KeyboardInterrupt: STOPPED_AT_ONCE,
    MemoryError: OUT_OF_MEMORY,
}
"""What the class alone decides."""

_LOST = re.compile(
    r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|DATA_LOSS"
    r"|connection (was )?(closed|reset|refused|aborted)|socket closed|broken pipe|read timeout|heartbeat"
    r"|remote process (has )?exited|ncclRemoteError|ncclSystemError|unhandled system error|task.{0,20} died",
    re.IGNORECASE,
)
"""Statuses of a lost peer, in the words of absl, gloo, NCCL and the coordination service."""
_COLLECTIVE = re.compile(
    r"gloo|nccl|coordination|collective|all.?reduce|all.?gather|preemption", re.IGNORECASE
)
"""What the text of an error of any class but JAX's own must name too."""
_NO_ROOM = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|OOM when allocating|failed to allocate", re.IGNORECASE
)
_REFUSED = {
    getattr(errno, name, None)  # not every system has all
    for name in (
        *("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "ESTALE", "EACCES", "EPERM", "EMFILE", "ENFILE"),
        *("ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH", "ENOLCK", "EPIPE"),
        *("ENOTCONN", "EREMOTEIO", "ENODEV", "ENXIO", "EBUSY", "EUCLEAN", "EHOSTDOWN", "ENETDOWN"),
    )
} - {None}
"""Numbers of errors that a disk, a permission or a network gives; others of the system's are bugs."""
_SYSTEM_NUMBER = re.compile(r"os_error_code='(\d+)'")
"""The system's number in an error of TensorStore's, whose status of a full disk is that of a full memory."""
_NETWORK = ("requests.", "httpx2.", "httpcore2.", "urllib3.", "huggingface_hub.", "urllib.error")
"""Packages whose errors come from outside."""

_OF_A_RUN = (
    "set training.memory_limit, more training.micro_batches, model.remat, a smaller training.batch_size or "
    "data.max_length"
)
MEMORY_ADVICE = {
    "dpo train": _OF_A_RUN,
    "dpo sweep": _OF_A_RUN,
    "dpo evaluate": "a smaller --max_length, or --compute_dtype=bfloat16",
    "dpo winrate": "a smaller --batch_size or --max_new_tokens, or --compute_dtype=bfloat16",
    "dpo generate": "a smaller --max_new_tokens, or --compute_dtype=bfloat16",
    "dpo frontier": "a smaller --batch_size, --max_length or --max_new_tokens",
}
"""What takes less memory, by command; the others have no setting for it."""


def outcome_of(error: BaseException) -> Outcome:
    """The cause of an error: that of the first in its chain of causes that says one.

    A file that the user named and the system can't read (a broken disk, a permission) is no wrong setting.
    """
    for link in chain_of(error):
        for kind, outcome in CLASSES.items():
            if isinstance(link, kind):
                return ENVIRONMENT if outcome is USER and any(map(_is_refused, chain_of(link))) else outcome
    for link in chain_of(error):
        found = _by_status(link)
        if found is not None:
            return found
    return BUG


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, each once."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__


def told_by(error: BaseException) -> str:
    """What an error of a library says, behind the name of its class.

    Where it says nothing, as a `StopIteration`, what it was raised from does, or else that is said.
    """
    for link in chain_of(error):
        if text := str(link).strip():
            return f"{type(link).__name__}: {text}"
    return f"{type(error).__name__}, which the library that reads it raised without a word"


@contextmanager
def raising_user_errors(what: str) -> Iterator[None]:
    """Whatever a library raises about what a user gave; a panic of Rust, which is no `Exception`, too."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: {told_by(error)}") from error


def _by_status(error: BaseException) -> Outcome | None:
    """What the text of a library's error says, or the number of the system's."""
    text = str(error)
    from_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    module = f"{type(error).__module__}."
    if _is_refused(error) or module.startswith(_NETWORK):
        return ENVIRONMENT
    if _NO_ROOM.search(text) and (from_jax or "RESOURCE_EXHAUSTED" in text):
        return OUT_OF_MEMORY
    if _LOST.search(text) and (from_jax or _COLLECTIVE.search(text)):
        return PEER_LOST
    if isinstance(error, (ConnectionError, TimeoutError)):
        return ENVIRONMENT
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return OUT_OF_MEMORY
    return None


def _is_refused(error: BaseException) -> bool:
    """Whether the system's number is in it, or in the text of TensorStore's, and is one of `_REFUSED`.

    A name that no server of names answers for has numbers of its own.
    """
    if isinstance(error, OSError):
        return error.errno in _REFUSED or isinstance(error, socket.gaierror)
    number = _SYSTEM_NUMBER.search(str(error)) if isinstance(error, (RuntimeError, ValueError)) else None
    return number is not None and int(number[1]) in _REFUSED


def failure_of(outcome: Outcome, text: str) -> BaseException:
    """An error of a cause, to be raised where another process met it."""
    kinds = {made: kind for kind, made in CLASSES.items() if kind is not MemoryError}
    return kinds.get(outcome, BugError)(text)


def text_of(error: BaseException) -> str:
    """What an error says, without secrets; a bug, and one that says nothing, with the name of its class."""
    text = cut_secrets(str(error).strip())
    if type(error) is KeyboardInterrupt and not text:
        return "by Ctrl-C"
    if not text or (outcome_of(error) is BUG and not isinstance(error, BugError)):
        return f"{type(error).__name__}: {text}".rstrip(": ")
    return text


def command_given() -> str:
    """The program and the command's name, as this process was started with them: "dpo train"."""
    return " ".join(["dpo", *sys.argv[1:2]])


def describe(command: str, error: BaseException) -> str:
    """The message of an error: the command, how its cause begins, what happened, what helps."""
    outcome, text = outcome_of(error), text_of(error)
    if outcome is OUT_OF_MEMORY:
        helps = f": {MEMORY_ADVICE[command]}" if command in MEMORY_ADVICE else ", or a machine with more"
        text = f"{text.splitlines()[0]}; allowed is what fits{helps}"
    return f"{command}: {outcome.begins}: {text}"
