"""Starts of a run that came to nothing: launchers start a run again and again, and somebody has to say stop.

`RUN/starts.json` counts the starts since something was last saved, and those that ended because a step hung.
A start that ends by itself (finished, stopped as asked, refused) removes it; one that was killed, that lost
another process or hung leaves it behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict

from dpo.files import replace_text
from dpo.outcomes import STOPPED, NoProgressError, outcome_of
from dpo.runs import CHECKPOINTS_DIRECTORY, STARTS_FILE
from dpo.training.interrupt import before_a_stop

MOST_STARTS = 10
"""Starts in a row that may end in being killed or in a lost process with nothing saved."""


class _Starts(TypedDict):
    """What `STARTS_FILE` holds."""

    step: int
    """Of the newest checkpoint; with another one the count begins anew."""
    starts: int
    hung: list[int]
    """Which of the starts ended because a step hung."""


@contextmanager
def counted_start(run_dir: Path) -> Iterator[None]:
    """Count this start, and forget the count when it ends by itself.

    Raises:
      NoProgressError: when so many before it have saved nothing; it is said once, and the count begins anew.
    """
    record = _read(run_dir)
    if record["starts"] >= MOST_STARTS:
        (run_dir / STARTS_FILE).unlink(missing_ok=True)
        raise NoProgressError(
            f"the last {MOST_STARTS} starts of {run_dir} were killed, or lost another process, and saved "
            f"no checkpoint after step {record['step']} and no log-probs. Look at what ended them (memory of "
            "the host, a network, a node); a smaller training.save_minutes makes shorter ways count. "
            "The next start counts from one"
        )
    _write(run_dir, {**record, "starts": record["starts"] + 1})
    try:
        with before_a_stop(partial(note_progress, run_dir)):
            yield
    except BaseException as error:
        if outcome_of(error) is STOPPED or not outcome_of(error).goes_on:
            (run_dir / STARTS_FILE).unlink(missing_ok=True)
        raise
    (run_dir / STARTS_FILE).unlink(missing_ok=True)


def note_progress(run_dir: Path) -> None:
    """Begin the count anew: this start was asked to stop, or has kept what the next need not do."""
    (run_dir / STARTS_FILE).unlink(missing_ok=True)


def hung_before(run_dir: Path) -> bool:
    """Note that a step of this start hangs; whether one of an earlier start did, with nothing saved since."""
    record = _read(run_dir)
    earlier = any(start != record["starts"] for start in record["hung"])
    if record["starts"] not in record["hung"]:
        _write(run_dir, {**record, "hung": [*record["hung"], record["starts"]]})
    return earlier


def _read(run_dir: Path) -> _Starts:
    """The count since the newest checkpoint that is there."""
    directory, path = run_dir / CHECKPOINTS_DIRECTORY, run_dir / STARTS_FILE
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    step = max((int(name) for name in names if name.isdecimal()), default=0)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["step"] == step:
            return {"step": step, "starts": int(record["starts"]), "hung": list(record["hung"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or not one of ours: count anew
        pass
    return {"step": step, "starts": 0, "hung": []}


def _write(run_dir: Path, record: _Starts) -> None:
    replace_text(run_dir / STARTS_FILE, json.dumps(record) + "\n", what="the count of starts")
