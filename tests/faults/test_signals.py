"""Real signals to the command line while it samples, judges and exports: how it ends, and that it goes on.

(Runs of training are stopped in `test_resume.py`.) A reward of the user's own says that it is asked, and
takes its time until a file is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from compiling import LIGHTLY, lightly
from cpu_times import crowding

from dpo.files import damaged_files
from dpo.outcomes import STOPPED, STOPPED_AT_ONCE
from dpo.training.interrupt import SIGNALS
from dpo.training.lock import is_held

JUDGE = """
import pathlib, time
HERE = pathlib.Path(__file__).parent
def letters(prompt, response):
    (HERE / "asked").touch()
    if not (HERE / "go").exists():
        time.sleep(1.0)
    return response.count("e")
"""
HELD_UP = """
import importlib, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test's worker may ignore
place = importlib.import_module(sys.argv[1])
def slowly(*given, **named):
    pathlib.Path("asked").touch()
    time.sleep(120)
setattr(place, sys.argv[2], slowly)
del sys.argv[1:3]
from dpo.__main__ import run
raise SystemExit(run())
"""
AT_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a test's worker may ignore
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Begin a command in a directory of its own that holds the judge and data."""
    (tmp_path / "slow.py").write_text(JUDGE)
    for name in ("train", "eval"):
        rows = [
            {"prompt": f"{name} {i}", "responses": ["eee", "e then", "no"], "scores": [3.0, 2.0, 0.0]}
            for i in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = lightly(os.environ) | {
        "DPO_CACHE": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": LIGHTLY,  # and one device
        "GLIBC_TUNABLES": "",
    }

    def begin(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def interrupted(process: subprocess.Popen[str], asked_at: Path, number: signal.Signals) -> tuple[int, str]:
    """Signal it once a file says that it is where it should be; returns how it ended and what it said."""
    while not ((asked_at / "asked").exists() or asked_at.is_file()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    asked = time.monotonic()
    printed, said = process.communicate(timeout=3600)
    assert time.monotonic() - asked < 30 * crowding()
    return process.returncode, printed + said


def finished(process: subprocess.Popen[str]) -> str:
    printed, said = process.communicate(timeout=3600)
    assert process.returncode == 0, said
    return printed


def winrate(model: Path) -> list[str]:
    return [
        *("-m", "dpo", "winrate", f"--policy={model}", f"--opponent={model}", "--data=eval.jsonl"),
        *("--output=out", "--max_new_tokens=6", "--judge=slow:letters", "--limit=6"),
    ]


FRONTIER = [
    *("frontier", "--output=out", "--model=MODEL", "--train=train.jsonl"),
    *("--eval=eval.jsonl", "--reward=slow:letters", "--objectives=[dpo]", "--betas=[0.5]"),
    *("--temperature_beta=0.5", "--temperatures=[1]", "--steps=2", "--eval_every=1", "--batch_size=4"),
    *("--prompts=2", "--max_new_tokens=4", "--best_of=2"),
]


def frontier(model: Path) -> list[str]:
    return ["-m", "dpo", *(word.replace("MODEL", str(model)) for word in FRONTIER)]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(("command", "kept"), [(winrate, "samples.jsonl"), (frontier, "points.jsonl")])
def test_a_signal_ends_it_as_a_stop_and_the_same_command_goes_on(
    start: Start, tmp_path: Path, tiny_model_dir: Path, command, kept: str, number: signal.Signals
) -> None:
    code, said = interrupted(start(*command(tiny_model_dir)), tmp_path, number)
    assert code == 75, said
    assert "stopped as asked" in said
    assert "Traceback" not in said
    before = (tmp_path / "out" / kept).read_bytes() if (tmp_path / "out" / kept).exists() else b""
    (tmp_path / "go").touch()
    finished(start(*command(tiny_model_dir)))
    assert (tmp_path / "out" / kept).read_bytes().startswith(before)


class Place(NamedTuple):
    """Where a command is when the signal comes, and how it ends."""

    command: tuple[str, ...]
    module: str
    function: str
    number: signal.Signals
    code: int


MODEL = "MODEL"


def of_model(words: Sequence[str], directory: Path) -> list[str]:
    """A command's words with the model's directory in its place."""
    return [word.replace(MODEL, str(directory)) for word in words]


COMPARED = ("--policy", MODEL, "--opponent", MODEL, "--data", "eval.jsonl", "--limit", "2", "--output", "out")
TRAINED = (
    *("--model.source", MODEL, "--data.train", "train.jsonl", "--training.steps", "1"),
    *("--training.batch_size", "2"),
)
PLACES = {
    "read data": Place(
        ("inspect", *TRAINED), "dpo.commands.inspect", "report_data", signal.SIGHUP, STOPPED_AT_ONCE.code
    ),
    "plan": Place(
        ("plan", *TRAINED, "--data.eval", "null"),
        *("dpo.planning.search", "make_plan_within_limit", signal.SIGTERM, STOPPED_AT_ONCE.code),
    ),
    "answer": Place(
        ("generate", MODEL, "hello"), "dpo.pages.chat", "stream", signal.SIGTERM, STOPPED_AT_ONCE.code
    ),
    "score held-out": Place(
        ("evaluate", "--policy", MODEL, "--reference", MODEL, "--data", "eval.jsonl"),
        *("dpo.evaluation.heldout", "_score_policy", signal.SIGHUP, STOPPED.code),
    ),
    "sample": Place(
        ("winrate", *COMPARED, "--judge", "slow:letters"),
        *("dpo.judging.samples", "generate", signal.SIGHUP, STOPPED.code),
    ),
    "judge by a model": Place(
        ("winrate", *COMPARED, "--judge", f"local:{MODEL}"),
        *("dpo.judging.local_judge", "load_policy", signal.SIGINT, STOPPED.code),
    ),
    "between two runs": Place(tuple(FRONTIER), "jax", "clear_caches", signal.SIGHUP, STOPPED.code),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_signal_ends_every_command_wherever_it_is(
    start: Start, tmp_path: Path, tiny_model_dir: Path, place: Place
) -> None:
    words = of_model(place.command, tiny_model_dir)
    process = start("-c", HELD_UP, place.module, place.function, *words)
    code, said = interrupted(process, tmp_path, place.number)
    assert code == place.code, said
    assert "stopped" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_an_export_leaves_none_in_part(
    start: Start, tmp_path: Path, tiny_model_dir: Path, number: signal.Signals
) -> None:
    words = of_model(TRAINED, tiny_model_dir)
    finished(start("-m", "dpo", "train", *words, "--data.eval=null", "--run_dir=run"))
    export = ("export", "run", "--output=out")
    process = start("-c", HELD_UP, "dpo.huggingface.saving", "_save_weights", *export)
    code, said = interrupted(process, tmp_path, number)
    assert code == STOPPED_AT_ONCE.code, said
    assert "dpo export: stopped at once: by " in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out*"))
    finished(start("-m", "dpo", *export))
    assert damaged_files(tmp_path / "out") == []
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def sweep_of_two(model: Path) -> tuple[str, ...]:
    """The words of a sweep of two runs, beta=0.1 first."""
    words = of_model(TRAINED, model)
    sweep = ("-m", "dpo", "sweep", *words, "--data.eval=eval.jsonl", "--sweep_dir=out")
    return (*sweep, "--over=objective.beta=[0.1,0.5]")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_a_sweep_stops_its_run_and_it(
    start: Start, tmp_path: Path, tiny_model_dir: Path, number: signal.Signals
) -> None:
    process = start(*sweep_of_two(tiny_model_dir))
    lock = tmp_path / "out" / "beta=0.1" / "lock"
    code, said = interrupted(process, lock, number)
    assert code == STOPPED.code, said
    assert "Traceback" not in said
    assert not is_held(lock.parent)
    assert not (tmp_path / "out" / "beta=0.5").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_to_a_sweep_ends_its_run_too(
    start: Start, tmp_path: Path, tiny_model_dir: Path, number: signal.Signals
) -> None:
    """The run is stopped, so that the first signal does nothing: it would be left behind."""
    process = start(*sweep_of_two(tiny_model_dir))
    lock = tmp_path / "out" / "beta=0.1" / "lock"
    while not lock.is_file() or not lock.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(int(lock.read_text().split()[0]), signal.SIGSTOP)
    process.send_signal(number)
    code, said = interrupted(process, lock, number)
    assert code == STOPPED_AT_ONCE.code, said
    assert "stopped at once by a second signal" in said
    assert "Traceback" not in said
    assert not is_held(lock.parent)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_to_a_frontier_ends_it_at_once(
    start: Start, tmp_path: Path, tiny_model_dir: Path, number: signal.Signals
) -> None:
    process = start(*frontier(tiny_model_dir))
    while not (tmp_path / "asked").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(0.2)
    code, said = interrupted(process, tmp_path, number)
    assert code == STOPPED_AT_ONCE.code, said
    assert "stopped at once by a second signal" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_a_server_answers_ends_the_command(
    start: Start, tmp_path: Path, tiny_model_dir: Path, number: signal.Signals
) -> None:
    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            (tmp_path / "asked").touch()
            time.sleep(60)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        words = of_model(COMPARED, tiny_model_dir)
        address = f"--endpoint.base_url=http://127.0.0.1:{server.server_port}/v1"
        process = start("-m", "dpo", "winrate", *words, "--judge=endpoint", address, "--endpoint.model=m")
        code, said = interrupted(process, tmp_path, number)
    finally:
        server.shutdown()
    assert code == STOPPED.code, said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "samples.jsonl").stat().st_size > 0
