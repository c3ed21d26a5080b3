"""Chunks of tokens made in several processes at once.

The processes are programs of their own (`token_worker`): they inherit no thread or device of this one, import
neither jax nor the caller's script, and take a second to start. What they cannot do, or meet an error at, is
done here, so that errors are those of one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from signal import Signals
from typing import Any

from dpo.data.chunks import TokenJob, Untokenized
from dpo.data.preferences import ReadSummary
from dpo.data.sources import Part
from dpo.distribution import own_python
from dpo.outcomes import EnvironmentFailure

PARALLEL_FROM = 4
"""Chunks from which on processes are started: for fewer, a start takes as long as the work."""
MOST = 16
"""Processes, however many cores there are."""

Numbered = tuple[int, Part]


def count_processes(num_parts: int) -> int:
    """How many to start for so many parts; 1 is none besides this one."""
    return min(len(os.sched_getaffinity(0)), MOST) if num_parts >= PARALLEL_FROM else 1


def make_chunks(
    job: TokenJob,
    rules: Sequence[Any],
    parts: Sequence[Numbered],
    *,
    count: int,
    path_of: Callable[[int], Path],
    is_read_only: Callable[[int], bool],
) -> Generator[tuple[int, Path | Untokenized | None]]:
    """Every part's number with the file of its chunk, in any order; None is for a part to be done here.

    Parts of which `is_read_only` says so by then are read and not tokenised.

    Raises:
      EnvironmentFailure: where a process ended.
    """
    shares = _Shares(parts, count)
    under_way: dict[_Worker, tuple[int, Path | None]] = {}

    def ask(index: int, worker: _Worker) -> None:
        if (following := shares.take(index)) is not None:
            number, part = following
            path = None if is_read_only(number) else path_of(number)
            worker.send([part, path and str(path)])
            under_way[worker] = number, path

    with _started(job, rules, count) as workers, selectors.DefaultSelector() as ready:
        for index, worker in enumerate(workers):
            ready.register(worker.answers, selectors.EVENT_READ, (index, worker))
            ask(index, worker)
        while under_way:
            for key, _ in ready.select():
                answer = key.data[1].read()
                number, path = under_way.pop(key.data[1])
                ask(*key.data)
                yield number, _result(answer, path)


def _result(answer: Mapping[str, Any] | None, path: Path | None) -> Path | Untokenized | None:
    if answer is None:
        return None
    if "chunk" in answer:
        return path
    return Untokenized(ReadSummary.from_json(answer["summary"]), answer["count"], None)


class _Shares:
    """What each process has to do: parts in a row, so that it reads on in an open file."""

    def __init__(self, parts: Sequence[Numbered], count: int) -> None:
        borders = [len(parts) * i // count for i in range(count + 1)]
        self._left = [list(parts[start:stop]) for start, stop in pairwise(borders)]

    def take(self, index: int) -> Numbered | None:
        """The next part of one; whose share is done has the later half of the largest."""
        if not self._left[index]:
            largest = max(self._left, key=len)
            half = len(largest) // 2
            self._left[index], largest[half:] = largest[half:], []
        return self._left[index].pop(0) if self._left[index] else None


@contextmanager
def _started(job: TokenJob, rules: Sequence[Any], count: int) -> Iterator[list[_Worker]]:
    facts = {"source": job.source, "split": job.split, "expand": job.expand}
    facts |= {"reading": job.reading.as_json(), "rules": rules, "policies": dict(job.policies)}
    workers = [_Worker() for _ in range(count)]
    try:
        for worker in workers:
            worker.send(facts)
        yield workers
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """One process: a question, an answer."""

    def __init__(self) -> None:
        python, environment = own_python()
        self._process = subprocess.Popen(
            [*python, "-m", "dpo.data.token_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # as many processes as there are cores
            env=environment | {"TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self.answers = self._process.stdin, self._process.stdout

    def send(self, question: Any) -> None:
        """A job, or a part."""
        try:
            self._questions.write(json.dumps(question).encode() + b"\n")
            self._questions.flush()
        except BrokenPipeError:
            raise self._lost() from None

    def read(self) -> Mapping[str, Any] | None:
        """The answer to a part; waits for it."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise self._lost()
        return json.loads(line)

    def close(self) -> None:
        """End the process, in the middle of its work too, and clean up after it."""
        self._process.kill()
        for pipe in (self._questions, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()

    def _lost(self) -> EnvironmentFailure:
        code = self._process.wait()
        how = f"was ended by {Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return EnvironmentFailure(
            f"a process that makes tokens {how} (killed for memory, perhaps); what is finished is kept, and "
            "another start goes on with it; fewer cores (taskset) are fewer such processes"
        )
