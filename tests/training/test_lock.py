import fcntl
import multiprocessing
import os
import shutil
import signal
import socket

import pytest

from dpo.outcomes import EnvironmentFailure, StopRequested, UserError
from dpo.runs import LOCK_FILE
from dpo.training.lock import exclusive


@pytest.mark.parametrize("error", [UserError("no run there"), FileNotFoundError(2, "No such"), KeyError("x")])
def test_whatever_fails_because_the_run_directory_is_gone_names_it(tmp_path, error):
    """By another cause it stays what it was: memory, another process, a run directory that is there."""

    def fail(name, error, *, gone):
        with exclusive(tmp_path / name):
            if gone:
                (tmp_path / name).rename(tmp_path / f"{name} elsewhere")
            raise error

    with pytest.raises(type(error)):
        fail("a", error, gone=False)
    with pytest.raises(EnvironmentFailure, match=f"the run directory {tmp_path}/b was deleted or renamed"):
        fail("b", error, gone=True)
    with pytest.raises(MemoryError):
        fail("c", MemoryError(), gone=True)


@pytest.mark.parametrize(
    "error", [UserError("no model"), KeyError("x"), StopRequested("before the first step")]
)
def test_a_start_that_comes_to_nothing_leaves_nothing_where_nothing_was(tmp_path, error):
    def fail(run_dir, left):
        with exclusive(run_dir):
            (run_dir / "checkpoints").mkdir()
            if left:
                (run_dir / "checkpoints" / left).write_text("saved")
            raise error

    with pytest.raises(type(error)):
        fail(tmp_path / "runs" / "new", None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "old").mkdir(parents=True)
    with pytest.raises(type(error)):
        fail(tmp_path / "runs" / "old", None)
    assert sorted(path.name for path in (tmp_path / "runs" / "old").iterdir()) == ["checkpoints", "lock"]
    with pytest.raises(type(error)):
        fail(tmp_path / "runs" / "begun", "state")
    assert (tmp_path / "runs" / "begun" / "checkpoints" / "state").read_text() == "saved"
    assert (tmp_path / "runs" / "begun" / "lock").is_file()


def test_a_lock_that_its_holder_took_away_is_not_taken_for_the_run_directorys(tmp_path, monkeypatch):
    """Its file was opened before, and was held by nobody any more."""
    run_dir, flock = tmp_path / "new", fcntl.flock
    others = iter([lambda: shutil.rmtree(run_dir)])

    def meanwhile(file, how):
        if file.name == str(run_dir / LOCK_FILE):
            next(others, lambda: None)()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with exclusive(run_dir), pytest.raises(UserError, match="in use"), exclusive(run_dir):
        pass


def hold(run_dir, ready):
    with exclusive(run_dir):
        ready.set()
        signal.pause()


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_stale_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"), exclusive(tmp_path):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with exclusive(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} of {socket.gethostname()}\n"
