"""The controlled-sentiment experiment on a tiny model: all parts, and a second start that repeats nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpo.cli import main
from dpo.config import Config, FrontierConfig
from dpo.experiments import frontier
from dpo.experiments.frontier import (
    _choose_reward,
    best_of_n_kl,
    expected_best,
    finite_rewards,
    run,
    run_configs,
)
from dpo.experiments.frontier_figures import draw_frontier
from dpo.judging.journal import Journal
from dpo.judging.judges import RewardJudge
from dpo.outcomes import STOPPED
from dpo.training import loop, preparation


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    for n in range(1, 7):
        brute = [np.mean([max(row[list(subset)]) for subset in combinations(range(6), n)]) for row in rewards]
        np.testing.assert_allclose(expected_best(rewards, n), brute)


def test_the_kl_of_best_of_n_is_that_of_the_maximum_of_uniforms() -> None:
    """Best-of-n of a continuous reward has density n u^(n−1) in the reward's quantile u."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 16):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)
    assert best_of_n_kl(2) == pytest.approx(log(2) - 0.5)


def test_answers_of_another_policy_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a run was deleted and trained on other data: its settings are the same."""
    given, drawn = FrontierConfig(objectives=["dpo"], betas=[0.1], temperature_beta=0.1), []
    ((key, config),) = run_configs(given).items()

    def draw(self: object, params: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        drawn.append(params)
        return {"log_ratio": [0.0], "length": [1], "texts": [str(len(drawn))]}

    monkeypatch.setattr(frontier._Observers, "_draw", draw)
    length = RewardJudge("length", lambda prompt, response: len(response), "1")
    with Journal(tmp_path / "points.jsonl") as points:
        observe = frontier._Observers(given, ["a prompt"], length, points).of(*key, config)
        for value, times in ((0.0, 1), (0.0, 1), (1.0, 2), (1.0, 2)):
            observe(3, {"weight": np.full(2, value)})
            assert len(drawn) == times
        assert [line["texts"] for line in points.lines.values()] == [["2"]]


@pytest.fixture
def command(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One objective at one β, four steps, three held-out prompts; the reward counts letters e."""
    (tmp_path / "letters.py").write_text("def e(prompt, response): return response.count('e')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    make_mesh = preparation.make_mesh
    for module in (preparation, frontier):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    for name, count in (("train", 8), ("eval", 4)):
        rows = [
            {"prompt": f"{name} {i}", "responses": ["eee", "e then", "no"], "scores": [3.0, 2.0, 0.0]}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "frontier",
        f"--output={tmp_path / 'out'}",
        f"--model={tiny_model_dir}",
        f"--train={tmp_path / 'train.jsonl'}",
        f"--eval={tmp_path / 'eval.jsonl'}",
        "--reward=letters:e",
        "--objectives=[plackett_luce]",
        "--betas=[0.5]",
        "--temperature_beta=0.5",
        "--temperatures=[0,1]",
        "--steps=4",
        "--eval_every=3",
        "--batch_size=4",
        "--learning_rate=0.01",
        "--prompts=3",
        "--max_new_tokens=6",
        "--best_of=3",
    ]


def files_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.ci
def test_the_experiment_is_whole_and_resumable(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command) == 0
    result = json.loads((out / "frontier.json").read_text())
    assert [(line["objective"], line["beta"]) for line in result["lines"]] == [("plackett_luce", 0.5)]
    for line in result["lines"]:
        assert [point["step"] for point in line["points"]] == [3, 4]
        for point in line["points"]:
            for name in ("reward", "kl"):
                estimate, low, high = point[name]
                assert low <= estimate <= high
        assert line["points"][-1]["kl"][0] != 0
    assert [point["n"] for point in result["best_of_n"]] == [1, 2, 3]
    rewards = [point["reward"][0] for point in result["best_of_n"]]
    assert rewards == sorted(rewards)
    assert [one["policy"] for one in result["temperatures"]] == ["reference", "plackett_luce"]
    assert all(set(one["win_rates"]) == {"0.0", "1.0"} for one in result["temperatures"])
    assert all(one["cut"] == {"0.0": 1.0, "1.0": 1.0} for one in result["temperatures"])
    assert "100% of the policy's responses were cut off at 6 tokens" in capsys.readouterr().out
    for figure in ("frontier.svg", "temperatures.svg"):
        assert (out / figure).read_text().startswith("<?xml")
    table = (out / "frontier.md").read_text()
    assert "| Plackett-Luce | 0.5 | 4 |" in table
    assert "| reference |" in table
    assert "| cut off at 6 tokens | 0.0 | 1.0 |" in table
    assert "| reference | 100% | 100% |" in table

    # the curves of a run have its samples' KL and reward; its checkpoint is gone, its export stays
    run = out / "plackett_luce_beta0.5"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if "eval/samples/kl" in row]
    assert [row["step"] for row in held] == [3, 4]
    assert held[1]["eval/samples/kl"] == pytest.approx(result["lines"][0]["points"][1]["kl"][0], abs=1e-3)
    assert not (run / "checkpoints").exists()
    assert (run / "export" / "model.safetensors").is_file()

    # a second start trains, samples and judges nothing
    before = files_of(out)
    monkeypatch.setattr("dpo.models.sampling._run", None)
    monkeypatch.setattr("dpo.training.loop.prepare", None)
    assert main(command) == 0
    assert before == files_of(out)

    # a finished run is not trained anew in its place
    assert main([*command, "--learning_rate=0.02"]) == 2
    assert (
        "out/plackett_luce_beta0.5 is finished with other settings (optimizer.learning_rate is 0.02, was "
        "0.01); give another output"
    ) in capsys.readouterr().err
    assert before == files_of(out)

    # other prompts of a finished run can't be answered any more
    capsys.readouterr()
    assert main([*command, "--max_new_tokens=5"]) == 2
    assert "lacks some of its answers" in capsys.readouterr().err


def test_some_of_the_runs_in_the_order_asked_for() -> None:
    given = FrontierConfig(objectives=["dpo", "ipo"], betas=[0.1, 0.5])
    assert list(run_configs(given)) == [("dpo", 0.1), ("dpo", 0.5), ("ipo", 0.1), ("ipo", 0.5)]
    some = replace(given, only=["ipo:0.1", "dpo:0.5"])
    assert list(run_configs(some)) == [("ipo", 0.1), ("dpo", 0.5)]
    assert run_configs(some)["dpo", 0.5] == run_configs(given)["dpo", 0.5]


def test_the_defaults_are_what_the_results_page_records() -> None:
    given, page = FrontierConfig(), (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    section = page[page.index("## True reward against KL") :].split("\n## ")[0]
    words = " ".join(section.split())
    assert f"{given.steps} steps of {given.batch_size} rankings" in words
    assert f"a learning rate of {given.learning_rate:g}".replace("e-0", "e-") in words
    assert f"answers of at most {given.max_new_tokens} tokens to {given.prompts} prompts" in words
    for step in range(given.eval_every, given.steps + 1, given.eval_every):
        assert f"step {step}" in words
    assert f"| {given.best_of} | " in section
    assert section.count("| Plackett-Luce | ") == section.count("| IPO | ") == len(given.betas)


def test_the_reward_of_data_of_ones_own_is_not_guessed(tmp_path: Path) -> None:
    assert _choose_reward(FrontierConfig()) == "vader"
    assert _choose_reward(FrontierConfig(train="mine.jsonl", reward="vader")) == "vader"
    with pytest.raises(ValueError, match=r"reward is not given, and mine.jsonl is none of the shipped data"):
        run(FrontierConfig(output=str(tmp_path / "out"), train="mine.jsonl"), log=print)


def test_a_reward_that_is_not_finite_is_named() -> None:
    judge = RewardJudge("log", lambda prompt, response: -np.inf if not response else 1.0, "0")
    np.testing.assert_array_equal(finite_rewards(judge, [("p", "x"), ("p", "y")]), [1.0, 1.0])
    with pytest.raises(ValueError, match="reward log is -inf for the response ''; allowed is a finite"):
        finite_rewards(judge, [("p", "x"), ("p", "")])


def test_the_legend_names_only_what_is_drawn(tmp_path: Path) -> None:
    point = {"step": 1, "reward": [0.5, 0.4, 0.6], "kl": [2.0, 1.0, 3.0], "length": 9.0}
    result: Any = {
        "settings": {"objectives": ["dpo", "ipo"], "betas": [0.1, 0.5], "reward": "vader"},
        "prompts": 3,
        "best_of_n": [{"n": n, "reward": [0.3, 0.2, 0.4], "kl": best_of_n_kl(n)} for n in (1, 2)],
        "lines": [{"objective": "ipo", "beta": 0.5, "points": [point]}],
    }
    draw_frontier(tmp_path / "frontier.svg", result)
    text = (tmp_path / "frontier.svg").read_text()
    assert "IPO" in text
    assert "β 0.5" in text
    assert "DPO" not in text
    assert "β 0.1" not in text


def test_a_stopped_run_stops_the_experiment(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = loop.RunResult(Path("."), "interrupted", {})
    monkeypatch.setattr(frontier, "train", lambda config, observe: stopped)
    assert main(command) == STOPPED.code


def test_a_stop_while_a_run_is_exported_stops_the_experiment(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished, and the next one is not begun."""
    trained: list[str] = []

    def train(config: Config, observe: object) -> loop.RunResult:
        trained.append(config.run_dir)
        return loop.RunResult(Path(config.run_dir), "finished", {}, stop_asked=True)

    monkeypatch.setattr(frontier, "train", train)
    assert main([*command, "--betas=[0.5,0.6]"]) == STOPPED.code
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betas=[]"], "betas is []; allowed is one or more"),
        (["--betas=[0.5,-1]"], "betas is -1.0; allowed is more than 0"),
        (["--temperature_beta=0.3"], "temperature_beta is 0.3; allowed are betas: [0.5]"),
        (["--only=[dpo:0.5]"], "only has 'dpo:0.5'; allowed are plackett_luce:0.5"),
        (["--objectives=[dpoo]"], "name is 'dpoo'; did you mean dpo? allowed"),
        (["--train=none.jsonl"], "train is 'none.jsonl': there is no such file"),
        (["--reward=nonsense"], "reward is 'nonsense'; allowed: vader, module:function"),
    ],
)
def test_wrong_settings_are_named(
    command: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = main([*command, *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
