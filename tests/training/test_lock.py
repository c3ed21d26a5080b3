import multiprocessing
import os
import signal
import socket

import pytest

from dpo.training.lock import exclusive


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
