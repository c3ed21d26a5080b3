"""Runs side by side: one page, curves of all, and differences that are paired where they can be."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finished_run import HOSTILE, Page, finished, open_in_chromium  # noqa: F401
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from dpo.cli import main
from dpo.config import Config, LoraConfig, OptimizerConfig, save_config
from dpo.evaluation.accuracy import describe
from dpo.evaluation.choosing import choose
from dpo.evaluation.common import find_common
from dpo.evaluation.heldout import Heldout, load_heldout
from dpo.intervals import Interval
from dpo.pages import plots
from dpo.pages.comparison import differing_settings, write_comparison
from dpo.pages.page import percent_with_interval
from dpo.pages.report import write_report


def accuracy_difference(run: Heldout, other: Heldout) -> Interval | None:
    common = find_common([run, other])
    return None if common is None else common.difference(0, 1)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without what is in them but their titles: drawing them takes seconds."""
    monkeypatch.setattr(plots, "_svg", lambda _, title: f"<svg><title>{html.escape(title)}</title></svg>")


@pytest.fixture
def runs(run: tuple[Path, Config]) -> list[tuple[Path, Config]]:
    """A run, and another with a higher learning rate whose policy is wrong on ten more pairs."""
    first, config = run
    second = first.with_name("second")
    shutil.copytree(first, second)
    other = replace(config, run_dir=str(second), optimizer=OptimizerConfig(learning_rate=3e-3))
    save_config(other, second / "config.yaml")
    numbers = load_file(second / "heldout.safetensors")
    numbers["policy"][:10] = numbers["reference"][:10] + np.array([[-1.0, 1.0]])
    save_file(numbers, second / "heldout.safetensors")
    shutil.rmtree(second / "winrate")
    return [run, (second, other)]


def test_one_page_has_all_runs_and_refers_to_nothing_outside(runs, tmp_path: Path) -> None:
    text = write_comparison(runs, output=tmp_path / "page.html").read_text()
    page = Page(text)
    shown = " ".join(page.text.split())
    for name in ("run<b>", "second"):
        assert name in shown
    assert not {"script", "link", "img", "b"} & {tag for tag, _ in page.tags}
    assert "optimizer.learning_rate1e-060.003" in shown
    assert HOSTILE.split()[0] not in text


def test_the_difference_is_paired(runs) -> None:
    """Its estimate is that of two separate accuracies; its interval is narrower than for independent ones."""
    ours, theirs = (load_heldout(path, config) for path, config in runs)
    difference = accuracy_difference(theirs, ours)
    separate = [describe(one.rows, beta=0.1)["accuracy"] for one in (theirs, ours)]
    assert difference is not None
    assert difference.estimate == pytest.approx(separate[0][0] - separate[1][0])
    first, second = (high - low for _, low, high in separate)
    independent = np.hypot(first, second)
    assert difference.high - difference.low < 0.95 * independent
    assert accuracy_difference(ours, ours) == (0.0, 0.0, 0.0)


@pytest.mark.usefixtures("undrawn")
def test_other_held_out_preferences_have_no_difference(runs, tmp_path: Path) -> None:
    path, config = runs[1]
    rows = [json.loads(line) for line in Path(config.data.eval).read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row | {"chosen": "another"}) + "\n" for row in rows))
    config = replace(config, data=replace(config.data, eval=str(other)))
    assert accuracy_difference(load_heldout(path, config), load_heldout(*runs[0])) is None
    ours = load_heldout(*runs[0])
    tied = ours._replace(
        rows=ours.rows._replace(ranks=np.zeros_like(ours.rows.ranks)),
        preferences=[row._replace(ranks=(0, 0)) for row in ours.preferences],
    )
    assert accuracy_difference(tied, ours) is None, "the same texts, of which none is better"
    shown = Page(write_comparison([runs[0], (path, config)]).read_text()).text
    assert "Held-out preferences other than those of run<b>: second. There is no pair that all" in shown
    assert "paired difference" not in shown, "there is no such row"
    assert "paired difference" in Page(write_comparison(runs).read_text()).text


@pytest.mark.usefixtures("undrawn")
def test_a_choice_stands_first_with_what_may_be_said_of_it(runs) -> None:
    choice = choose(
        {name: load_heldout(path, config) for name, (path, config) in zip("ab", runs, strict=True)}
    )
    shown = Page(write_comparison(runs, choice=choice, failed={"c<i>": 1}).read_text()).text
    for text in (
        *choice.in_words(percent_with_interval),
        "c<i> ended with exit code 1 and has no part in it",
    ):
        assert shown.count(f"{text}.") == 1
    for one in choice.judged:
        assert f"{one.name}{percent_with_interval(one.choosing)}{percent_with_interval(one.stated)}" in shown
    assert shown.index("chosen: ") < shown.index("held-out accuracy")
    assert "chosen" not in Page(write_comparison(runs).read_text()).text.replace(": chosen", "")


def test_only_settings_that_differ_are_listed() -> None:
    one = Config(objective={"name": "dpo", "beta": 0.1}, run_dir="a")
    two = Config(objective={"name": "ipo", "beta": 0.1}, run_dir="b")
    assert differing_settings([one, two]) == [("objective.name", ["dpo", "ipo"])]
    assert differing_settings([one, one]) == []


def test_settings_are_shown_in_the_words_of_a_settings_file() -> None:
    one = Config(run_dir="a")
    two = Config(run_dir="b", lora=LoraConfig(rank=8, use_dora=True, target_modules=["q_proj", "v_proj"]))
    assert differing_settings([one, two]) == [
        ("lora.rank", ["not set", "8"]),
        ("lora.target_modules", ["all-linear", '["q_proj", "v_proj"]']),
        ("lora.use_dora", ["false", "true"]),
    ]


@pytest.mark.usefixtures("undrawn")
def test_adapters_and_whole_weights_are_told_apart(runs) -> None:
    first, (path, config) = runs
    adapted = replace(config, lora=LoraConfig(rank=8))
    shown = Page(write_comparison([first, (path, adapted)]).read_text()).text
    assert "trainedall weightsLoRA adapters of rank 8" in shown


def test_equal_curves_do_not_hide_one_another() -> None:
    """Each run has dashes through which the one below is seen, and smaller points than that."""
    for is_heldout in (False, True):
        axes = Figure().subplots()
        for run in range(len(plots.STROKES)):
            line = plots.Curve("run", [1, 2], [0.5, 0.7], run, is_heldout, True, stroke=run)
            plots._draw_curve(axes, line, plots.SERIES[run])
        sizes = [line.get_markersize() for line in axes.lines]
        assert not is_heldout or sizes == sorted(set(sizes), reverse=True)
        assert len({str(vars(line)["_dash_pattern"]) for line in axes.lines}) == len(plots.STROKES)
    axes = Figure().subplots()
    plots._draw_curve(axes, plots.Curve("run", [1, 2], [0.5, 0.7], is_heldout=True), "black")
    assert axes.lines[0].get_linestyle() == "--", "held out, of one run"


@pytest.mark.usefixtures("undrawn")
def test_the_command_takes_one_run_or_several(
    runs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [str(path) for path, _ in runs]
    assert main(["report", *paths]) == 0
    assert (tmp_path / "comparison.html").is_file()
    assert main(["report", paths[0]]) == 0
    assert (runs[0][0] / "report.html").is_file()
    assert main(["report", *paths, f"--output={tmp_path / 'other.html'}"]) == 0
    assert (tmp_path / "other.html").is_file()
    assert main(["report", paths[0], str(tmp_path / "none")]) == 2
    assert "none/config.yaml: there is no such file" in capsys.readouterr().err


@pytest.mark.browser
def test_chromium_shows_it(runs, tmp_path: Path) -> None:
    page = write_comparison(runs, output=tmp_path / "page.html")
    assert open_in_chromium(page, tmp_path / "page.png") == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("beta", "shown"), [(None, True), (0.1, True), (0.5, False)])
def test_what_is_in_units_of_each_runs_own_is_not_on_one_axis(runs, tmp_path: Path, beta, shown) -> None:
    (first, config), (second, other) = runs
    if beta is not None:
        other = replace(other, objective={**other.objective, "beta": beta})
    text = write_comparison([(first, config), (second, other)], output=tmp_path / "page.html").read_text()
    assert ("Loss over steps" in text) is shown
    assert ("on one axis here" in text) is not shown
    assert "Accuracy over steps" in text
    words = " ".join(Page(text).text.split())
    assert words.index("win-rate") < words.index("held-out accuracy") < words.index("log-ratio of better")


@pytest.mark.usefixtures("undrawn")
def test_a_run_on_rankings_and_one_on_their_pairs_are_compared(runs, tmp_path: Path) -> None:
    """On the pairs that both have; by τ and the best found, which the pairs' run knows from all pairs."""
    rows = [
        {"prompt": f"p{i}", "responses": [f"{i} good", f"{i} middling", f"{i} bad"], "ranks": [1, 2, 3]}
        for i in range(20)
    ]
    data = tmp_path / "rankings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared = []
    for (path, config), expand, values in zip(
        runs, ("ranking", "all_pairs"), ([3.0, 2, 1], [2.0, 3, 1]), strict=True
    ):
        places = [(0, 1, 2)] if expand == "ranking" else [(0, 1), (0, 2), (1, 2)]
        policy = np.array([[values[place] for place in row] for row in places * 20])
        numbers = {
            "policy": policy,
            "reference": np.zeros_like(policy),
            "present": np.ones(policy.shape, bool),
            "lengths": np.full(policy.shape, 5),
            "ranks": np.tile(np.arange(policy.shape[1]), (len(policy), 1)),
            "origin": np.arange(len(policy)),
        }
        save_file(numbers, path / "heldout.safetensors")
        compared.append((path, replace(config, data=replace(config.data, eval=str(data), expand=expand))))
    shown = " ".join(Page(write_comparison(compared, output=tmp_path / "page.html").read_text()).text.split())
    assert "Compared is what all have in common: 60 pairs of 20 prompts." in shown
    assert "accuracy minus the first run's-33.3 points (-33.3 to -33.3)" in shown
    assert re.search(r"Kendall's τ1.000 \(.*?\)0.333 \(", shown)
    assert re.search(r"best one found \(chance 33.3%\)100.0% \(.*?\)0.0% \(", shown)


@pytest.mark.usefixtures("undrawn")
def test_a_second_judge_has_a_row_and_a_picture_of_its_own(runs, tmp_path: Path) -> None:
    first = runs[0][0] / "winrate" / "winrate.json"
    result = json.loads(first.read_text())
    result["judge"] = {"judge": "local", "model": "judging-model"}
    result["settings"]["judge"] = "local:judging-model"
    for figures in result["temperatures"].values():
        figures["win_rate"] = [0.25, 0.2, 0.3]
        del figures["reward"]
    first.with_name("winrate-judging-model.json").write_text(json.dumps(result))
    text = write_comparison(runs, output=tmp_path / "page.html").read_text()
    shown = " ".join(Page(text).text.split())
    assert re.search(
        r"win-rate over the reference, judge local judging-model.*?25.0% \(20.0% to 30.0%\)", shown
    )
    assert "judge reward vader" in shown
    assert "each have a row of their own" in shown
    assert text.count("<title>Win-rate against KL") == 2
    assert text.count("<title>Mean reward against KL") == 1
    page = write_report(*runs[0], output=tmp_path / "report.html").read_text()
    assert page.count("Win-rate over the reference, judge ") == 2
    assert page.count("<title>Win-rate over the reference, 95% intervals\njudge ") == 2
    assert page.index("judge reward vader") < page.index("judge local judging-model")
    assert "--judge=local:judging-model" in Page(page).text
