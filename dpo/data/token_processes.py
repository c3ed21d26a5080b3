"""Chunks of tokens, made here or in several processes at once.

The processes are started as programs of their own (`token_worker`): they inherit no thread or device of this
one, import neither jax nor the caller's script, and take a second to start.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from signal import Signals
from typing import Any

from dpo.data.chunks import Chunk, ChunkReader, TokenJob, Untokenized
from dpo.data.sources import Part
from dpo.outcomes import EnvironmentFailure

PARALLEL_FROM = 4
"""Chunks from which on processes are started: for fewer, a start takes as long as the work."""

Take = Callable[[int, Chunk | Untokenized], bool]
"""Gets the result of a part by the part's number; says whether to go on making tokens."""


def count_workers(given: int | None, num_chunks: int) -> int:
    """How many processes to start; 1 is none besides this one."""
    if num_chunks < PARALLEL_FROM:
        return 1
    return min(given or len(os.sched_getaffinity(0)), num_chunks)


def make_chunks(job: TokenJob, parts: Sequence[tuple[int, Part]], *, num_workers: int, take: Take) -> None:
    """Hand the result of every numbered part to `take`, in any order; each process has parts in a row.

    Once `take` says no, the parts that have not begun are read only.

    Raises:
      ValueError: where the source cannot be read.
      EnvironmentFailure: where a process ended.
    """
    state = _State(take)
    if num_workers == 1:
        reader = ChunkReader(job)
        state.drive(parts, lambda method, part: getattr(reader, method)(part))
        return
    borders = [len(parts) * i // num_workers for i in range(num_workers + 1)]
    with _workers(job, num_workers) as workers, ThreadPoolExecutor(num_workers) as pool:
        runs = [
            pool.submit(state.drive, parts[start:stop], worker)
            for worker, start, stop in zip(workers, borders, borders[1:], strict=False)
        ]
        try:
            wait(runs, return_when=FIRST_EXCEPTION)
        except BaseException:  # asked to stop: nobody waits for what is under way
            for worker in workers:
                worker.kill()
            raise
        finally:
            state.stop()
        for run in runs:
            run.result()


class _State:
    """Whether tokens are still to be made, and the one place that results are taken at."""

    def __init__(self, take: Take) -> None:
        self._take, self._lock = take, threading.Lock()
        self._makes_tokens, self._stopped = True, False

    def drive(self, parts: Sequence[tuple[int, Part]], ask: Callable[[str, Part], Any]) -> None:
        """Have parts made, one after the other."""
        for number, part in parts:
            if self._stopped:
                return
            result = ask("tokenize" if self._makes_tokens else "check", part)
            with self._lock:
                self._makes_tokens = self._take(number, result) and self._makes_tokens

    def stop(self) -> None:
        """Begin no further part."""
        self._stopped = True


@contextmanager
def _workers(job: TokenJob, count: int) -> Iterator[list[_Worker]]:
    given = pickle.dumps(job)
    workers = [_Worker() for _ in range(count)]
    try:
        for worker in workers:
            worker.start(given)
        yield workers
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """One process: a question, an answer."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from dpo.data.token_worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "TOKENIZERS_PARALLELISM": "false",  # the processes are as many as there are cores
            },
        )

    def start(self, job: bytes) -> None:
        """Say what the work is."""
        self._send(job)

    def __call__(self, method: str, part: Part) -> Any:
        """What `ChunkReader` gives there."""
        self._send(pickle.dumps((method, part)))
        assert self._process.stdout is not None
        try:
            went_well, result = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._lost() from None
        if not went_well:
            raise result
        return result

    def kill(self) -> None:
        """End the process in the middle of its work."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and clean up after it."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._process.wait()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None

    def _lost(self) -> EnvironmentFailure:
        code = self._process.wait()
        how = f"was ended by {Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return EnvironmentFailure(
            f"a process that makes tokens {how} (killed for memory, perhaps); what is finished is kept; "
            "allowed: fewer of them, by data.num_workers, or another start"
        )
