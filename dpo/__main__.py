"""`python -m dpo` is `dpo`: starts the process anew with huge pages where that helps, then runs the command.

XLA's CPU client takes a step's temporaries from malloc and gives them back, gigabytes of them; in pages of
4 KiB the faults alone are a tenth of a step (docs/performance.md). glibc reads its settings once, when a
process starts, so they can only be set by starting again.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, and what lies in it may be anybody's

import gc
import os
import platform
import traceback
from pathlib import Path

from dpo.outcomes import STOPPED, StopRequested, command_given, describe, outcome_of
from dpo.training.interrupt import answer_held_signals, ends_at_once, hold_signals, stops_at_once

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
FEW_COLLECTIONS = (50_000, 20, 50)
"""Python's garbage is collected after so many new objects, not 700: importing and tracing make millions that
stay, and looking through them again and again took a seventh of a start (docs/performance.md)."""
LONG = ("train", "evaluate", "winrate", "frontier", "sweep")
"""Commands that go on from what they have kept, so that a signal at any moment ends them as a stop."""
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def run() -> int:
    """The command line in `sys.argv`; returns the exit code."""
    hold_signals()
    open_closed_streams()
    if wants_huge_pages():
        os.environ[TUNABLES] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    gc.set_threshold(*FEW_COLLECTIONS)
    from dpo.terminal import Guard

    sys.stdout, sys.stderr = map(Guard, (sys.stdout, sys.stderr))  # to the end: of a traceback, too
    os.environ.setdefault(NO_ADVICE, "1")  # before transformers is imported, which says that torch is missing
    return answer_signals() if sys.argv[1:2] and sys.argv[1] in LONG else end_at_once()


def open_closed_streams() -> None:
    """Streams that the caller closed (`dpo train >&-`) lead nowhere.

    Otherwise the next files that are opened get their numbers, and libraries print into these.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is the closed one
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(nowhere, "w" if number else "r"))


def command() -> int:
    """Run it; importing takes a second or two. A bug keeps its traceback, and is said as other ends are."""
    from dpo.cli import main

    try:
        return main()
    except Exception as error:
        traceback.print_exception(error)
        print(describe(command_given(), error), file=sys.stderr)
        return outcome_of(error).code


def answer_signals() -> int:
    """Run a command that goes on from what it has kept, and end it as stopped by a signal at any moment."""
    try:
        with stops_at_once():
            answer_held_signals()
            return command()
    except StopRequested as error:  # before the command itself answers
        print(f"{command_given()}: {STOPPED.begins}: {error}", file=sys.stderr)
        return STOPPED.code


def end_at_once() -> int:
    """Run a command that keeps nothing by the way; a signal at any moment ends it, without a traceback."""
    try:
        with ends_at_once():
            answer_held_signals()
            return command()
    except KeyboardInterrupt as error:  # before the command itself answers
        print(describe(command_given(), error), file=sys.stderr)
        return outcome_of(error).code


def wants_huge_pages(kernel: Path = _KERNEL) -> bool:
    """Whether malloc would use huge pages if asked: glibc, a kernel that gives them on request, no setting.

    An empty GLIBC_TUNABLES in the environment is a setting: it leaves malloc as it is.
    """
    if TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or not kernel.is_file():
        return False
    return "[madvise]" in kernel.read_text()


if __name__ == "__main__":
    raise SystemExit(run())
