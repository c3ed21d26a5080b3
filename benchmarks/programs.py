"""A program within a time limit: what it said, and no process of its own left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

TIME = "time"
"""In place of an exit code, of a program that was ended."""


def run_program(
    command: Sequence[str], *, limit: float, environment: Mapping[str, str], directory: Path
) -> tuple[int | str, str, str]:
    """Exit code (or `TIME` after `limit` seconds), output and errors, these as far as they came.

    A program that starts others and is ended alone would leave them, with its output held open.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=directory,
        env=environment,
        start_new_session=True,
    ) as program:
        try:
            output, errors = program.communicate(timeout=limit)
            return program.returncode, output, errors
        except subprocess.TimeoutExpired:
            _end(program)
            output, errors = program.communicate()
            return TIME, output, errors
        except BaseException:  # who waits is told to end
            _end(program)
            raise


def _end(program: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
