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
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.files import damaged_files

JUDGE = """
import pathlib, time
HERE = pathlib.Path(__file__).parent
def letters(prompt, response):
    (HERE / "asked").touch()
    if not (HERE / "go").exists():
        time.sleep(1.0)
    return response.count("e")
"""
EXPORT = """
import pathlib, sys, time
from dpo.huggingface import saving
write = saving._save_weights
def slowly(*given):
    write(*given)
    pathlib.Path("asked").touch()
    time.sleep(120)
saving._save_weights = slowly
from dpo.__main__ import end_at_once
sys.argv = ["dpo", *sys.argv[1:]]
raise SystemExit(end_at_once())
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
    environment = os.environ | {
        "DPO_CACHE": str(tmp_path / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
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


def interrupted(process: subprocess.Popen[str], directory: Path, number: signal.Signals) -> tuple[int, str]:
    """Signal it once it says that it is where it should be; returns how it ended and what it said."""
    deadline = time.monotonic() + 200
    while not (directory / "asked").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    asked = time.monotonic()
    printed, said = process.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    return process.returncode, printed + said


def finished(process: subprocess.Popen[str]) -> str:
    printed, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return printed


def winrate(model: Path) -> list[str]:
    return [
        *("-m", "dpo", "winrate", f"--policy={model}", f"--opponent={model}", "--data=eval.jsonl"),
        *("--output=out", "--max_new_tokens=6", "--judge=slow:letters", "--limit=6"),
    ]


def frontier(model: Path) -> list[str]:
    return [
        *("-m", "dpo", "frontier", "--output=out", f"--model={model}", "--train=train.jsonl"),
        *("--eval=eval.jsonl", "--reward=slow:letters", "--objectives=[dpo]", "--betas=[0.5]"),
        *("--temperature_beta=0.5", "--temperatures=[1]", "--steps=2", "--eval_every=1", "--batch_size=4"),
        *("--prompts=2", "--max_new_tokens=4", "--best_of=2"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
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


@pytest.mark.slow
def test_ctrl_c_in_an_export_leaves_none_in_part(start: Start, tmp_path: Path, tiny_model_dir: Path) -> None:
    finished(
        start(
            *("-m", "dpo", "train", f"--model.source={tiny_model_dir}", "--run_dir=run"),
            *(
                "--data.train=train.jsonl",
                "--data.eval=null",
                "--training.steps=1",
                "--training.batch_size=2",
            ),
        )
    )
    code, said = interrupted(start("-c", EXPORT, "export", "run", "--output=out"), tmp_path, signal.SIGINT)
    assert code == 130, said
    assert "dpo export: stopped at once: by Ctrl-C" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    finished(start("-m", "dpo", "export", "run", "--output=out"))
    assert damaged_files(tmp_path / "out") == []
    assert not (tmp_path / "out.writing").exists()
