"""metrics.jsonl reads as if the run had never stopped; nothing is lost, nothing is written twice."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import io
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from dpo.files import WriteError
from dpo.runs import read_metrics
from dpo.training import trackers, tracking
from dpo.training.progress import TimeLeft
from dpo.training.trackers import require_trackers
from dpo.training.tracking import JsonLines, open_trackers

ROOT = Path(__file__).resolve().parents[2]


def log_steps(run_dir: Path, steps: range, *, total: int = 6, names: tuple[str, ...] = (), clock=lambda: 0.0):
    """What a run prints that logs a loss of 0.1 x step."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    with open_trackers(
        run_dir,
        names,
        total_steps=total,
        resume_step=steps.start,
        config={"seed": 0},
        console=console,
        clock=clock,
    ) as tracker:
        if steps.start and steps.start % 3 == 0:
            tracker.log(steps.start, {"eval/accuracy": 0.5})  # done again, as the loop does
        for step in steps:
            tracker.log(step, {"loss": np.float32(0.1 * step), "rewards/margins": 0.25})
            if step % 3 == 2:  # held out, after step + 1 updates
                tracker.log(step + 1, {"eval/accuracy": 0.5})
    return out.getvalue()


def trained_steps(run_dir: Path) -> list[int | float]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


def test_an_interrupted_run_leaves_the_same_lines_as_a_straight_one(tmp_path: Path) -> None:
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    log_steps(tmp_path / "straight", range(6))
    log_steps(tmp_path / "resumed", range(5))
    log_steps(tmp_path / "resumed", range(3, 6))
    straight = (tmp_path / "straight" / "metrics.jsonl").read_text()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_text() == straight
    assert trained_steps(tmp_path / "straight") == [0, 1, 2, 3, 4, 5]


def test_a_full_disk_is_named_also_where_closing_writes_what_is_left(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", resume_step=0)
    lines.write(0, {"loss": 0.5})
    lines._file.close()
    lines._file = Path("/dev/full").open("a")  # noqa: SIM115 (a device that has no room, ever)
    for write in (lambda: lines.write(1, {"loss": 0.4}), lines.close):
        with pytest.raises(WriteError, match=r"the metrics could not be written to .*: No space .*are whole"):
            write()
    assert trained_steps(tmp_path) == [0]


class Failing:
    """A tracker that fails, or never comes back, at one of its three moments."""

    def __init__(self, moment: str, fail: Callable[[], None]) -> None:
        self._moment, self._fail = moment, fail
        self._reach("open")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._reach("write")

    def close(self) -> None:
        self._reach("close")

    def _reach(self, moment: str) -> None:
        if moment == self._moment:
            self._fail()


@pytest.mark.parametrize("moment", ["open", "write", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail() -> None:
        raise KeyError("no such project")

    monkeypatch.setitem(trackers.PACKAGES, "own", "json")
    monkeypatch.setitem(trackers.WRITERS, "own", lambda *_: Failing(moment, fail))
    with warnings.catch_warnings(record=True, action="always") as warned:
        printed = log_steps(tmp_path, range(6), names=("own",))
    said = printed + "".join(str(warning.message) for warning in warned)
    assert said.count("warning: own failed and is left out from here on") == 1
    assert "KeyError: 'no such project'" in said
    assert trained_steps(tmp_path) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("moment", ["open", "write", "close"])
def test_a_tracker_that_never_comes_back_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    goes_on = threading.Event()

    def wait() -> None:
        goes_on.wait()

    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.1)
    monkeypatch.setitem(trackers.PACKAGES, "own", "json")
    monkeypatch.setitem(trackers.WRITERS, "own", lambda *_: Failing(moment, wait))
    with pytest.warns(UserWarning, match=r"own did not take the last lines within 0\.1 s"):
        log_steps(tmp_path, range(6), names=("own",))
    assert trained_steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    goes_on.set()


def test_a_full_disk_under_tensorboard_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no thread, nor anything that the end of the process would wait for."""
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    monkeypatch.setattr(record_writer, "open_file", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    monkeypatch.setattr(atexit, "register", lambda *_, **__: pytest.fail("waits for it at the end"))
    before = threading.active_count()
    with warnings.catch_warnings(record=True, action="always") as warned:
        said = log_steps(tmp_path, range(6), names=("tensorboard",))
    said += "".join(str(warning.message) for warning in warned)
    assert "tensorboard failed and is left out from here on" in said
    assert "No space left on device" in said
    assert trained_steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert threading.active_count() == before


def test_metrics_that_were_deleted_are_not_written_into_nothing(tmp_path: Path) -> None:
    """Also where another file has got their name meanwhile."""
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, resume_step=0)
    lines.write(0, {"loss": 1.0})
    for _ in range(2):
        path.unlink(missing_ok=True)
        with pytest.raises(
            WriteError, match=rf"the metrics could not be written to {path}: {path} was deleted"
        ):
            lines.write(1, {"loss": 1.0})
        path.write_text("another's\n")
    lines.close()


def test_a_last_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    log_steps(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert trained_steps(tmp_path) == [0, 1, 2]
    log_steps(tmp_path, range(3, 5))
    assert trained_steps(tmp_path) == [0, 1, 2, 3, 4]


def test_a_run_that_starts_afresh_drops_what_was_there(tmp_path: Path) -> None:
    log_steps(tmp_path, range(5))
    log_steps(tmp_path, range(2))
    assert trained_steps(tmp_path) == [0, 1]


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with open_trackers(tmp_path, [], total_steps=2, resume_step=0, config={}) as tracker:
        tracker.log(0, {"loss": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_non_finite_values_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    with open_trackers(tmp_path, [], total_steps=1, resume_step=0, config={}) as tracker:
        tracker.log(0, {"loss": float("nan"), "grad_norm": float("inf")})
    path = tmp_path / "metrics.jsonl"
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = read_metrics(path)[0]
    assert np.isnan(row["loss"])
    assert row["grad_norm"] == np.inf


def test_plain_lines_are_few_and_end_with_the_last_step(tmp_path: Path) -> None:
    seconds = iter(range(10_000))
    lines = log_steps(tmp_path, range(60), total=60, clock=lambda: float(next(seconds))).splitlines()
    printed = [line for line in lines if line.startswith("step")]
    assert printed[0].startswith("step 1/60  loss 0  margin 0.25")
    assert printed[-1].startswith("step 60/60")
    assert len(printed) < 25


def test_held_out_metrics_and_messages_are_printed_at_once(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_trackers(
        tmp_path, [], total_steps=9, resume_step=0, config={}, console=Console(file=out, width=200)
    ) as tracker:
        tracker.log(4, {"eval/loss": 0.5, "eval/rewards/accuracies": 0.75, "eval/logps/chosen": -70.0})
        tracker.log(5, {"eval/loss": 0.5, "eval/logps/chosen": -70.0})  # without a pair
        tracker.message("saved [step 3]")
    assert out.getvalue().splitlines() == [
        "held out after 4 steps: loss 0.5  accuracy 0.75",
        "held out after 5 steps: loss 0.5  logps/chosen -70",
        "saved [step 3]",
    ]


def test_the_live_bar_shows_the_figures_and_the_time_left(tmp_path: Path) -> None:
    out = io.StringIO()
    seconds = iter(range(10_000))
    console = Console(file=out, width=160, force_terminal=True, color_system=None)
    with open_trackers(
        tmp_path,
        [],
        total_steps=100,
        resume_step=0,
        config={},
        console=console,
        clock=lambda: float(next(seconds)),
    ) as tracker:
        for step in range(40):
            tracker.log(step, {"loss": 0.5, "rewards/accuracies": 0.9, "tokens/s": 321.0})
    last = next(line for line in reversed(out.getvalue().splitlines()) if "step" in line)
    assert "40/100" in last
    assert "loss 0.5  accuracy 0.9  tokens/s 321" in last
    assert "0:01:00 left" in last


def test_compilation_in_the_first_steps_does_not_stretch_the_time_left() -> None:
    """The first step and the second each compile a program, and so does the fourth."""
    times = iter([0.0, 100.0, 101.0, 201.0, 202.0])
    time_left = TimeLeft(total_steps=5, clock=lambda: next(times))
    assert [time_left.after(step) for step in range(5)] == ["", "", *(f"0:00:0{k} left" for k in (2, 1, 0))]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'wandb', whose package wandb is not installed.*'\.\[wandb\]'"):
        require_trackers(["wandb"])


def test_an_unknown_tracker_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'mlflow'; allowed are tensorboard, trackio, wandb"),
        open_trackers(tmp_path, ["mlflow"], total_steps=1, resume_step=0, config={}),
    ):
        pass


def test_tensorboard_files_hold_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    log_steps(tmp_path, range(3), names=("tensorboard",))
    values = {}
    (path,) = (tmp_path / "tensorboard").glob("events.*")
    data = path.read_bytes()
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        values |= {(event.step, v.tag): v.simple_value for v in event.summary.value if v.tag == "loss"}
        data = data[16 + length :]
    assert values == {(step, "loss"): pytest.approx(0.1 * step) for step in range(3)}


def test_tensorboard_itself_reads_the_files_of_an_interrupted_run(tmp_path: Path) -> None:
    """What was written after the checkpoint and again after the resume is there once."""
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_steps(tmp_path, range(5), names=("tensorboard",))
    log_steps(tmp_path, range(3, 6), names=("tensorboard",))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == [0, 1, 2, 3, 4, 5]
    assert [scalar.value for scalar in scalars] == pytest.approx([0.1 * step for step in range(6)])
    assert {"loss", "rewards/margins", "eval/accuracy"} <= set(events.Tags()["scalars"])


def test_trackio_keeps_a_run_without_network(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where to write when it is imported, and starts threads."""
    pytest.importorskip("trackio")
    code = """
import json, socket, sys
from pathlib import Path

from dpo.training.tracking import open_trackers

def refuse(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"connects to {address}")
    return connect(self, address)

connect, socket.socket.connect = socket.socket.connect, refuse
run_dir = Path(sys.argv[1])
with open_trackers(run_dir, ["trackio"], total_steps=3, resume_step=0, config={"seed": 0}) as tracker:
    for step in range(3):
        tracker.log(step, {"loss": 0.1 * step, "rewards/margins": 0.25})
"""
    run_dir = tmp_path / "runs" / "one"
    run_dir.mkdir(parents=True)
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").glob("dpo*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    name = (run_dir / "trackio.run").read_text().strip()
    assert name.startswith("runs-one-")
    assert [(found, step) for found, step, _ in rows] == [(name, step) for step in range(3)]
    losses = [json.loads(metrics)["loss"] for _, _, metrics in rows]
    assert losses == pytest.approx([0.0, 0.1, 0.2])


def test_a_fresh_start_is_another_run_to_a_tracker_outside_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B drops steps that it has seen and trackio shows them twice: a new run is not to continue an old."""
    started: list[dict] = []

    class FakeRun:
        def log(self, metrics: dict, step: int) -> None:
            started[-1].setdefault("steps", []).append(step)

        def finish(self) -> None:
            started[-1]["finished"] = True

    def init(**options) -> FakeRun:
        started.append(options)
        return FakeRun()

    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "a/b #1"
    run_dir.mkdir(parents=True)
    for steps in (range(3), range(3, 6), range(2)):
        log_steps(run_dir, steps, names=("wandb",))
    first, resumed, fresh = (one["id"] for one in started)
    assert first == resumed != fresh
    assert re.fullmatch(r"a-b__1-[0-9a-f]{6}", first), "letters that W&B allows in an id"
    assert started[1]["steps"] == [3, 3, 4, 5, 6], (
        "a held-out evaluation has the step of the next training line"
    )
    assert all(one["finished"] for one in started)
    assert {one["project"] for one in started} == {"dpo"}
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "my run")
    monkeypatch.setenv("WANDB_RESUME", "never")
    log_steps(run_dir, range(1), names=("wandb",))
    ours = {"project", "name", "id", "dir", "resume"}
    assert started[-2].keys() & ours == ours
    assert started[-1].keys() & ours == {"id", "dir"}, "W&B reads the rest itself"
    assert not any("entity" in one for one in started), "WANDB_ENTITY is W&B's to read"


def test_trackio_is_told_the_project_that_its_variable_says(tmp_path: Path, monkeypatch) -> None:
    """And nothing that another of its variables could say (TRACKIO_DIR, TRACKIO_SPACE_ID …)."""
    started: list[dict] = []
    fake = ModuleType("trackio")
    fake.__spec__ = ModuleSpec("trackio", None)
    run = SimpleNamespace(log=lambda metrics, step: None, finish=lambda: None)
    monkeypatch.setattr(fake, "init", lambda **options: started.append(options) or run, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for variable in ("", "mine"):
        monkeypatch.setenv("TRACKIO_PROJECT", variable)
        log_steps(tmp_path, range(1), names=("trackio",))
    assert [one["project"] for one in started] == ["dpo", "mine"]
    assert all(one.keys() == {"project", "name", "config", "resume", "embed"} for one in started)


def test_wandb_keeps_a_run_offline(tmp_path: Path) -> None:
    """In a process of its own, without a key; what was written is read with W&B's own reader."""
    pytest.importorskip("wandb")
    code = """
import sys
from pathlib import Path

from dpo.training.tracking import open_trackers

run_dir = Path(sys.argv[1])
with open_trackers(run_dir, ["wandb"], total_steps=3, resume_step=0, config={"seed": 0}) as tracker:
    for step in range(3):
        tracker.log(step, {"loss": 0.1 * step, "rewards/margins": 0.25})
    tracker.log(3, {"eval/loss": 0.5})
"""
    run_dir = tmp_path / "runs" / "one"
    run_dir.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"WANDB_MODE": "offline"}, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert (run_dir / "wandb.run").read_text().strip() in path.name
    history = read_wandb(path)
    assert [row["_step"] for row in history] == [0, 1, 2, 3]
    assert [row["loss"] for row in history[:3]] == pytest.approx([0.0, 0.1, 0.2])
    assert history[3]["eval/loss"] == 0.5


def read_wandb(path: Path) -> list[dict]:
    """The lines of the history in a .wandb file: blocks of 32 KiB with records, whole or in parts."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    data, position, whole, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if -position % 32_768 in range(1, 7):  # no room for a header (checksum, length, kind)
            position += -position % 32_768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(whole)
            items = record.history.item
            rows += (
                [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}] if items else []
            )
            whole = b""
    return rows


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damaged in ("{]", '"text"', '{"step": 1, "loss": []}'):
        path.write_text('{"step": 0, "loss": 1.0}\n' + damaged + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is damaged"):
            read_metrics(path)
