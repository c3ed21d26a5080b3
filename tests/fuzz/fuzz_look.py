"""`dpo.limited.look` for many inputs: its scripts run in a fork of this process, within their limits.

A process of its own for each input would take a quarter of a second to start.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 (before a fork)
import tokenizers  # noqa: F401

from dpo import limited
from dpo.data import table_worker
from dpo.huggingface import tokenizer_worker

WORKERS: dict[str, Any] = {"table_worker": table_worker, "tokenizer_worker": tokenizer_worker}
SECONDS = 15
"""Of CPU time; the watchdog of an input has a little more."""


def look(script: Path, request: Mapping[str, Any], *, size: int, writes: int = 0) -> dict[str, Any]:
    """What the script says, or how its process ended."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        _answer(write, WORKERS[script.stem], {**request, "writes": writes, "size": size, **_limits(size)})
    os.close(write)
    try:
        with open(read, "rb") as pipe:
            lines = pipe.read().splitlines()
    finally:  # an input that takes too long raises here
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with suppress(ValueError, IndexError):
        return json.loads(lines[-1])
    return {"error": f"it makes the library that reads it crash ({os.waitstatus_to_exitcode(status)})"}


def _limits(size: int) -> dict[str, int]:
    """Beside what this process has already: jax alone reserves gigabytes of addresses."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return {"memory": pages * os.sysconf("SC_PAGE_SIZE") + limited.MEMORY + 4 * size, "seconds": SECONDS}


def _answer(write: int, worker: Any, request: dict[str, Any]) -> None:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        with open(write, "w") as out:
            sys.stdout, sys.stderr = out, io.StringIO()
            worker.main(request)
    finally:
        os._exit(0)
