"""The process asks for huge pages once, where the system gives them on request, and leaves settings alone."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from dpo.__main__ import HUGE_PAGES, TUNABLES, wants_huge_pages

LIBC = platform.libc_ver()[0]


@pytest.mark.skipif(LIBC != "glibc", reason="only glibc has the setting")
@pytest.mark.parametrize(
    ("kernel", "setting", "wanted"),
    [
        ("always [madvise] never", None, True),
        ("[always] madvise never", None, False),
        ("always madvise [never]", None, False),
        ("always [madvise] never", "", False),
        ("always [madvise] never", "glibc.malloc.check=3", False),
    ],
)
def test_huge_pages_are_asked_for_where_they_are_given_and_nothing_is_set(
    tmp_path, monkeypatch, kernel, setting, wanted
):
    monkeypatch.delenv(TUNABLES, raising=False)
    if setting is not None:
        monkeypatch.setenv(TUNABLES, setting)
    file = tmp_path / "enabled"
    file.write_text(kernel + "\n")
    assert wants_huge_pages(file) is wanted


def test_a_kernel_that_does_not_say_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(TUNABLES, raising=False)
    assert not wants_huge_pages(tmp_path / "absent")


def test_the_command_keeps_its_arguments_and_exit_code_when_started_anew():
    environment = {key: value for key, value in os.environ.items() if key != TUNABLES}
    command = [sys.executable, "-m", "dpo", "no such command"]
    started = [
        subprocess.run(command, capture_output=True, text=True, env=env)
        for env in (environment, environment | {TUNABLES: HUGE_PAGES})
    ]
    assert [done.returncode for done in started] == [2, 2]
    assert all("'no such command' is not a command" in done.stderr for done in started)


def test_the_command_does_not_ask_for_torch():
    """Where torch is missing, transformers says at its import that models can't be used: they are ours."""
    hidden = "import sys; sys.modules['torch'] = None; from dpo.__main__ import run; run()"
    command = [sys.executable, "-c", hidden, "generate", "/no/such/model", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "PyTorch" not in done.stderr + done.stdout


NO_ROOM = "dpo: error: standard output could not be written: No space left on device\n"


@pytest.mark.parametrize(
    ("where", "code", "said"), [("<&- >&- 2>&-", 0, ""), ("| true", 0, ""), (">/dev/full", 1, NO_ROOM)]
)
def test_a_command_whose_output_nobody_takes_ends_as_it_would_and_a_full_disk_is_said(where, code, said):
    command = f"set -o pipefail; {sys.executable} -m dpo --version {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


BUG = """
import sys
from dpo import __main__ as main, cli
def fail(arguments):
    raise KeyError("weight")
cli.COMMANDS["inspect"] = fail
sys.argv = ["dpo", "inspect"]
raise SystemExit(main.run())
"""


def test_a_bug_is_said_behind_its_traceback_as_other_ends_are() -> None:
    environment = os.environ | {TUNABLES: HUGE_PAGES}
    done = subprocess.run([sys.executable, "-c", BUG], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    first, *_, cause, last = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert cause == "KeyError: 'weight'"
    assert last == "dpo inspect: unexpected error: KeyError: 'weight'"


HELD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test's worker may ignore
from dpo import __main__ as main
here = main.{place}
def interrupted(*given):
    os.kill(os.getpid(), signal.SIGINT)
    return here(*given)
main.{place} = interrupted
sys.argv = ["dpo", "{command}", "--help"]
raise SystemExit(main.run())
"""


@pytest.mark.parametrize("place", ["wants_huge_pages", "answer_held_signals", "command"])
@pytest.mark.parametrize(("command", "code"), [("inspect", 130), ("generate", 130), ("winrate", 75)])
def test_ctrl_c_in_the_first_moments_ends_a_command_without_a_traceback(place, command, code):
    """Before it starts anew, before it answers signals, and while it is imported."""
    program = HELD.format(place=place, command=command)
    environment = os.environ | {TUNABLES: HUGE_PAGES}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    begins = {130: "stopped at once: by Ctrl-C", 75: "stopped as asked: "}[code]
    assert begins in done.stderr
    assert "Traceback" not in done.stderr


AT_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a test's worker may ignore
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["inspect --config sentiment_pairs", "report nowhere", "winrate --run nowhere"]
)
def test_ctrl_c_at_any_moment_of_the_first_second_ends_a_command_without_a_traceback(command):
    code = 75 if command.startswith("winrate") else 130
    for hundredths in range(15, 100, 6):
        process = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, "-m", "dpo", *command.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(hundredths / 100)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        ended = ": error: nowhere" in said  # by its settings; the signal came as the interpreter closed
        assert process.returncode == code or ended, (hundredths, process.returncode, said)
        assert "Traceback" not in said


@pytest.mark.ci
def test_a_command_and_the_report_after_it_run_as_they_are_started():
    """What `run` does to the process before a command must not be in the way of any library's import."""
    program = (
        "import sys; from dpo import __main__ as main; "
        "main.command = lambda: __import__('dpo.pages.report') and __import__('dpo.judging.match') and 7; "
        "sys.argv = ['dpo', 'train']; sys.exit(main.run())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


def test_a_start_imports_nothing_that_its_first_step_does_not_need():
    """Each of them takes a good part of a start (`python -m benchmarks.start`)."""
    program = (
        "import sys; from dpo import __main__ as main; main.command = lambda: 0; "
        "sys.argv = ['dpo', 'train']; main.run(); import dpo.training.loop; "
        "print([name for name in ('jax.experimental.pallas.ops.tpu',) if sys.modules.get(name)])"
    )
    environment = os.environ | {TUNABLES: HUGE_PAGES}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("setting", ["model.source", "model.reference"])
def test_a_model_that_is_not_there_is_refused_at_once_and_leaves_nothing(tmp_path, setting):
    """Before what opens one is imported, which takes ten seconds of a slow machine."""
    program = (
        "import sys; from dpo import __main__ as main; code = main.run(); "
        "print(code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    words = ["train", f"--{setting}={tmp_path}/WRONG", f"--run_dir={tmp_path}/run"]
    environment = os.environ | {TUNABLES: HUGE_PAGES}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "2 []", done.stderr
    assert f"dpo train: error: {setting}: no model at '{tmp_path}/WRONG'; allowed: a directory" in done.stderr
    assert list(tmp_path.iterdir()) == []
