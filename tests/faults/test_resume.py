"""An interrupted run goes on to the same bits, wherever it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import outcome, replace

from dpo.config import save_config

STOPS = {
    "after one step": [1],
    "in the middle of epoch 0": [2],
    "at the border of epochs 0 and 1": [3],
    "in the middle of epoch 1": [4],
    "twice in an epoch": [1, 1],
    "after every step": [1] * 8,
}
"""SIGTERM arrives in the n-th step of each part of a run, and is answered at its end; an epoch has three."""
MARKS = {
    "in the middle of epoch 1": pytest.mark.ci,
    "at the border of epochs 0 and 1": pytest.mark.ci,
    "after every step": pytest.mark.ci,
}
"""The last has the places of all others; they are slow."""


@pytest.mark.parametrize(
    "stops",
    [pytest.param(stops, id=name, marks=MARKS.get(name, pytest.mark.slow)) for name, stops in STOPS.items()],
)
def test_a_stopped_run_goes_on_to_the_same_bits(server, make_config, expected, tmp_path, stops):
    """Micro-batches accumulate within every step; nothing but the stop saves."""
    config = make_config(tmp_path / "run", save_every=None)
    for count in stops:
        assert server.run(config, hooks=[{"where": "step", "count": count, "do": "SIGTERM"}]) == 75
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected
    assert server.printed(config).count("as they were (largest difference 0)") == len(stops)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        pytest.param("save", 4, marks=pytest.mark.ci),
        pytest.param("evaluation", 1, marks=pytest.mark.slow),
        pytest.param("evaluation", 3, marks=pytest.mark.ci),
    ],
)
def test_a_stop_during_a_save_or_an_evaluation(server, make_config, expected, tmp_path, where, count):
    """The third evaluation is the one after the last step."""
    config = make_config(tmp_path / "run")
    assert server.run(config, hooks=[{"where": where, "count": count, "do": "SIGTERM"}]) == 75
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected


@pytest.mark.ci
def test_a_stop_during_the_export_lets_it_finish(server, make_config, expected, tmp_path):
    config = make_config(tmp_path / "run")
    assert server.run(config, hooks=[{"where": "export", "count": 1, "do": "SIGTERM"}]) == 0
    assert outcome(config) == expected


@pytest.mark.ci
def test_a_second_signal_ends_the_process_at_once(server, make_config, expected, tmp_path):
    config = make_config(tmp_path / "run")
    pid = server.start(config, hooks=[{"where": "evaluation", "count": 2, "do": "hang"}])
    while not (Path(config.run_dir) / "hanging").exists():
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 130
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected


@pytest.mark.ci
def test_the_command_as_process_1_is_stopped_and_goes_on(server, make_config, expected, tmp_path):
    """`dpo train` itself, without a shell, as the first process of a container under a grace period."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("no namespace of processes can be made here")
    config = make_config(tmp_path / "run")
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "dpo", "train", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", *command],
        env=server.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped as asked; the same command goes on from there" in said
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected
    again = subprocess.run(command, env=server.environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "is finished: nothing to do" in again.stdout


@pytest.mark.ci
def test_the_wall_clock_may_jump(server, make_config, expected, tmp_path):
    config = replace(make_config(tmp_path / "run"), training={"save_minutes": 60.0})
    assert server.run(config, clock="jumps") == 0, server.printed(config)
    assert outcome(config) == expected


@pytest.mark.ci
def test_the_best_checkpoint_stays_and_does_not_depend_on_stops(server, make_config, tmp_path):
    """A high learning rate makes the margins fall at the end, so that the newest is not the best."""
    settings = {"save_every": None, "keep_checkpoints": 1, "keep_best": "rewards/margins", "eval_every": 1}
    whole, stopped = (make_config(tmp_path / name, **settings) for name in ("whole", "stopped"))
    assert server.run(whole) == 0, server.printed(whole)
    for _ in range(2):
        assert server.run(stopped, hooks=[{"where": "step", "count": 3, "do": "SIGTERM"}]) == 75
    assert server.run(stopped) == 0, server.printed(stopped)
    assert outcome(stopped) == outcome(whole)
    kept = [
        sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
        for config in (whole, stopped)
    ]
    assert kept[0] == kept[1]


@pytest.mark.ci
def test_a_second_process_on_the_run_directory_is_refused(server, make_config, tmp_path):
    from dpo.training.lock import exclusive

    config = make_config(tmp_path / "run")
    with exclusive(tmp_path / "run"):
        assert server.run(config) == 2, server.printed(config)
    assert f"is in use by process {os.getpid()}" in server.printed(config)
