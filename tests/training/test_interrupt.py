"""Signals, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo.outcomes import STOPPED, STOPPED_AT_ONCE, StopRequested, outcome_of
from dpo.training import interrupt
from dpo.training.interrupt import (
    SAME_REQUEST,
    stop_requests,
    stoppable,
    stops_at_once,
)

WAITING = """
import time
from dpo.training.interrupt import stop_requests
with stop_requests(last=lambda: print("last", flush=True)) as stop_requested:
    print("ready", flush=True)
    while not stop_requested():
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


BUSY = """
import hashlib
from dpo.training import interrupt
interrupt.SOON = 0.5
with interrupt.{context}():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a compilation, it lets no exception in
"""


def start(*prefix: str, program: str = WAITING) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )


def stop_twice(process: subprocess.Popen, pid: int, number: signal.Signals) -> tuple[int, str]:
    """Both signals, each when the process is ready for it; returns how it ended and what it said of that."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(pid, number)
    assert process.stdout.readline() == "asked\n"
    time.sleep(SAME_REQUEST + 0.1)
    os.kill(pid, number)
    printed, said = process.communicate(timeout=30)
    assert printed == "last\n", "what is to be done before it ends"
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends_the_process(number):
    process = start()
    code, said = stop_twice(process, process.pid, number)
    assert code == 130
    assert f"second signal ({number.name})" in said


def test_the_first_process_of_a_container_answers_too():
    """The kernel ignores signals for process 1 unless it has handlers for them."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("no namespace of processes can be made here")
    process = start("unshare", "--pid", "--fork", "--kill-child")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split():
        time.sleep(0.01)
    code, _ = stop_twice(process, int(children.read_text().split()[0]), signal.SIGTERM)
    assert code == 130


def test_one_request_that_is_delivered_twice_is_one():
    with stop_requests() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()


def test_handlers_are_as_they_were_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_stoppable_function_does_not_begin_once_a_stop_was_asked_for():
    asked = False

    def twice(x: int) -> int:
        return 2 * x

    double = stoppable(twice, lambda: asked)
    assert double(3) == 6
    asked = True
    with pytest.raises(StopRequested):
        double(3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_where_nothing_is_to_be_saved_a_signal_is_an_exception_that_nobody_takes_for_an_error(
    number, request
):
    before = signal.signal(number, signal.SIG_DFL)  # which nohup and a test's worker ignore
    request.addfinalizer(lambda: signal.signal(number, before))

    def ask() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Exception as error:  # as a library might
            raise AssertionError from error

    with pytest.raises(StopRequested), stops_at_once():
        ask()
    assert outcome_of(StopRequested()) is STOPPED


@pytest.mark.parametrize(
    ("context", "code", "words"),
    [
        ("stops_at_once", STOPPED.code, "the same command goes on"),
        ("ends_at_once", STOPPED_AT_ONCE.code, "stopped at once: by SIGTERM"),
    ],
)
def test_where_no_exception_comes_through_the_process_ends_soon_all_the_same(context, code, words):
    process = start(program=BUSY.format(context=context))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)  # until it is busy
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/bin/dpo", "train", "--config=a.yaml"], "dpo train: "),
        (["/lib/dpo/__main__.py", "export"], "dpo export: "),
        (["/bin/dpo"], "dpo: "),
        (["/home/somebody/study.py", "train"], ""),
        (["-c"], ""),
    ],
)
def test_who_ends_at_once_names_the_command(argv, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert interrupt._speaker() == said


HOLDING = """
import os, signal, time
from dpo.training.interrupt import answer_held_signals, hold_signals, stops_at_once
hold_signals()
with stops_at_once():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print("ready", flush=True)
    answer_held_signals()
    time.sleep(20)
"""


def test_signals_that_come_before_anybody_answers_wait():
    """In a process of its own: another thread, which holds none back, would take them."""
    process = start(program=HOLDING)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    _, said = process.communicate(timeout=30)
    assert "StopRequested" in said


IMPORTING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test's worker may ignore
from dpo.training import interrupt
with interrupt.{context}():
    import interrupted
"""


@pytest.mark.parametrize(
    ("context", "number", "code"),
    [("stops_at_once", signal.SIGTERM, STOPPED.code), ("ends_at_once", signal.SIGINT, 130)],
)
def test_a_signal_in_the_middle_of_an_import_raises_nothing_there(context, number, code, tmp_path):
    """An exception in a module's C code may end as a segmentation fault."""
    (tmp_path / "interrupted.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    while True: pass\n"
        "except BaseException:\n    os._exit(139)\n"
    )
    program = [sys.executable, "-c", IMPORTING.format(context=context), str(tmp_path)]
    done = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith("stopped ")
