"""Starts without progress are counted, and the last of them is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo.outcomes import STOPPED, STOPPED_AT_ONCE, NoProgressError, PeerLostError, UserError
from dpo.runs import STARTS_FILE
from dpo.training.starts import MOST_STARTS, counted_start, hung_before, note_progress


def lose(run_dir: Path, *, hangs: bool | None = None, keeps: bool = False) -> None:
    """A start that is lost; with `hangs`, after both of its processes hung, and whether one did before.

    One that `keeps` has written log-probs of the reference.
    """

    def run() -> None:
        with counted_start(run_dir):
            if keeps:
                note_progress(run_dir)
            if hangs is not None:
                assert [hung_before(run_dir), hung_before(run_dir)] == [hangs, hangs]
            raise PeerLostError("gone")

    with pytest.raises(PeerLostError):
        run()


def test_starts_that_save_nothing_end_as_an_error_once(tmp_path: Path) -> None:
    for _ in range(MOST_STARTS):
        lose(tmp_path)
    with pytest.raises(NoProgressError, match=f"last {MOST_STARTS} starts"), counted_start(tmp_path):
        pass
    lose(tmp_path)


def test_a_checkpoint_or_an_end_of_its_own_begins_the_count_anew(tmp_path: Path) -> None:
    for i in range(1, 2 * MOST_STARTS):
        (tmp_path / "checkpoints" / str(i)).mkdir(parents=True)
        lose(tmp_path)
    with counted_start(tmp_path):
        assert (tmp_path / STARTS_FILE).exists()
    assert not (tmp_path / STARTS_FILE).exists()
    with pytest.raises(UserError), counted_start(tmp_path):
        raise UserError("wrong data")
    assert not (tmp_path / STARTS_FILE).exists()


def test_log_probs_that_were_kept_begin_the_count_anew(tmp_path: Path) -> None:
    """A reference takes hours on machines that are taken away every few minutes."""
    for _ in range(2 * MOST_STARTS):
        lose(tmp_path, keeps=True)


def test_the_second_start_whose_steps_hang_is_told_from_the_first(tmp_path: Path) -> None:
    for expected in (False, True):
        lose(tmp_path, hangs=expected)


def test_a_stop_where_no_exception_comes_through_is_not_counted(tmp_path: Path) -> None:
    """As in a compilation or an import: the process ends by itself, and was not killed."""
    program = """
import hashlib, os, signal, sys, threading
from pathlib import Path
from dpo.training import interrupt
from dpo.training.starts import counted_start
interrupt.SOON = 0.3
with interrupt.stops_at_once(), counted_start(Path(sys.argv[1])):
    print((Path(sys.argv[1]) / "starts.json").exists(), flush=True)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()  # when the next line is on its way
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert (ended.returncode, ended.stdout) == (STOPPED.code, "True\n"), ended.stderr
    assert not (tmp_path / STARTS_FILE).exists()


def test_a_start_that_a_second_signal_ends_is_not_counted(tmp_path: Path) -> None:
    """It was not killed by anything but who asked, and no launcher starts it again."""
    program = """
import os, signal, sys, time
from pathlib import Path
from dpo.training.interrupt import SAME_REQUEST, stop_requests
from dpo.training.starts import counted_start
with counted_start(Path(sys.argv[1])), stop_requests():
    print((Path(sys.argv[1]) / "starts.json").exists(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAME_REQUEST + 0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert (ended.returncode, ended.stdout) == (STOPPED_AT_ONCE.code, "True\n")
    assert not (tmp_path / STARTS_FILE).exists()
