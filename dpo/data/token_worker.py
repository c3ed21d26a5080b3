"""Makes chunks of tokens in a process of its own: `token_processes` starts this, and nothing imports it.

It reads pickles from standard input, first the `TokenJob`, then the name of one of `ChunkReader`'s methods
with a part, and answers each with whether that went well, and the result or the error. It is ended by the end
of its input, also where whoever started it was killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any

from dpo.data.chunks import ChunkReader


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        try:
            _serve(answers)
        except (EOFError, BrokenPipeError):
            return


def _serve(answers: Any) -> None:
    reader = ChunkReader(pickle.load(sys.stdin.buffer))
    while True:
        method, part = pickle.load(sys.stdin.buffer)
        try:
            answer = True, getattr(reader, method)(part)
        except Exception as error:
            answer = False, error
        answers.write(_dumps(answer))
        answers.flush()


def _dumps(answer: tuple[bool, Any]) -> bytes:
    """The answer as bytes, and an error that cannot be sent as its text."""
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)
    except Exception as error:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}; of {answer[1]!r:.500}")))
    return data
