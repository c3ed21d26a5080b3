"""`dpo diffusion` from end to end, and the preferences that it draws."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo.cli import main
from dpo.config import DiffusionConfig
from dpo.diffusion.mixture import Mixture
from dpo.diffusion.schedule import SCHEDULES
from dpo.experiments import diffusion
from dpo.experiments.diffusion import draw_preferences

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "num_steps": 5,
    "num_times": 1,
    "updates": 2,
    "reference_updates": 2,
    "hidden_size": 8,
    "num_layers": 1,
    "batch_size": 4,
    "reference_batch_size": 4,
    "num_preferences": 8,
    "num_drawn": 50,
}


def test_preferences_follow_the_reward() -> None:
    """The better of two is drawn first with probability σ(r_w − r_l)."""
    mixture = Mixture(np.ones(1), np.zeros((1, 1)), 0.25)
    pairs = draw_preferences(jax.random.key(0), mixture, np.array([3.0]), num=20_000, num_samples=2)
    gap = 3.0 * np.abs(np.asarray(pairs[:, 0, 0] - pairs[:, 1, 0]))
    agrees = np.asarray(pairs[:, 0, 0] > pairs[:, 1, 0])
    expected = 1 / (1 + np.exp(-gap))
    assert abs(agrees.mean() - expected.mean()) < 4 * np.sqrt((expected * (1 - expected)).mean() / len(gap))


@pytest.mark.ci
def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"--{name}={value}" for name, value in TINY.items()]
    config = ROOT / "configs" / "diffusion_mixture.yaml"
    assert main(["diffusion", "--config", str(config), f"--run_dir={tmp_path}", *settings]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["exact_reward"] > results["before"]["exact_reward"]
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "results.json", "samples.svg"}
    assert "share of the exact shift" in capsys.readouterr().out
    (tmp_path / "results.json").unlink()
    assert main(["diffusion", "--config", str(tmp_path / "config.yaml"), f"--run_dir={tmp_path}"]) == 0
    repeated = json.loads((tmp_path / "results.json").read_text())
    assert repeated["after"] == results["after"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--objective.name=nothing", "allowed: "),
        ("--eta=2", "eta is 2.0; allowed is from 0.0 to 1.0"),
        ("--reward=[1.0,2.0]", "each with as many numbers as reward"),
        ("--num_samples=1", "num_samples is 1; allowed is at least 2"),
    ],
)
def test_wrong_settings_are_named(capsys: pytest.CaptureFixture[str], argument: str, message: str) -> None:
    try:
        code = main(["diffusion", argument])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_toy_of_the_shared_noise_is_drawn_by_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(*_: object, seed: int, **__: object) -> tuple[float, float]:
        return float(seed), 0.0

    monkeypatch.setattr(diffusion, "recovered_share", share)
    found = diffusion.measure_sharing(DiffusionConfig(seed=7), SCHEDULES["linear"](5), 1.0, tmp_path)
    assert {value for shares in found["shares"].values() for value, _ in shares} == {7.0}


@pytest.mark.slow
def test_the_shipped_example_comes_near_the_optimum(tmp_path: Path) -> None:
    config = ROOT / "configs" / "diffusion_gaussian.yaml"
    assert main(["diffusion", "--config", str(config), f"--run_dir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0.8 < results["share_of_shift"] < 1.2
