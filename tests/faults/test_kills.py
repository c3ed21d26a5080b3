"""A run is killed at random instants, started again each time, and comes to the bits of the unbroken run."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from tiny_run import Server, outcome

from dpo.config import Config

SEED = 20
START = 4.0
"""Seconds that a run takes at most from its start to its end, on a machine that is not busy."""


@pytest.mark.parametrize(
    "num_kills", [pytest.param(3, marks=pytest.mark.ci), pytest.param(60, marks=pytest.mark.slow)]
)
def test_a_killed_run_comes_to_the_same_bits(server, make_config, expected, tmp_path, num_kills, capsys):
    generator = random.Random(SEED)
    killed: Counter[str] = Counter()
    runs = 0
    while killed.total() < num_kills:
        config = make_config(tmp_path / f"run{runs}", keep_best="rewards/margins")
        killed += kill_until_it_ends(server, config, generator, limit=num_kills - killed.total())
        assert outcome(config) == expected, f"run {runs} after {dict(killed)}: {server.printed(config)}"
        runs += 1
    with capsys.disabled():
        places = ", ".join(f"{count} {place}" for place, count in sorted(killed.items()))
        print(f"\n{killed.total()}/{num_kills} kills resumed to the same bits, in {runs} runs ({places})")


def kill_until_it_ends(
    server: Server, config: Config, generator: random.Random, *, limit: int
) -> Counter[str]:
    """Start the run, kill it at some instant, and so on at most `limit` times; then let it end."""
    killed: Counter[str] = Counter()
    while killed.total() < limit:
        pid = server.start(config)
        wait = generator.choice(
            [wait_any_time, wait_for_steps, wait_for_save, wait_for_save, wait_for_export]
        )
        wait(pid, Path(config.run_dir), generator)
        code = server.kill(pid)
        if code != -9:
            assert code == 0, server.printed(config)
            return killed
        killed[place(Path(config.run_dir))] += 1
    assert server.run(config) == 0, server.printed(config)
    return killed


def wait_any_time(pid: int, run_dir: Path, generator: random.Random) -> None:
    time.sleep(generator.uniform(0, START))


def wait_for_steps(pid: int, run_dir: Path, generator: random.Random) -> None:
    """Until a metric line is written, and a little longer."""
    before = size(run_dir / "metrics.jsonl")
    until(pid, lambda: size(run_dir / "metrics.jsonl") not in (0, before))
    time.sleep(generator.uniform(0, 0.5))


def wait_for_save(pid: int, run_dir: Path, generator: random.Random) -> None:
    """Until the n-th save is going on, and a moment longer."""
    for _ in range(generator.randint(1, 3)):
        until(pid, lambda: not any((run_dir / "checkpoints").glob("*.writing")))
        until(pid, lambda: any((run_dir / "checkpoints").glob("*.writing")))
    time.sleep(generator.uniform(0, 0.03))


def wait_for_export(pid: int, run_dir: Path, generator: random.Random) -> None:
    until(pid, (run_dir / "export.writing").exists)
    time.sleep(generator.uniform(0, 0.02))


def until(pid: int, holds) -> None:
    """Return when `holds()`, or when the process has ended."""
    while not holds() and Path(f"/proc/{pid}/stat").exists() and not ended(pid):
        time.sleep(0.0005)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def size(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0


def place(run_dir: Path) -> str:
    """What a killed run was doing, by what it left."""
    if any((run_dir / "checkpoints").glob("*.writing")):
        return "during a save"
    if (run_dir / "export.writing").exists():
        return "during the export"
    if not size(run_dir / "metrics.jsonl"):
        return "before the first step"
    return "elsewhere"
