"""Where a run's numbers go: metrics.jsonl always, the terminal always, and what `training.trackers` names.

with open_trackers(run_dir, names, total_steps=100, resume_step=0, config=settings) as tracker:
    tracker.log(0, {"loss": 0.6931, "rewards/accuracies": 0.5, "tokens/s": 310.0})
    tracker.message("checkpoint saved")
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import queue
import re
import secrets
import statistics
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dpo import terminal
from dpo.files import replace_text, writing
from dpo.outcomes import UserError
from dpo.parallel.distributed import is_main
from dpo.runs import METRICS_FILE, read_metrics

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "tokens/s": "tokens/s",
}
"""Metrics in the live progress, with the words they go by there."""
CLOSE_SECONDS = 60
"""How long a tracker may take to send what it has, when the run ends."""
PLAIN_INTERVAL = 10.0
"""Seconds between plain progress lines, where there is no terminal."""


@runtime_checkable
class Writer(Protocol):
    """One place that metrics are written to."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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
        self._show(lambda: self._progress.update(step, values))
        for writer in self._writers:
            if isinstance(writer, Apart) and (failure := writer.failure()):
                self.message(failure)

    def message(self, text: str) -> None:
        """Print a line of text without disturbing the progress display."""
        self._show(lambda: self._progress.message(text))

    def close(self) -> None:
        """End the display; writers are closed by who opened them."""
        self._show(self._progress.close)

    def _show(self, show: Callable[[], None]) -> None:
        """Once nobody reads what is shown (a closed pipe, a lost terminal), the run goes on in silence."""
        if not printed(show):
            self._progress = Silence()


def printed(show: Callable[[], None]) -> bool:
    """Whether what `show` prints was taken; where it was not, standard output leads nowhere from then on."""
    try:
        show()
    except (OSError, SystemExit):  # rich ends the program where a pipe is closed
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


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


def say(text: str) -> None:
    """Print a line before there is anything to track; of several processes the main one speaks."""
    if is_main():
        printed(lambda: terminal.console().print(text, markup=False, highlight=False, soft_wrap=True))


def require_trackers(names: Sequence[str]) -> None:
    """Stop before anything is loaded when a tracker is unknown or its package is missing."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"training.trackers names {name!r}; allowed are {', '.join(sorted(PACKAGES))}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"training.trackers names {name!r}, whose package {PACKAGES[name]} is not installed; "
                f"install it with: pip install {PACKAGES[name]} (or this project with its extra: '.[{name}]')"
            )


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
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._failure = f"warning: {self._name} did not take the last lines within {CLOSE_SECONDS} s"
        text = self.failure()
        if text is not None:
            warnings.warn(text, stacklevel=2)

    def _work(self, open_writer: Callable[[], Writer]) -> None:
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

    def close(self) -> None:
        with writing("the metrics", self._path, note="checkpoints before this are whole"):
            self._file.close()


def _json_line(row: Mapping[str, int | float]) -> str:
    return json.dumps({name: v if math.isfinite(v) else str(v) for name, v in row.items()}) + "\n"


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"),
            purge_step=resume_step or None,
            filename_suffix=f".{resume_step}",  # names go by the second: a quick resume is another file
        )
        self._writer.add_text("config", "```\n" + json.dumps(config, indent=2) + "\n```", resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `dpo`; its environment variables (WANDB_MODE=offline …) apply.

    W&B takes no step twice: of a resumed run the lines since its checkpoint stay as they were written first.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        name = _tracked_as(run_dir, "wandb", resume_step)
        ours = {"project": "dpo", "id": name, "name": name, "dir": str(run_dir)}
        said = {key for key, variable in _WANDB.items() if os.environ.get(variable)}
        chosen = {key: value for key, value in ours.items() if key not in said}
        self._run = wandb.init(**chosen, config=dict(config), resume="allow")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_WANDB = {"project": "WANDB_PROJECT", "id": "WANDB_RUN_ID", "name": "WANDB_NAME", "dir": "WANDB_DIR"}
"""What the environment says goes before what is ours: an argument would override it."""


class Trackio:
    """A run of the local trackio project `dpo` (or TRACKIO_PROJECT); `trackio show` displays it."""

    def __init__(self, run_dir: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        trackio = importlib.import_module("trackio")
        name = _tracked_as(run_dir, "trackio", resume_step)
        project = os.environ.get("TRACKIO_PROJECT") or "dpo"
        self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow", embed=False)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _tracked_as(run_dir: Path, tracker: str, resume_step: int) -> str:
    """What a tracker outside RUN calls the run: the end of its path and some letters, kept in RUN/NAME.run.

    A run that starts afresh gets new letters, so that it never goes on with the curves of an older one that
    had the same directory.
    """
    path = run_dir / f"{tracker}.run"
    if resume_step == 0 or not path.is_file():
        place = re.sub(r"[^\w.-]", "_", "-".join(run_dir.resolve().parts[-2:]))
        replace_text(
            path, f"{place[-80:]}-{secrets.token_hex(3)}\n", what=f"the name of the run in {tracker}"
        )
    return path.read_text(encoding="utf-8").strip()


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
WRITERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


class TimeLeft:
    """Time left, from the median of the last steps, which the first one's compilation does not disturb."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._durations: deque[float] = deque(maxlen=20)

    def after(self, step: int) -> str:
        """Call once a training step; h:mm:ss, or nothing before two steps were seen."""
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            self._durations.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        if not self._durations:
            return ""
        return time_left(statistics.median(self._durations) * max(self._total - step - 1, 0))


def time_left(seconds: float) -> str:
    """As h:mm:ss left."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02} left"


class Terminal:
    """A live bar with time left, loss, accuracy, margin and tokens/s."""

    def __init__(
        self, console: Console, *, total_steps: int, first_step: int, clock: Callable[[], float]
    ) -> None:
        self._time_left = TimeLeft(total_steps, clock)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, shown="", left="")
        self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if not _is_training(metrics):
            return self.message(_heldout_line(step, metrics))
        left = self._time_left.after(step)
        self._bar.update(self._task, completed=step + 1, shown=_shown(metrics), left=left)

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class PlainLines:
    """For logs and pipes: the first step, the last, and one line every few seconds between."""

    def __init__(
        self, console: Console, *, total_steps: int, first_step: int, clock: Callable[[], float]
    ) -> None:
        self._console = console
        self._total = total_steps
        self._time_left = TimeLeft(total_steps, clock)
        self._clock = clock
        self._printed = -math.inf

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if not _is_training(metrics):
            return self.message(_heldout_line(step, metrics))
        left = self._time_left.after(step)
        if step + 1 < self._total and self._clock() - self._printed < PLAIN_INTERVAL:
            return None
        self._printed = self._clock()
        self.message(f"step {step + 1}/{self._total}  {_shown(metrics)}  {left}".rstrip())

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Silence:
    """For processes whose main process speaks."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _is_training(metrics: Mapping[str, int | float]) -> bool:
    return "loss" in metrics


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{word} {metrics[name]:.4g}" for name, word in SHOWN.items() if name in metrics)


def _heldout_line(step: int, metrics: Mapping[str, float]) -> str:
    """Held-out figures in the words of the training lines; others by their own names."""
    named = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    shown = SHOWN if "rewards/accuracies" in named else named
    figures = "  ".join(f"{SHOWN.get(name, name)} {named[name]:.4g}" for name in named if name in shown)
    return f"held out after {step} steps: {figures}"
