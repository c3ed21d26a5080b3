"""The page is one file without outside references, shows what a run left, and shows markup as text."""

from __future__ import annotations

import html
import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finished_run import HOSTILE, Page, finished, open_in_chromium, written_page  # noqa: F401
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from dpo.config import Config, LoraConfig, save_config
from dpo.evaluation.accuracy import describe
from dpo.evaluation.heldout import load_heldout
from dpo.files import WriteError
from dpo.judging.results import listed_files, read_as, read_results
from dpo.pages import plots
from dpo.pages.page import options_whole, points_with_interval, with_interval
from dpo.pages.report import BREAKDOWN, breakdown, write_report
from dpo.pages.report_data import read_data
from dpo.pages.report_match import command


def test_the_page_is_well_formed_and_refers_to_nothing_outside(page_text: str) -> None:
    text = page_text
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert all(value and value.startswith("#") for value in references)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {
        match for match in re.findall(r"url\((#[^)]*)\)", text)
    }
    assert "@import" not in text


def test_markup_from_data_and_models_is_shown_as_text(page_text: str) -> None:
    text = page_text
    assert "<script>alert" not in text
    shown = Page(text).text
    assert shown.count(HOSTILE) >= 4  # a sample, its prompt, a pair, the data report
    assert "{{ 7 * 7 }}" in shown


def test_the_data_are_told_in_sentences_with_a_table_of_lengths(
    run: tuple[Path, Config], page_text: str
) -> None:
    shown = " ".join(Page(page_text).text.split())
    shown = shown[shown.index("3 of 30 preferences (10%)") :]
    for sentence in (
        "30 rows were read (pair 30); 27 of 29 preferences are tokens to train on.",
        "25 distinct prompts; responses a prompt: 29 with 2; none with scores.",
        "Left out: 2 too_long (first: rows.jsonl:4: 9 tokens).",
        "The better response has more tokens in 50.0% (30.0% to 70.0%) of 26 comparisons; 1 more",
        "6 conflicting labels (rows.jsonl:2, rows.jsonl:3, …).",
        "Looked for and not found: duplicates",
        "None of 12 held-out prompts is trained on.",
    ):
        assert sentence in shown
    section = read_data(run[0] / "data.json")
    assert section is not None
    lengths, sources = section.tables
    assert lengths[:2] == [
        ["tokens", "mean", "p50", "p90", "p99", "max"],
        ["prompt", "7.5", "7", "9", "9", "9"],
    ]
    assert sources == [["source", "rows"], [HOSTILE, "30"]]


@pytest.mark.parametrize("text", ["[]", "{", '{"rows": 3}', '{"warnings": 7}'])
def test_another_file_in_place_of_the_data_report_is_refused_by_name(run: tuple[Path, Config], text) -> None:
    (run[0] / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json is (damaged|not the data report of a run)"):
        write_report(*run)


def test_the_verdict_comes_first_with_interval_and_baseline(page_text: str) -> None:
    shown = " ".join(Page(page_text).text.split())
    start = shown.index("of held-out pairs in the right order")
    assert "95% interval" in shown[start : start + 100]
    assert "Preferring the longer response gives" in shown[start : start + 250]
    assert start < shown.index("Training")


def test_the_win_rate_stands_beside_the_accuracy(page_text: str) -> None:
    shown = " ".join(Page(page_text).text.split())
    start = shown.index("Win-rate over the reference")
    assert "66.7% of its responses win, ties counting half (95% interval" in shown[start : start + 100]
    assert "KL, nats a response: 12.0 (11.0 to 13.0)" in shown[start : start + 500]
    assert start < shown.index("Training")


def test_responses_stand_side_by_side_with_their_scores(page_text: str) -> None:
    """The first six prompts in the order of the data, then where the reference is furthest ahead."""
    shown = " ".join(Page(page_text).text.split())
    assert "policy wins, difference +1.000" in shown
    assert shown.index("reference wins, difference -0.100") < shown.index("policy wins, difference +1.000")
    assert "policy, score +0.900" in shown
    assert "reference, score -0.100" in shown
    lost = shown.index("Where the reference is furthest ahead")
    assert shown.index("difference -0.190", lost) < shown.index("difference -0.160", lost)
    assert "not of this result" not in shown


def test_tokens_have_the_colour_of_their_log_ratio(page_text: str) -> None:
    page = Page(page_text)
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert len(spans) == 2 * 2 * 10  # two pieces a side, two sides a pair, five pairs at each end
    assert {span.get("class") for span in spans} == {"up4", "down4"}
    assert spans[0]["title"] == "+3.00 nats: policy -1.00, reference -4.00"
    assert spans[1]["title"] == "-7.80 nats: policy -10.00, reference -2.20", "joined to the next"


def raise_in_kept_pairs(run_dir: Path, name: str, by: float) -> None:
    path = run_dir / "evaluation.tokens.json"
    kept = json.loads(path.read_text())
    for pair in kept["pairs"]:
        pair[name] += by
    path.write_text(json.dumps(kept))


def test_tokens_of_another_evaluation_are_not_shown(run: tuple[Path, Config]) -> None:
    raise_in_kept_pairs(run[0], "delta", 5.0)
    text = write_report(*run).read_text()
    assert ' title="+3.00 nats' not in text
    assert "log-ratio" in text


def test_pairs_of_one_ranking_have_each_their_own_tokens(run: tuple[Path, Config]) -> None:
    """`data.expand` makes several rows of one, at one location, and often about as far apart."""
    raise_in_kept_pairs(run[0], "row", 1)
    assert ' title="+3.00 nats' not in write_report(*run).read_text()


def test_the_page_says_how_to_repeat_it(run: tuple[Path, Config]) -> None:
    shown = Page(write_report(*run).read_text()).text
    assert f"dpo train --config '{run[0]}/config.yaml'" in shown, "quoted: the directory is run<b>"
    assert "--judge=vader" in shown
    assert "--temperatures=[0.5, 1.0]" in shown
    assert "(of the software that wrote this page)" in shown
    (run[0] / "summary.json").write_text('{"versions": {"jax": "0.0.1"}}')
    shown = Page(write_report(*run).read_text()).text
    assert "0.0.1" in shown
    assert "of the software" not in shown


def test_the_head_says_what_was_trained(run: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_svg", lambda *_: "<svg></svg>")
    path, config = run
    for lora, said in (
        (LoraConfig(), "all weights"),
        (LoraConfig(rank=8), "LoRA adapters of rank 8"),
        (LoraConfig(rank=4, use_dora=True), "DoRA adapters of rank 4"),
        (LoraConfig(init="owner/adapter"), "adapters starting as owner/adapter"),
    ):
        shown = Page(write_report(path, replace(config, lora=lora)).read_text()).text
        assert f" · {said} · " in shown[: shown.index("Held-out accuracy")]


def test_no_line_ends_within_an_option() -> None:
    command = "dpo train --run_dir='a<b> --long' '--temperatures=[0.5, 1.0]' a--b --" + "x" * 99
    shown = str(options_whole(command))
    assert re.findall(r'<span class="option">(.*?)</span>', shown) == [
        "--run_dir",
        "--long",
        "--temperatures",
    ]
    assert html.unescape(re.sub(r"</?span[^>]*>", "", shown)) == command
    assert "<b>" not in shown


def test_the_command_of_an_endpoint_says_where_it_is(run: tuple[Path, Config]) -> None:
    path = run[0] / "winrate" / "winrate.json"
    result = json.loads(path.read_text())
    judge = {"judge": "endpoint", "url": "http://here/v1/chat/completions", "model": "m", "template": "0"}
    result["judge"] = judge | {"options": {"temperature": 0}}
    result["settings"]["judge"] = "endpoint"
    path.write_text(json.dumps(result))
    shown = Page(write_report(*run).read_text()).text
    assert "--judge=endpoint" in shown
    options = "--endpoint.base_url=http://here/v1 --endpoint.model=m"
    assert f"{options} '--endpoint.options={{\"temperature\": 0}}'" in shown


def test_the_command_says_what_is_not_the_runs_own(run: tuple[Path, Config]) -> None:
    """Settings that a match has of its run are not named again; a judge's arguments are, none included."""
    run_dir, config = run
    arguments = {"enable_thinking": False}
    config = replace(config, data=replace(config.data, template_kwargs=arguments, max_eval=7))
    (result,) = read_results(run_dir / "winrate").values()
    result["settings"] |= read_as(config.data) | {"judge_template_kwargs": arguments}
    words = command(run_dir, result, config)
    assert "template_kwargs" not in words
    assert "--limit" not in words
    assert "--split" not in words
    given = replace(config.data, eval_split="validation", template_characters=200_000)
    result["settings"] |= read_as(given)
    words = shlex.split(command(run_dir, result, config))
    assert {"--split=validation", "--template_characters=200000"} <= set(words)
    result["settings"] |= read_as(config.data)
    result["settings"]["judge_template_kwargs"] = {}
    assert "--judge_template_kwargs={}" in shlex.split(command(run_dir, result, config))
    result["settings"]["template_kwargs"] = {}  # which holds for the judge too, where nothing is said of it
    words = shlex.split(command(run_dir, result, config))
    assert "--template_kwargs={}" in words
    assert not any(word.startswith("--judge_template") for word in words)


def test_a_run_without_win_rate_says_how_to_measure_it(run: tuple[Path, Config]) -> None:
    shutil.rmtree(run[0] / "winrate")
    assert f"dpo winrate --run '{run[0]}'" in Page(write_report(*run).read_text()).text


def test_a_win_rate_of_another_policy_is_not_shown(run: tuple[Path, Config]) -> None:
    """Of a model that `--policy` named, of one that was trained away, and of a run that goes on."""
    run_dir, _ = run
    export, path = run_dir / "export", run_dir / "winrate" / "winrate.json"
    export.mkdir()
    listed = "0  model.safetensors\n1  README.md\n"
    (export / "SHA256SUMS").write_text(listed)
    result = json.loads(path.read_text())
    for files, shown in ((listed_files(export), True), ("other", False), (None, False)):
        path.write_text(json.dumps(result | {"policy_files": files}))
        text = Page(write_report(*run).read_text()).text
        assert ("Win-rate over the" in text) == shown
        assert ("measured another policy than this run has: winrate.json." in text) != shown
    path.write_text(json.dumps(result | {"policy_files": listed_files(export)}))
    (export / "SHA256SUMS").write_text(listed.replace("1 ", "2 "))  # another model card
    assert "Win-rate over the" in Page(write_report(*run).read_text()).text
    (export / "SHA256SUMS").write_text(listed.replace("0 ", "2 "))
    assert "Win-rate over the" not in Page(write_report(*run).read_text()).text
    (export / "SHA256SUMS").write_text(listed)
    (run_dir / "summary.json").unlink()
    assert "Win-rate over the" not in Page(write_report(*run).read_text()).text


def test_a_line_separator_in_an_answer_ends_no_line(run: tuple[Path, Config]) -> None:
    """A journal writes texts as they are, and U+2028 is no line break in JSON."""
    path = run[0] / "winrate" / "verdicts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    text = "".join(json.dumps(line | {"policy": "one\u2028two"}, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    assert "one⟨U+2028⟩two" in write_report(*run).read_text(encoding="utf-8")


def test_verdicts_that_are_gone_are_missed(run: tuple[Path, Config]) -> None:
    (run[0] / "winrate" / "verdicts.jsonl").unlink()
    with pytest.raises(ValueError, match=r"verdicts.jsonl lacks 24 of the verdicts that winrate.json counts"):
        write_report(*run)


def test_a_policy_within_its_baselines_is_said_to_be(run: tuple[Path, Config]) -> None:
    run_dir, config = run
    from safetensors.numpy import load_file

    numbers = load_file(run_dir / "heldout.safetensors")
    numbers["policy"] = numbers["reference"] + np.tile([[1.0, 0.0], [0.0, 1.0]], (15, 1))
    save_file(numbers, run_dir / "heldout.safetensors")
    shown = " ".join(Page(write_report(run_dir, config).read_text()).text.split())
    assert "so this policy is not shown to be better than “longer is better” or the reference's log" in shown
    numbers["policy"] = numbers["reference"] + np.array([[1.0, 0.0]])
    save_file(numbers, run_dir / "heldout.safetensors")
    assert "not shown to be better" not in write_report(run_dir, config).read_text()


def test_an_unfinished_run_is_reported_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 0.69}\n{"step": 1, "lo')
    save_config(Config(), tmp_path / "config.yaml")
    shown = Page(write_report(tmp_path, Config()).read_text()).text
    assert "it is not finished" in shown
    assert "1 step" in shown
    assert "1 steps" not in shown


def test_a_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path, Config())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_steps_on_the_axis_are_whole_numbers(count: int) -> None:
    svg = plots.curves("Loss", [plots.Curve("loss", range(count), [0.5] * count)])
    ticks = re.findall(r'id="xtick_\d+".*?<text[^>]*>([^<]+)</text>', svg, re.DOTALL)
    assert ticks
    assert all(re.fullmatch(r"[−-]?\d+", tick) for tick in ticks), ticks


@pytest.mark.parametrize("size", [2e-5, 0.00195, 0.7, 3.1, 270.0, 1e6])
def test_numbers_below_an_axis_do_not_overlap(size: float) -> None:
    """As browsers draw them: a digit of the widest usual face is 0.64 of its height."""
    drawn = [
        plots.histogram("Margins", np.linspace(-size, size, 50), "δ", counted="pairs"),
        plots.curves("Loss", [plots.Curve("loss", np.linspace(0, 1e6 * size, 9).round().tolist(), range(9))]),
        plots.paths("Reward", "KL, nats", [([(0.0, 1.0), (size, 2.0)], 0)]),
        plots.intervals("Accuracy", [("a name of thirty characters, or", (0.5, 0.4, 0.6))], level=0.5),
    ]
    for svg in drawn:
        places = re.findall(r'id="xtick_\d+".*?<text style="([^"]*)" ([^>]*)>([^<]+)</text>', svg, re.DOTALL)
        ends = []
        for style, attributes, text in places:
            height = float(re.findall(r"([\d.]+)px", style)[0])
            middle = float(re.findall(r'x="([-\d.]+)"|translate\(([-\d.]+)', attributes)[0][0])
            ends.append((middle - 0.32 * height * len(text), middle + 0.32 * height * len(text)))
        assert len(ends) > 1
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(sorted(ends))), places


def test_counts_of_pairs_are_whole_and_rates_are_in_percent() -> None:
    svg = plots.histogram("Margins", np.linspace(-1, 1, 3), "δ", counted="pairs")
    ticks = re.findall(r'id="ytick_\d+".*?<text[^>]*>([^<]+)</text>', svg, re.DOTALL)
    assert ticks == ["0", "1"]
    assert ">pairs</text>" in svg
    rates = plots.intervals("Accuracy", [("policy", (0.5, 0.25, 0.75))], level=0.5)
    assert ">50%</text>" in rates or ">50.0%</text>" in rates
    assert ">0.5</text>" not in rates


def test_figures_take_the_pages_colours() -> None:
    svg = plots.histogram("a < b", np.linspace(-1, 2, 50), "δ", counted="pairs")
    assert "#0a0b0" not in svg
    assert "var(--series-1)" in svg
    assert "<title>a &lt; b</title>" in svg


def test_a_schedule_is_drawn_as_it_is() -> None:
    """The running mean of a noisy metric is drawn over its faint values; that of a schedule would be late."""
    values = [float(step) for step in range(90)]
    noisy, exact = (
        plots.curves("x", [plots.Curve("x", range(90), values, is_exact=is_exact)])
        for is_exact in (False, True)
    )
    assert "stroke-opacity: 0.35" in noisy
    assert "stroke-opacity" not in exact


def test_names_with_dollars_are_names_and_no_formulas() -> None:
    svg = plots.intervals(
        "over $a$b\\frac$", [("$x", (0.5, 0.4, 0.6)), ("runs/$\\frac$", (0.5, 0.4, 0.6))], level=0.5
    )
    assert "runs/$\\frac$" in svg


def test_parts_of_the_pairs_have_a_table(run: tuple[Path, Config], page_text: str) -> None:
    """By length difference and by source: margin, log-ratios and calibration too."""
    page = " ".join(Page(page_text).text.split())
    table = page[page.index("".join(BREAKDOWN)) :]
    for name in ("better is longer", "better is shorter", "s<i>0", "s<i>1", "mean of the sources"):
        assert name in table
    heldout = load_heldout(*run)
    part = describe(heldout.rows, beta=0.1).get("by_source", {})["s<i>0"]
    assert f"{part['margin'][0]:.3f} ({part['margin'][1]:.3f} to" in table
    assert f"{part['calibration']['ece']:.3f}" in table


def test_columns_that_are_empty_throughout_are_left_out(run: tuple[Path, Config]) -> None:
    figures = describe(load_heldout(*run).rows, beta=0.1)
    assert breakdown(figures)[0] == list(BREAKDOWN)
    del figures["by_source"], figures["mean_of_sources"]
    columns, rows = breakdown(figures)
    assert columns == list(BREAKDOWN[:-3]), "by length difference there are no baselines"
    assert {len(row) for row in rows} == {len(columns)}


def test_labelled_responses_are_reported_as_what_they_are(run: tuple[Path, Config]) -> None:
    run_dir, config = run
    rows = [{"prompt": f"p{i}", "completion": HOSTILE, "label": i % 2 == 0} for i in range(30)]
    Path(str(config.data.eval)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = np.full((30, 1), -9.0)
    numbers = {
        "policy": reference + np.where(np.arange(30)[:, None] % 3 == 0, -1.0, 1.0),
        "reference": reference,
        "present": np.ones((30, 1), bool),
        "lengths": np.full((30, 1), 5),
        "ranks": np.arange(30)[:, None] % 2,
        "origin": np.arange(30),
    }
    save_file(numbers, run_dir / "heldout.safetensors")
    page = " ".join(Page(write_report(run_dir, config).read_text()).text.split())
    assert "50.0% of labelled held-out responses moved as they should" in page
    assert "30 responses to 30 prompts" in page
    assert "Pairs that the policy orders worst" not in page


def test_a_run_of_one_prompt_is_reported_with_a_warning(run: tuple[Path, Config]) -> None:
    from safetensors.numpy import load_file

    run_dir, config = run
    numbers = {name: values[:1] for name, values in load_file(run_dir / "heldout.safetensors").items()}
    save_file(numbers, run_dir / "heldout.safetensors")
    page = Page(write_report(run_dir, config).read_text()).text
    assert "1 prompt: nothing can be drawn" in page


def test_rows_that_were_dropped_at_tokenisation_are_counted(run: tuple[Path, Config]) -> None:
    from safetensors.numpy import load_file

    run_dir, config = run
    numbers = {name: values[:25] for name, values in load_file(run_dir / "heldout.safetensors").items()}
    save_file(numbers, run_dir / "heldout.safetensors")
    assert list(load_heldout(run_dir, config).left_out.values()) == [5]


def test_a_page_that_cannot_be_written_names_its_path(run: tuple[Path, Config], tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"the page could not be written to .*none/page\.html"):
        write_report(*run, output=tmp_path / "none" / "page.html")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (375, 812)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_shows_it(page_text: str, tmp_path: Path, width: int, height: int, scheme: str) -> None:
    """It renders in light and dark at a desk's and a phone's width, without a console message."""
    page = tmp_path / "page.html"
    page.write_text(page_text)
    picture = tmp_path / "page.png"
    assert open_in_chromium(page, picture, width=width, height=height, scheme=scheme) == []
    assert picture.stat().st_size > 20_000


@pytest.mark.browser
def test_a_reference_to_the_outside_would_be_a_console_message(page_text: str, tmp_path: Path) -> None:
    """The page forbids itself every request, so that the test above would see one."""
    page = tmp_path / "page.html"
    image = '<img src="http://127.0.0.1:9/x.png"></body>'
    page.write_text(page_text.replace("</body>", image))
    messages = open_in_chromium(page, tmp_path / "page.png")
    assert any("Content Security Policy" in message for message in messages)


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (2, "None")])
def test_a_run_of_one_step_shows_its_point(count: int, marker: str) -> None:
    axes = Figure().subplots()
    plots._draw_curve(axes, plots.Curve(None, range(count), [0.7] * count), "black")
    assert axes.lines[0].get_marker() == marker


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert with_interval((-1e-9, -1e-9, 1e-9)) == "0.000 (0.000 to 0.000)"
    assert points_with_interval((-1e-9, -0.125, 0.5)) == "+0.0 points (-12.5 to +50.0)"
