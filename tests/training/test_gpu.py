"""Whole runs on a GPU, where there is one: the bounds that hold on a CPU, and resumed to the same bits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
"""The flag of docs/reliability.md."""


def run_on(platform: str, test: str) -> subprocess.CompletedProcess[str]:
    """One test of test_loop.py in a process of its own, on a platform."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "slow or not slow"]
    command.append(f"tests/training/test_loop.py::{test}")
    environment = os.environ | {"JAX_PLATFORMS": platform, "XLA_FLAGS": DETERMINISTIC}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU is here")
@pytest.mark.parametrize(
    "test",
    ["test_ten_steps_follow_trls_trajectory", "test_an_interrupted_run_goes_on_to_the_same_bits"],
)
def test_a_run_on_a_gpu(test):
    done = run_on("cuda", test)
    assert "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "ending"), [("cpu", "1 passed"), ("no_such_platform", "1 error")])
def test_these_runs_take_the_platform_that_is_named(platform, ending):
    """And XLA knows the flag: it ends a process that names one which it does not know."""
    done = run_on(platform, "test_an_interrupted_run_goes_on_to_the_same_bits")
    assert ending in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
