"""`dpo train` in several processes that meet on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment_of(devices: int, tmp_path: Path) -> dict[str, str]:
    """Compiled programs are kept in the directory of the whole test session (conftest.py)."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "DPO_CACHE": str(tmp_path / "cache"),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
    ):
        port = free_port()
        self.logs: list[Path] = []
        self.all: list[subprocess.Popen[bytes]] = []
        for i in range(count):
            self.logs.append(tmp_path / f"log-{count}-{i}.txt")
            where = [] if count == 1 else [
                f"--distributed.coordinator=127.0.0.1:{port}",
                f"--distributed.num_processes={count}",
                f"--distributed.process_id={i}",
            ]  # fmt: skip
            with self.logs[-1].open("w") as log:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dpo", "train", "--config", str(config), *where, *extra(i)],
                        cwd=ROOT,
                        env=environment_of(devices, tmp_path),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

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
            process.kill()
            process.wait()

    def text(self, i: int) -> str:
        return self.logs[i].read_text()
