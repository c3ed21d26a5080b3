"""`dpo train` in several processes that meet on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from compiling import lightly, with_devices

ROOT = Path(__file__).resolve().parents[2]


def environment_of(devices: int, tmp_path: Path) -> dict[str, str]:
    """Compiled programs are kept in the directory of the whole test session (conftest.py)."""
    return os.environ | {
        "XLA_FLAGS": with_devices(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "DPO_CACHE": str(tmp_path / "cache"),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Started(Protocol):
    """A process that was started, as `subprocess.Popen` has it."""

    def send_signal(self, sig: int, /) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def poll(self) -> int | None: ...


Start = Callable[[Sequence[str], Path, Mapping[str, str]], Started]
"""(arguments of `dpo`, file for its output, environment) → the process."""


def start_anew(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Started:
    """`dpo` as a user starts it."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "dpo", *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


class Forks:
    """Starts `dpo` from a process that has imported everything already (forks.py)."""

    def __init__(self, environment: Mapping[str, str]):
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **lightly(environment),
                "PYTHONPATH": str(ROOT),
                "PYTHONWARNINGS": "ignore",
            },
        )

    def __call__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Started:
        """Every fork has the environment of the server."""
        return Forked(self, int(self.ask({"arguments": [*arguments], "log": str(log)})))

    def ask(self, command: Mapping[str, object]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


class Forked(NamedTuple):
    """A fork, to be handled as a `Popen`."""

    server: Forks
    pid: int

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def poll(self) -> int | None:
        return self.server.ask({"wait": self.pid, "seconds": 0})

    def wait(self, timeout: float | None = None) -> int:
        code = self.server.ask({"wait": self.pid, "seconds": 600 if timeout is None else timeout})
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 600)
        return code


class Processes:
    """`dpo train` in several processes that meet on loopback."""

    def __init__(
        self,
        count: int,
        devices: int,
        config: Path,
        tmp_path: Path,
        *,
        extra: Callable[[int], list[str]] = lambda i: [],
        start: Start = start_anew,
    ):
        port = free_port()
        self.logs: list[Path] = []
        self.all: list[Started] = []
        environment = environment_of(devices, tmp_path)
        for i in range(count):
            self.logs.append(tmp_path / f"log-{count}-{i}.txt")
            where = [] if count == 1 else [
                f"--distributed.coordinator=127.0.0.1:{port}",
                f"--distributed.num_processes={count}",
                f"--distributed.process_id={i}",
            ]  # fmt: skip
            arguments = ["train", "--config", str(config), *where, *extra(i)]
            self.all.append(start(arguments, self.logs[-1], environment))

    def wait(self, seconds: float = 600.0) -> list[int]:
        """Exit codes, after which none is left; alone on two cores a run takes about 30 s."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.all]
        finally:
            self.end()

    def end(self) -> None:
        """Kill those that are left."""
        for process in self.all:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def text(self, i: int) -> str:
        return self.logs[i].read_text()
