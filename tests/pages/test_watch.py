"""`dpo watch` follows a run that another process trains, and ends when that ends, however it ends."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dpo.cli import main
from dpo.config import Config, TrainingConfig, save_config
from dpo.outcomes import STOPPED
from dpo.pages.watch import SHOWN_PANELS, run_state, total_steps, watch
from dpo.training.lock import exclusive


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Config]:
    """A run of 12 steps that has done three."""
    config = Config(run_dir=str(tmp_path), training=TrainingConfig(steps=12))
    save_config(config, tmp_path / "config.yaml")
    for step in range(3):
        add_step(tmp_path, step)
    return tmp_path, config


def add_step(run_dir: Path, step: int) -> None:
    row = {"step": step, "loss": 0.7 - 0.05 * step, "rewards/accuracies": 0.5 + 0.04 * step}
    row |= {
        "rewards/chosen": 0.01 * step,
        "rewards/rejected": -0.02 * step,
        "seconds": 2.0,
        "epoch": 0.1 * step,
    }
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def seen(
    run: tuple[Path, Config], *, sleep=None, terminal: bool = False, once: bool = False
) -> tuple[bool, str]:
    out = io.StringIO()
    console = Console(file=out, width=90, force_terminal=terminal, color_system=None)
    finished = watch(
        *run, interval=1.0, once=once, console=console, sleep=sleep or (lambda seconds: pytest.fail("slept"))
    )
    return finished, out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_it_follows_a_live_run_until_it_is_finished(run: tuple[Path, Config], terminal: bool) -> None:
    run_dir = run[0]
    holding = exclusive(run_dir)
    holding.__enter__()
    states, naps = [], iter(range(3, 99))

    def sleep(seconds: float) -> None:
        states.append(run_state(run_dir))
        add_step(run_dir, next(naps))
        if len(states) == 3:
            (run_dir / "summary.json").write_text("{}")
            holding.__exit__(None, None, None)

    finished, text = seen(run, sleep=sleep, terminal=terminal)
    assert finished
    assert states == ["running"] * 3
    assert "finished, step 6 of 12" in text
    assert ("running, step 3 of 12, 2.0 s a step, 0:00:18 left" in text) is terminal
    for title in ("Loss", "Accuracy", "Log-ratio, nats"):
        assert title in text


def test_a_run_that_nobody_trains_ends_it_at_once(run: tuple[Path, Config]) -> None:
    finished, text = seen(run)
    assert not finished
    assert "stopped, step 3 of 12" in text
    assert main(["watch", str(run[0])]) == STOPPED.code
    assert main(["watch", str(run[0]), "--once=true"]) == 0, "a picture was all that was asked for"


def test_once_draws_a_live_run_and_ends(run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(run[0]):
        assert "running, step 3 of 12" in seen(run, once=True)[1]
        assert main(["watch", str(run[0]), "--once=true"]) == 0
    assert "Loss" in capsys.readouterr().out


def test_the_page_names_the_curves_that_are_drawn() -> None:
    words = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "ratios/chosen": "log-ratios",
        "grad_norm": "gradient norm",
        "samples/kl": "KL of own samples",
        "tokens/s": "tokens/s",
    }
    page = " ".join((Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8").split())
    listed = re.sub(r" \([^)]*\)", "", page.split("Curves: ")[1]).split(";")[0]
    assert listed.split(", ") == [words[panel] for panel in SHOWN_PANELS]


def test_a_run_without_steps_is_shown_as_such(tmp_path: Path) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    text = seen((tmp_path, Config()))[1]
    assert "stopped: no step yet" in text
    assert "dpo, all weights" in text


def test_the_newest_held_out_figures_are_printed(run: tuple[Path, Config]) -> None:
    with (run[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "eval/rewards/accuracies": 0.75, "eval/rewards/margins": 0.5}\n')
        file.write('{"step": 3, "eval/loss": 0.6}\n{"step": 4, "lo')
    assert "held out after 3 steps: loss 0.6" in seen(run)[1]


def test_steps_of_epochs_are_counted_as_training_counts_them() -> None:
    """10 prompts, batches of 4, 3 epochs: 7 whole steps."""
    config = Config(training=TrainingConfig(epochs=3.0, batch_size=4))
    for step in range(7):
        assert total_steps(config, {"step": step, "epoch": (step + 1) * 4 / 10}) == 7


@pytest.mark.parametrize(
    "line",
    [
        '"step": 3',
        '"step": 3, "epoch": 0.0',
        '"step": -1, "epoch": 1.0',
        '"step": 3, "epoch": NaN',
        '"step": 3, "epoch": -1.0',
        '"step": 3, "epoch": 1e-308, "seconds": NaN',
        '"step": 3, "epoch": 1e308, "seconds": 1e308',
        '"step": 9007199254740991, "epoch": 1.0, "seconds": Infinity',
    ],
)
def test_a_line_that_says_no_pace_is_shown_without(tmp_path: Path, line: str) -> None:
    """A run of somebody else may say anything."""
    config = Config(run_dir=str(tmp_path), training=TrainingConfig(epochs=2.0))
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text("{" + line + ', "loss": 1.0}\n')
    with exclusive(tmp_path):
        said = seen((tmp_path, config), once=True)[1]
    assert f"running, step {json.loads('{' + line + '}')['step'] + 1}" in said


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "config.yaml: there is no such file" in capsys.readouterr().err


def test_the_names_of_two_lines_fit_into_the_narrowest_plot(run: tuple[Path, Config]) -> None:
    with (run[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "eval/rewards/chosen": 0.1, "eval/rewards/rejected": -0.1}) + "\n")
    assert "Log-ratio, nats  chosen  rejected" in seen(run)[1]
