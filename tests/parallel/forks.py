"""`dpo` commands, each forked from this process, which has imported everything: a start costs little.

One JSON object a line comes in on standard input, one line goes out on standard output:

    {"arguments": ["train", …], "log": FILE}    starts a command; out comes its process number
    {"wait": 123, "seconds": 60}                out comes its exit code (negative: by that signal), or null

A command ends as `dpo` itself does, through the interpreter's own end. Figures of its pages are left
empty: they are most of what a page costs, and what is asked of these runs is how they end, and their bits.
"""

from __future__ import annotations

import json
import os
import sys
import time

from transformers import AutoTokenizer, LlamaConfig  # noqa: F401 (transformers loads late what is not named)

import dpo.evaluation.heldout
import dpo.pages.report
import dpo.training.loop  # noqa: F401
from dpo.cli import main
from dpo.pages import plots
from dpo.training.interrupt import stops_at_once

codes: dict[int, int] = {}
"""How those ended that were waited for."""


plots._svg = lambda figure, description: "<svg></svg>"


def serve() -> int:
    """Answer until there is no more; the exit code of the command where this is the child that runs it."""
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(json.dumps(wait(command["wait"], command["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            return run(command["arguments"], command["log"])
        print(pid, flush=True)
    return 0


def run(arguments: list[str], log: str) -> int:
    """In the child: what `dpo/__main__.py` does, with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with stops_at_once():
        return main(arguments)


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while pid not in codes:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(0.01)
    return codes[pid]


if __name__ == "__main__":
    raise SystemExit(serve())
