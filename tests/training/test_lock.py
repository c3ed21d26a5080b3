import multiprocessing
import os
import signal
import socket

import pytest

from dpo.outcomes import EnvironmentFailure, UserError
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
