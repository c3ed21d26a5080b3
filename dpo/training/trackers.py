"""The trackers that settings may name, each a writer: TensorBoard, W&B, trackio."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dpo.files import replace_text
from dpo.outcomes import UserError
from dpo.runs import TRACKED_AS_FILES

FLUSH_SECONDS = 10.0
"""How often TensorBoard's events reach its file, which it reads while the run goes on."""


@runtime_checkable
class Writer(Protocol):
    """One place that metrics are written to."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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


class TensorBoard:
    """Event files in RUN/tensorboard, written in the caller's thread: a failure is raised where it happens.

    tensorboardX's own writer hands events to a thread of its own; when that one dies (a full disk), whoever
    writes or closes waits for ever, and so does the end of the process.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        events = importlib.import_module("tensorboardX.event_file_writer")
        self._proto = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.summary")
        directory = run_dir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # names go by the second: a quick resume is another file by its ending
        self._events = events.EventsWriter(str(directory / "events"), f".{resume_step}")
        self._flushed = -math.inf
        if resume_step:  # what was written from this step on does not count any more
            self._add(resume_step, file_version="brain.Event:2")
            self._add(resume_step, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))
        text = "```\n" + json.dumps(config, indent=2) + "\n```"
        self._add(resume_step, summary=self._summary.text("config", text))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._add(step, summary=self._summary.scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        self._events.write_event(self._proto.Event(step=step, wall_time=time.time(), **content))


class WeightsAndBiases:
    """A run of the project `dpo`; its environment variables (WANDB_MODE=offline …) apply.

    W&B takes no step twice: of a resumed run the lines since its checkpoint stay as they were written first.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        name = _tracked_as(run_dir, "wandb", resume_step)
        ours = {"project": "dpo", "id": name, "name": name, "dir": str(run_dir), "resume": "allow"}
        said = {key for key, variable in _WANDB.items() if os.environ.get(variable)}
        chosen = {key: value for key, value in ours.items() if key not in said}
        self._run = wandb.init(**chosen, config=dict(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_WANDB = {
    "project": "WANDB_PROJECT",
    "id": "WANDB_RUN_ID",
    "name": "WANDB_NAME",
    "dir": "WANDB_DIR",
    "resume": "WANDB_RESUME",
}
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
    path = run_dir / TRACKED_AS_FILES[tracker]
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
