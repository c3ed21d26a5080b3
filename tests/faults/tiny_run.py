"""A tiny run: how to start and kill it, and what it came to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from compiling import LIGHTLY, lightly
from safetensors.numpy import load_file

from dpo.config import Config, save_config

HERE = Path(__file__).parent
CLOCKED = ("seconds", "tokens/s")
"""Metrics that the clock decides."""


class Server:
    """Talks to server.py: one run at a time."""

    def __init__(self, directory: Path):
        self._directory = directory
        self.environment = lightly(os.environ) | {
            "XLA_FLAGS": LIGHTLY,  # and one device
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(HERE.parents[1]),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def start(self, config: Config | list[Config], **command) -> int:
        """Begin a run (or several, one after the other); returns its process."""
        several = config if isinstance(config, list) else [config]
        for one in several:
            save_config(one, self._file(one, "yaml"))
        paths = [str(self._file(one, "yaml")) for one in several]
        log = str(self._file(several[0], "log"))
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"config": paths, "log": log, **command}) + "\n")
        self._process.stdin.flush()
        return int(self._answer("pid"))

    def wait(self) -> int:
        """How the run ended: its exit code, or the negative number of the signal that killed it."""
        return int(self._answer("exit"))

    def run(self, config: Config | list[Config], **command) -> int:
        """Begin a run and wait for its end."""
        self.start(config, **command)
        return self.wait()

    def command(self, config: Config, *words: str, **command) -> int:
        """A command line, of which CONFIG is the file of these settings; its exit code."""
        settings = str(self._file(config, "yaml"))
        return self.run(config, command=[word.replace("CONFIG", settings) for word in words], **command)

    def kill(self, pid: int) -> int:
        """SIGKILL; returns how the run ended, which may have been before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.wait()

    def printed(self, config: Config) -> str:
        """What the runs in this directory said so far."""
        return self._file(config, "log").read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _file(self, config: Config, ending: str) -> Path:
        return self._directory / f"{config.run_dir.replace('/', '-')}.{ending}"

    def _answer(self, name: str) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().split()
        assert answer[:1] == [name], f"the server ended, or said {answer}"
        return answer[1]


def replace(config: Config, **sections) -> Config:
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(old, **value)
            if dataclasses.is_dataclass(old := getattr(config, name)) and not isinstance(old, type)
            else value
            for name, value in sections.items()
        },
    )


def outcome(config: Config) -> dict:
    """All that a finished run computed, to the bit: state, metrics, export, held-out log-probs."""
    run_dir = Path(config.run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    heldout = load_file(run_dir / "heldout.safetensors")
    return {
        "state": (run_dir / "digest").read_text(),
        "metrics": [{name: v for name, v in row.items() if name not in CLOCKED} for row in rows],
        "export": (run_dir / "export" / "model.safetensors").read_bytes(),
        "heldout": {name: values.tobytes() for name, values in heldout.items()},
    }
