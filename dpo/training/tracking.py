"""Where a run's numbers go: metrics.jsonl, the terminal, and what `training.trackers` names.

with open_trackers(run_dir, names, total_steps=100, resume_step=0, config=settings) as tracker:
    tracker.log(0, {"loss": 0.6931, "rewards/accuracies": 0.5, "tokens/s": 310.0})
    tracker.message("checkpoint saved")
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from dpo import terminal
from dpo.files import replace_text, require_same_file, writing
from dpo.runs import METRICS_FILE, read_metrics
from dpo.training.progress import PlainLines, Silence, Terminal
from dpo.training.trackers import WRITERS, Writer, require_trackers

CLOSE_SECONDS = 60
"""How long a tracker may take to send what it has, when the run ends."""


class Tracker:
    """What the loop sees: every `log` reaches all writers and the progress display."""

    def __init__(self, writers: Sequence[Writer], progress: Terminal | PlainLines | Silence) -> None:
        self._writers = writers
        self._progress = progress

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step; values are anything that `float` accepts."""
        values = {name: float(value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(step, values)
        self._progress.update(step, values)
        for writer in self._writers:
            if isinstance(writer, Apart) and (failure := writer.failure()):
                self.message(failure)

    def message(self, text: str) -> None:
        """Print a line of text without disturbing the progress display."""
        self._progress.message(text)

    def close(self) -> None:
        """End the display; writers are closed by who opened them."""
        self._progress.close()


@contextlib.contextmanager
def open_trackers(
    run_dir: str | Path | None,
    names: Sequence[str],
    *,
    total_steps: int,
    resume_step: int,
    config: Mapping[str, Any],
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Tracker]:
    """Open every writer, and close them however the run ends.

    A training step is logged as its number from 0, a held-out evaluation as the number of steps before it.
    `resume_step` is the first step that will be taken (again): what an interrupted run wrote from there on is
    dropped, a held-out evaluation at that point too, so that metrics.jsonl reads as if the run had never
    stopped once both were done again. 0 starts afresh. Without a `run_dir` (a process that is not the main
    one) nothing is written.

    Raises:
      ValueError: for a tracker whose package is not installed.
    """
    require_trackers(names)
    if run_dir is None:
        yield Tracker([], Silence())
        return
    console = console or terminal.console()
    bar = Terminal if console.is_terminal else PlainLines
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = [JsonLines(Path(run_dir) / METRICS_FILE, resume_step=resume_step)]
        stack.callback(writers[0].close)
        for name in names:
            writers.append(Apart(name, partial(WRITERS[name], Path(run_dir), resume_step, config)))
            stack.callback(writers[-1].close)
        progress = bar(console, total_steps=total_steps, first_step=resume_step, clock=clock)
        tracker = Tracker(writers, progress)
        stack.callback(tracker.close)
        yield tracker


class Apart:
    """A tracker in a thread of its own: one that fails is dropped with a warning, one that hangs is left."""

    def __init__(self, name: str, open_writer: Callable[[], Writer]) -> None:
        self._name = name
        self._lines: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._failure: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._work, args=(open_writer,), name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._failure is None:
            self._lines.put((step, metrics))

    def failure(self) -> str | None:
        """The warning, once."""
        if self._failure is None or self._told:
            return None
        self._told = True
        return self._failure

    def close(self) -> None:
        """Wait for what is on its way, `CLOSE_SECONDS` at most; what is not told yet is a warning."""
        self._lines.put(None)
        if self._failure is None:
            self._thread.join(CLOSE_SECONDS)
        if self._failure is None and self._thread.is_alive():
            self._failure = f"warning: {self._name} did not take the last lines within {CLOSE_SECONDS} s"
        text = self.failure()
        if text is not None:
            warnings.warn(text, stacklevel=2)

    def _work(self, open_writer: Callable[[], Writer]) -> None:
        writer = None
        try:
            writer = open_writer()
            while (line := self._lines.get()) is not None:
                writer.write(*line)
            writer.close()
        except BaseException as error:
            self._failure = (
                f"warning: {self._name} failed and is left out from here on, metrics.jsonl has everything: "
                f"{type(error).__name__}: {error}"
            )
            if writer is not None:
                with contextlib.suppress(BaseException):  # whatever it keeps open
                    writer.close()


class JsonLines:
    """One JSON object a line, flushed. Non-finite values are the strings "nan", "inf" and "-inf"."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        written = read_metrics(path) if path.exists() and resume_step > 0 else []
        kept = [row for row in written if row["step"] < resume_step]
        replace_text(path, "".join(map(_json_line, kept)), what="the metrics")
        self._path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with writing("the metrics", self._path, note="checkpoints before this are whole"):
            self._file.write(_json_line({"step": step, **metrics}))
            self._file.flush()
        require_same_file("the metrics", self._file, self._path)

    def close(self) -> None:
        with writing("the metrics", self._path, note="checkpoints before this are whole"):
            self._file.close()


def _json_line(row: Mapping[str, int | float]) -> str:
    return json.dumps({name: v if math.isfinite(v) else str(v) for name, v in row.items()}) + "\n"
