"""`dpo winrate` on a tiny model: every verdict is kept, nothing is done twice, controls come out as known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dpo.cli import main
from dpo.commands.winrate import match_after_training
from dpo.config import Config, DataConfig, ModelConfig, WinrateConfig
from dpo.data.preferences import Preference
from dpo.huggingface.pretrained import load_pretrained
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.judging import local_judge, match, samples
from dpo.judging.figures import MatchResult
from dpo.judging.judges import ControlJudge, JudgeIdentity, Template, Verdict
from dpo.judging.kinds import JUDGES, find_kind, open_judge
from dpo.judging.local_judge import verdict_of_log_probs
from dpo.judging.match import _judged, _unjudged
from dpo.judging.match_figures import Pair, describe_temperature
from dpo.judging.prompts import choose_judge, read_prompts, with_length
from dpo.judging.results import write_result
from dpo.judging.samples import Request, Sample, model_identity
from dpo.judging.winrate import Judged, describe_pairs
from dpo.models import sampling
from dpo.models.drawing import SamplingConfig
from dpo.outcomes import UserError

PROMPTS = ["Say A.", "Say B.", "What now?", "Name a fruit.", "Is it late?", "Say A."]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "chosen": f"{text} yes", "rejected": "no"} for text in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(data: Path, tiny_model_dir: Path, tmp_path: Path) -> list[str]:
    return [
        "winrate",
        f"--policy={tiny_model_dir}",
        f"--opponent={tiny_model_dir}",
        f"--data={data}",
        f"--output={tmp_path / 'out'}",
        "--max_new_tokens=8",
        "--batch_size=4",
    ]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(directory: Path, temperature: str = "1.0", *, name: str = "winrate") -> dict:
    return json.loads((directory / f"{name}.json").read_text())["temperatures"][temperature]


def test_a_model_against_itself(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts draw different samples, so this is no comparison of a text with itself; KL is zero."""
    out = tmp_path / "out"
    assert main([*command, "--judge=longer", "--samples=3", "--temperatures=[0,1]"]) == 0
    figures = result_of(out)
    result = json.loads((out / "winrate.json").read_text())
    assert result["policy_files"] is not None, "by which it is known"
    settings = result["settings"]
    assert (settings["template_kwargs"], settings["judge_template_kwargs"], settings["columns"]) == (
        {},
        {},
        {},
    )
    assert (figures["prompts"], figures["pairs"]) == (5, 15), "a prompt that was there is left out"
    low, high = figures["win_rate"][1:]
    assert low <= 0.5 <= high
    assert figures["ties_identical"] < 15
    assert figures["log_ratio"]["KL, nats"] == [0, 0, 0]
    greedy = result_of(out, "0.0")
    assert greedy["ties_identical"] == 15
    assert greedy["win_rate"] == pytest.approx([0.5, 0.170, 0.830], abs=1e-3), "Wilson's, of 5 prompts"
    assert "log-ratio, nats" in greedy["log_ratio"]

    # every verdict is there, with all that led to it
    verdicts = lines_of(out / "verdicts.jsonl")
    assert len(verdicts) == 2 * 30
    for line in verdicts:
        assert {"prompt", "policy", "opponent", "order", "judge", "answer", "choice", "winner"} <= set(line)
        first = line["policy"] if line["order"] == "policy_first" else line["opponent"]
        second = line["opponent"] if line["order"] == "policy_first" else line["policy"]
        longer = "first" if len(first) > len(second) else "second" if len(second) > len(first) else "tie"
        assert line["choice"] == longer
    assert "win-rate" in capsys.readouterr().out

    # a second start loads no model and asks no judge, and says the same
    before = (out / "winrate.json").read_bytes(), (out / "verdicts.jsonl").read_bytes()
    monkeypatch.setattr(match, "load_pretrained", None)
    monkeypatch.setattr(match, "sequence_log_probs", None)
    assert main([*command, "--judge=longer", "--samples=3", "--temperatures=[0,1]"]) == 0
    assert before == ((out / "winrate.json").read_bytes(), (out / "verdicts.jsonl").read_bytes())

    # nor does it where models and data are named by another path: it is the same match
    monkeypatch.chdir(tmp_path)
    near = [word.replace(str(tmp_path), ".") for word in command]
    assert near != command
    assert main([*near, "--judge=longer", "--samples=3", "--temperatures=[0,1]"]) == 0
    assert [path.name for path in out.glob("winrate*.json")] == ["winrate.json"]
    (out / "winrate.json").write_bytes(before[0])

    # another judge sees the same samples, and its figures are beside those of the first
    assert main([*command, "--judge=first", "--samples=3", "--kl=false"]) == 0
    assert (out / "winrate.json").read_bytes() == before[0]
    figures = result_of(out, name="winrate-first")
    assert figures["win_rate"] == pytest.approx([0.5, 0.170, 0.830], abs=1e-3)
    assert figures["judge"]["says_first"] == 1.0
    assert "it decides by position" in capsys.readouterr().out


def test_what_verdicts_depend_on_makes_another_judge_and_other_settings_do_not(tmp_path: Path) -> None:
    figures = describe_pairs([Judged("prompt", "ours", "theirs", "first", "second")])

    def place(options: dict[str, object], seed: int) -> str:
        judge: JudgeIdentity = {"judge": "endpoint", "url": "u", "model": "m", "options": options}
        settings = {"judge": "endpoint", "seed": seed}
        of_one: MatchResult = {
            "policy": "policy",
            "opponent": "opponent",
            "data": "data",
            "judge": judge,
            "settings": settings,
            "temperatures": {"1.0": figures},
        }
        return write_result(tmp_path, of_one).name

    assert place({}, 0) == place({}, 1) == "winrate.json"
    assert place({"max_tokens": 4096}, 0) == "winrate-endpoint.json"


@pytest.mark.parametrize(
    ("given", "used"), [(None, {"depth": 2}), ({}, {}), ({"depth": 3}, {"depth": 3})], ids=str
)
def test_a_judges_arguments_are_the_runs_unless_others_are_given(given, used, data, tmp_path, monkeypatch):
    """None of its own are given by {}, which is not the same as to say nothing."""
    asked: list[WinrateConfig] = []

    def open_and_stop(given: WinrateConfig, log: object) -> None:
        asked.append(given)
        raise UserError("enough")

    monkeypatch.setattr(match, "open_judge", open_and_stop)
    config = Config(data=DataConfig(eval=str(data), template_kwargs={"depth": 2}))
    config = replace(config, model=replace(config.model, source="policy", reference="opponent"))
    winrate = WinrateConfig(run="run", judge="longer", judge_template_kwargs=given)
    with pytest.raises(UserError, match="enough"):
        match.play(winrate, config, output=tmp_path, log=print)
    assert asked[0].judge_template_kwargs == used


def test_against_the_datas_own_responses(command: list[str], tmp_path: Path, monkeypatch) -> None:
    """The opponent is the best (or worst) response of the row; a reward of one's own is the judge."""
    (tmp_path / "my_own_reward.py").write_text("def yes(prompt, response): return 'yes' in response\n")
    monkeypatch.syspath_prepend(tmp_path)
    for opponent, part, name in (
        ("data:best", 0.0, "winrate"),
        ("data:worst", 0.5, "winrate-my_own_reward-yes-data-worst"),
    ):
        arguments = [*command, f"--opponent={opponent}", "--judge=my_own_reward:yes"]
        assert main(arguments) == 0
        figures = result_of(tmp_path / "out", name=name)
        assert figures["win_rate"][0] == part
        assert figures["reward"]["reward, opponent"][0] == (opponent == "data:best")
        assert "log_ratio" not in figures
    texts = {line["opponent"] for line in lines_of(tmp_path / "out" / "verdicts.jsonl")}
    assert texts == {"no", *(f"{text} yes" for text in PROMPTS)}


@pytest.mark.parametrize(
    ("opponent", "texts"), [("data:best", ["good", "late"]), ("data:worst", ["bad"]), (None, ["bad", "good"])]
)
def test_a_labelled_response_is_the_datas_best_where_its_label_says_so(
    opponent: str | None, texts: list[str], data: Path
) -> None:
    """Prompt 2 has an undesirable response first: it is none of the data's best."""
    labelled = [(1, "good", True), (2, "bad", False), (2, "late", True), (1, "worse", True)]
    rows = [{"prompt": f"{n}?", "completion": text, "label": label} for n, text, label in labelled]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data=DataConfig(eval=str(data)), model=ModelConfig(reference=opponent))
    said: list[str] = []
    found = read_prompts(config, said.append)
    assert sorted(str(row.responses[0]) for row in found) == sorted(texts)
    assert ("labelled otherwise" in said[0]) == (opponent is not None)
    data.write_text(json.dumps({"prompt": "?", "completion": "x", "label": opponent == "data:worst"}) + "\n")
    if opponent is not None:
        with pytest.raises(
            UserError, match=f"opponent is {opponent}, and no response of .* allowed: a model"
        ):
            read_prompts(config, said.append)


def test_rewards_are_means_over_all_pairs(
    command: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At temperature 0 a model against itself gives the same texts: ties, whose rewards count too."""
    (tmp_path / "length_reward.py").write_text("def length(prompt, response): return len(response)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*command, "--judge=length_reward:length", "--temperatures=[0]", "--kl=false"]) == 0
    assert "judge: 0 of 10 verdicts of length_reward:length are there" in capsys.readouterr().out
    figures = result_of(tmp_path / "out", "0.0")
    assert (figures["ties_identical"], figures["wins"], figures["losses"]) == (5, 0, 0)
    for side in ("policy", "opponent"):
        assert figures["reward"][f"reward, {side}"][0] == figures["mean_length"][side]


def test_judging_in_vain_says_what_was_wrong(
    command: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nan_reward.py").write_text("def nan(prompt, response): return float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*command, "--judge=nan_reward:nan", "--kl=false"]) == 2
    assert (
        "temperature 1: none of 5 pairs has a valid verdict in both orders; 10 times: a reward is not a "
        "finite number (verdicts.jsonl" in capsys.readouterr().err
    )


def test_what_was_cut_stands_beside_the_win_rate(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides' shares, a warning, and the pairs without what was cut."""
    assert main([*command, "--judge=longer", "--kl=false"]) == 0
    samples = lines_of(tmp_path / "out" / "samples.jsonl")
    shares = {
        role: np.mean([not line["ended"] for line in samples if line["player"] == role])
        for role in ("policy", "opponent")
    }
    figures = result_of(tmp_path / "out")
    assert figures["cut"] == {"at": 8, **shares, "pairs_left_out": 0}
    assert shares["policy"] > 0.05
    printed = capsys.readouterr().out
    assert f"{shares['policy']:.1%} of the policy's" in printed
    assert f"! {shares['policy']:.0%} of the policy's responses were cut off at 8 tokens" in printed
    ended = {role: {s["prompt"] for s in samples if s["player"] == role and s["ended"]} for role in shares}
    both = ended["policy"] & ended["opponent"]
    code = main([*command, "--judge=longer", "--kl=false", "--leave_out_cut=true"])
    if both:
        assert (code, result_of(tmp_path / "out")["pairs"]) == (0, len(both))
    else:
        assert code == 2
        assert "in every pair a response was cut off" in capsys.readouterr().err


def test_without_the_samples_that_were_cut_the_log_ratio_estimates_no_kl() -> None:
    """Those that are left are the short ones, of which the policy may think otherwise."""
    request = Request("Say A.", 0, SamplingConfig(max_new_tokens=8))
    pair = Pair(request, Sample("A", [1], [2], has_ended=True), "B", [1], opponent_has_ended=True)
    lines = [
        _judged(_unjudged(ControlJudge("longer"), pair, order), Verdict("tie", ""))
        for order in ("policy_first", "opponent_first")
    ]
    for left_out, name in ((False, "KL, nats"), (True, "log-ratio, nats")):
        figures = describe_temperature(
            1.0, 0, [pair], [(lines[0], lines[1])], np.array([2.0]), left_out=left_out
        )
        assert figures.get("log_ratio", {}).keys() == {name}


def test_rows_of_prompts_alone_are_answered(
    command: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = {"role": "user", "content": "Say B."}
    rows = [{"prompt": "Say A.", "id": 1}, {"prompt": [turn], "system": "Be brief."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*command, "--judge=longer", "--kl=false"]) == 0
    prompts = [line["prompt"] for line in lines_of(tmp_path / "out" / "samples.jsonl")]
    assert "Say A." in prompts
    assert [{"role": "system", "content": "Be brief."}, turn] in prompts
    assert main([*command, "--judge=longer", "--opponent=data:best"]) == 2
    assert "holds prompts alone; allowed: a model" in capsys.readouterr().err
    data.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": ""}) + "\n")
    assert main([*command, "--judge=longer"]) == 2
    assert "prompts.jsonl:2" in capsys.readouterr().err


def test_the_length_is_that_of_the_datas_responses(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    given = WinrateConfig(run="run")
    config = replace(Config(), model=replace(Config().model, source=str(tiny_model_dir)))
    for count in (1, 70, 200):
        text = "no " * count
        longest = len(tokenizer.encode(text, add_special_tokens=False)) + 1
        rows = [Preference("x", (text, "no"), (0, 1), None, "s", "s:1")]
        found = with_length(given, config, rows, print).max_new_tokens
        assert found is not None
        assert longest <= found < longest + 64
        assert found % 64 == 0
    nothing = [Preference("x", (), (), None, "s", "s:1")]
    assert with_length(given, config, nothing, print).max_new_tokens == 256
    asked = replace(given, max_new_tokens=5)
    assert with_length(asked, config, nothing, print).max_new_tokens == 5


def test_a_judge_is_chosen_for_the_shipped_data_alone(tmp_path: Path) -> None:
    """By what they hold, wherever they stand."""
    shipped = Path(__file__).parents[2] / "data" / "sentiment_eval.jsonl"
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(shipped.read_bytes())
    for source in (str(shipped), "shipped:sentiment_eval.jsonl", str(copy)):
        assert choose_judge(None, source) == "vader"
    assert choose_judge("longer", str(copy)) == "longer"
    copy.write_text("{}")
    for source in (str(copy), "no/such"):
        with pytest.raises(ValueError, match=r"judge is not given, .* allowed: vader: .* reward_model:DIR"):
            choose_judge(None, source)


def test_an_interrupted_start_goes_on(command: list[str], tmp_path: Path, monkeypatch) -> None:
    """Sampling dies after one batch of four: the next start draws the six that are missing and no other."""
    arguments = [*command, "--judge=vader", "--kl=false", "--seed=3"]
    real, calls = sampling.generate, []

    def dies_the_second_time(model, prompts, **rules):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(model, prompts, **rules)

    monkeypatch.setattr(samples, "generate", dies_the_second_time)
    with pytest.raises(RuntimeError, match="killed"):
        main(arguments)
    drawn = lines_of(tmp_path / "out" / "samples.jsonl")
    assert len(drawn) == 4
    assert main(arguments) == 0
    assert sum(calls) - 1 == 10
    assert lines_of(tmp_path / "out" / "samples.jsonl")[:4] == drawn


def test_samples_depend_on_seed_part_and_prompt_only(command: list[str], tmp_path: Path) -> None:
    arguments = [*command, "--judge=longer", "--kl=false"]
    drawn = {}
    for name, extra in (("all", []), ("few", ["--limit=2", "--batch_size=1"]), ("other", ["--seed=1"])):
        out = tmp_path / name
        assert main([*arguments, *extra, f"--output={out}"]) == 0
        lines = lines_of(out / "samples.jsonl")
        drawn[name] = {(line["player"], line["prompt"]): line["tokens"] for line in lines}
    assert drawn["few"].items() <= drawn["all"].items()
    assert drawn["other"] != drawn["all"]
    assert drawn["all"]["policy", "Say A."] != drawn["all"]["opponent", "Say A."]


def test_every_file_that_a_model_is_read_from_is_in_its_identity(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Templates of other names among them, which a prompt with tools takes."""
    copied = tmp_path / "copied"
    shutil.copytree(tiny_model_dir, copied)
    other = copied / "additional_chat_templates" / "tool_use.jinja"
    other.parent.mkdir()
    other.write_text("{{ messages }}")
    beside = {"README.md", "SHA256SUMS"}
    read = [path for path in copied.rglob("*") if path.is_file() and path.name not in beside]
    assert other in read
    before = model_identity(str(copied))
    for path in read:
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert model_identity(str(copied)) != before, path
        path.write_bytes(content)
    assert model_identity(str(copied)) == before


def test_a_local_model_judges_by_the_log_probs_of_its_verdicts(
    command: list[str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The log-probs are those of the tokens A and B after the rendered template, read off the full logits."""
    template = tmp_path / "short.jinja"
    template.write_text("{{ messages[0].content }} A: {{ first }} B: {{ second }}")
    arguments = [*command, f"--judge=local:{tiny_model_dir}", f"--template={template}", "--kl=false"]
    assert main([*arguments, "--limit=2"]) == 0
    verdicts = lines_of(tmp_path / "out" / "verdicts.jsonl")
    assert len(verdicts) == 4
    pretrained = load_pretrained(tiny_model_dir)
    tokenizer, model = pretrained.tokenizer, pretrained.model
    line = verdicts[0]
    first, second = (
        (line["policy"], line["opponent"])
        if line["order"] == "policy_first"
        else (line["opponent"], line["policy"])
    )
    text = f"<s>user\n{line['prompt']} A: {first} B: {second}</s>\n<s>assistant\n"
    ids = jnp.array([tokenizer.encode(text, add_special_tokens=False)])
    ones = jnp.ones_like(ids)
    hidden = model.hidden(ids, jnp.arange(ids.shape[1])[None], ones, 0 * ones)
    logits = np.asarray(model.logits(hidden))[0, -1].astype(np.float64)
    a, b = (logits[tokenizer.encode(letter, add_special_tokens=False)[0]] for letter in "AB")
    log_probs = json.loads(line["answer"])
    assert log_probs["A"] - log_probs["B"] == pytest.approx(a - b, abs=1e-4)
    assert line["choice"] == ("first" if a > b else "second")
    assert line["judge"]["template"] == Template(template).sha256


def test_a_local_judge_without_tokens_for_its_verdicts_is_found_before_anything_is_computed(
    command: list[str],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sampled or, after training, trained."""
    monkeypatch.setattr(local_judge, "VERDICTS", ("A", "BB"))  # two bytes are two tokens of the tiny model's
    judge, config = f"local:{tiny_model_dir}", Config(data=DataConfig(eval="shipped:sentiment_eval.jsonl"))
    assert main([*command, f"--judge={judge}"]) == 2
    assert f"{tiny_model_dir}: A and B are the tokens" in capsys.readouterr().err
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    with pytest.raises(UserError, match="A and B are the tokens"):
        match_after_training(config, judge, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge=nonsense"], "judge is 'nonsense'; allowed: vader, module:function, endpoint"),
        (["--judge=endpoint"], "endpoint.base_url is not given"),
        (["--judge=local:"], "judge is 'local:'; allowed: local:MODEL"),
        (["--judge=vader", "--template=x.jinja"], "template is 'x.jinja', but judge vader reads none"),
        ([], "judge is not given, and"),
        (["--temperatures=[-1]"], "temperatures is -1.0; allowed is at least 0.0"),
        (["--data=none.jsonl"], "data is 'none.jsonl': there is no such file"),
        (["--endpoint.retries=-1"], "endpoint.retries is -1; allowed is at least 0"),
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


def test_without_a_run_all_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["winrate", "--policy=x"])
    assert "opponent is not given; allowed: --opponent VALUE, or --run DIR" in capsys.readouterr().err


def test_a_log_prob_that_is_no_number_is_an_invalid_verdict() -> None:
    verdict = verdict_of_log_probs(float("nan"), -1.0)
    assert (verdict.choice, verdict.problem) == (None, "a log-prob is not a number")
    assert [verdict_of_log_probs(*both).choice for both in ((-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0))] == [
        "first",
        "second",
        "tie",
    ]


def test_a_reward_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    with pytest.raises(ValueError, match="a reward model is the judge reward_model:"):
        open_judge(WinrateConfig(run="run", judge=f"local:{tmp_path}"), print)


@pytest.mark.parametrize(
    "judge", ["", "nonsense", ":f", "module:", "local:", "reward_model:", "vader:", "vader:f", "endpoint:x"]
)
def test_what_is_no_judge_is_refused(judge: str) -> None:
    with pytest.raises(ValueError, match=f"^judge is {judge!r}; allowed: "):
        find_kind(judge)


@pytest.mark.parametrize("name", JUDGES)
def test_every_row_of_the_table_is_found_and_documented(name: str) -> None:
    kind = JUDGES[name]
    spelt = name if kind.source is None else f"{name}:{kind.source}"
    assert find_kind(spelt)[0] is kind
    page = (Path(__file__).parents[2] / "docs" / "winrate.md").read_text()
    assert f"`{spelt}`" in page


@pytest.mark.slow
def test_smollm2_judges_by_its_own_log_probs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real model as policy and as judge: every verdict is valid, and its bias to a position is shown."""
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    questions = ["What is the capital of France?", "How many legs has a dog?", "Name a colour.", "Say hello."]
    answers = ["Paris.", "Four.", "Blue.", "Hello!"]
    rows = [
        {"prompt": question, "chosen": answer, "rejected": "zxqv jjj kkq"}
        for question, answer in zip(questions, answers, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "embedded:smollm2-135m-instruct"
    command = ["winrate", f"--policy={source}", "--opponent=data:worst", f"--data={data}", f"--output={out}"]
    assert main([*command, f"--judge=local:{source}", "--max_new_tokens=16", "--temperatures=[0]"]) == 0
    figures = result_of(out, "0.0")
    assert figures["invalid"] == 0
    assert figures["wins"] + figures["ties"] + figures["losses"] == 4
    assert figures["judge"]["flips"] is not None
    verdicts = lines_of(out / "verdicts.jsonl")
    log_probs = np.array([[json.loads(line["answer"])[letter] for letter in "AB"] for line in verdicts])
    assert np.isfinite(log_probs).all()
    assert (log_probs < 0).all()
    assert np.exp(log_probs).sum(1).max() <= 1
    # with the order changed, the gibberish loses log-odds: what it is judged by is not the position alone
    gap = (log_probs[:, 0] - log_probs[:, 1]).reshape(4, 2)
    assert (gap[:, 0] - gap[:, 1]).mean() > 0
    assert "win-rate" in capsys.readouterr().out
