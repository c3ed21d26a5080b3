"""Commands as a user gives them: complete help, errors before anything is loaded, a run from end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from dpo import cli
from dpo.cli import COMMANDS, main
from dpo.config import Config, DataConfig, WinrateConfig, with_options
from dpo.help import COMMON
from dpo.outcomes import STOPPED
from dpo.training import hub

ROOT = Path(__file__).resolve().parents[1]


def run_in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpo", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command line prints."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return capsys.readouterr().err


# ---- help and errors ----


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_help_gives_type_default_and_text_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help-all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    learning_rate = "Learning rate at its peak, after the warm-up. (type: float, default: 1e-06)"
    assert f"--optimizer.learning_rate LEARNING_RATE {learning_rate}" in text
    assert "--model.remat {none,dots,full}" in text
    assert "--print_config[=flags] Print" in text


def test_inspect_takes_a_runs_settings_and_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--run_dir RUN_DIR Directory for everything that the run writes;" in text
    assert "--example EXAMPLE Number of the preference to show" in text


@pytest.mark.parametrize(
    ("command", "own"), [("train", "--winrate"), ("inspect", "--heldout"), ("plan", "--memory")]
)
def test_the_short_help_has_the_commands_own_options_and_then_twenty_settings(
    command: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    heads = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    common = [f"--{name}" for names in COMMON.values() for name in names]
    assert len(common) == 20
    assert heads[-20:] == common
    assert own in heads[:-20]
    assert not [head for head in heads if "-" in head.removeprefix("--")], "one spelling: underscores"
    assert f"dpo {command} --help-all" in text
    assert "--model.remat" not in text


@pytest.mark.parametrize(
    ("data", "objective", "directory"),
    [
        ({}, {"name": "dpo"}, "runs/sentiment_train-dpo"),
        ({"train": "my/train.jsonl"}, {"name": "my_losses:margin"}, "runs/my-train-margin"),
        ({"train": "OWNER/NAME:SUBSET"}, {"name": "ipo"}, "runs/NAME_SUBSET-ipo"),
        ({"train": "a dir/"}, {"name": "ipo"}, "runs/a_dir-ipo"),
    ],
)
def test_a_run_directory_is_named_after_data_and_objective(data, objective, directory) -> None:
    assert Config(data=DataConfig(**data), objective=objective).run_dir == directory
    assert Config(run_dir="mine", data=DataConfig(**data), objective=objective).run_dir == "mine"


def test_help_and_errors_come_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from dpo.cli import main\n"
        "try: main(['train', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('jax', 'flax', 'transformers', 'datasets') if name in sys.modules])"
    )
    for argument in ("--help", "--training.steps=0"):
        done = subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command_does() -> None:
    done = run_in_process("train", "--training.stepz=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "dpo train: error: training.stepz is not a setting; did you mean training.steps?"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "'nonsense' is not a command; allowed: train, evaluate"),
        (["trian"], "'trian' is not a command; did you mean train? allowed: train, evaluate"),
        (
            ["train", "--steps=3"],
            "steps is not a setting; did you mean training.steps? allowed: run_dir, model",
        ),
        (["train", "--training.steps=many"], "training.steps: Expected an integer or null. Got value: many"),
        (
            ["train", "--winrate=nonsense", "--data.eval=data/sentiment_eval.jsonl"],
            "judge is 'nonsense'; allowed: vader, module:function, endpoint",
        ),
        (["train", "--winrate=vader"], "winrate is vader, and data.eval is not set"),
        (["train", "--training.steps=-1"], "training.steps is -1; allowed is at least 1"),
        (["train", "--data.layout=dense"], "data.layout: Expected one of 'padded', 'packed', 'shared'"),
        (["train", "--config=none.yaml"], "/none.yaml'"),
        (["train", "--config", str(ROOT / "LICENSE")], "LICENSE: not a YAML file of settings: "),
        (
            ["train", "--config", str(ROOT / "docs" / "report.png")],
            "report.png: not a YAML file of settings: ",
        ),
        (
            ["train", "training.steps=3"],
            "training.steps=3: settings begin with two dashes: --training.steps=3",
        ),
        (["train", f"--data.train={ROOT / 'Makefile'}"], "Makefile: a file ending in ''; allowed are .jsonl"),
        (
            ["train", f"--mesh.fsdp={'- ' * 2000}"],
            "a value holds more than 50 lists or mappings in each other",
        ),
        (["train", "--objective.name=dppo"], "name is 'dppo'; did you mean dpo? allowed: dpo"),
        (["train", "--objective.beta='1e-3'"], "(str); allowed: a number > 0"),
        (["train", "--objective.gamma=1"], "unknown hyper-parameter 'gamma'"),
        (["train", "--objective.bta=1"], "(given 1); did you mean beta? allowed: beta, "),
        (["train", "--objectives=[{name: dpo, weight: -1}]"], "weight is -1"),
        (
            ["train", "--objective.beta=0.2", "--objectives=[{name: ipo}]"],
            "objective is {'name': 'dpo', 'beta': 0.2} and objectives is [{'name': 'ipo'}]; allowed is one",
        ),
        (["train", "--training.trackers=[mlflow]"], "training.trackers: Expected one of 'tensorboard'"),
        (["train", "--data.train=no_such.jsonl"], "data.train is 'no_such.jsonl': there is no such file"),
        (["train", "--data.chat_template=x.jinja"], "data.chat_template is 'x.jinja': there is no such file"),
        (
            ["train", "--model=x.yaml"],
            "model: Expected a mapping of settings; a file of them is given by --co",
        ),
        (["train", "--data.template_date=July"], "data.template_date is 'July'; allowed is a date as 2024"),
        (
            ["evaluate", "--policy=x", "--reference=y"],
            "data is not given; allowed: --data SOURCE, or --run DIR",
        ),
        (
            ["evaluate", "--policy=x", "--reference=y", "--data=z.jsonl"],
            "data is 'z.jsonl': there is no such",
        ),
        (["evaluate", "--run=no_such_run"], "no_such_run/config.yaml: there is no such file"),
        (["export"], "run"),
        (["export", "--run=x"], "run is given by its place, without a name: VALUE, not --run=VALUE"),
        (["train", "--config", os.devnull], f"config: {os.devnull}: must be a regular file, and is"),
    ],
)
def test_what_is_wrong_is_named_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    if arguments[0] == "train":
        arguments = [*arguments, f"--run_dir={tmp_path / 'run'}", "--model.source=/no/such/model"]
    assert message in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_wrong_columns_and_a_run_dir_that_is_a_file_are_found_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All malformed rows are counted then, not the first ones only; skipped ones are no reason to stop."""
    path = tmp_path / "columns.jsonl"
    path.write_text('{"prompt": "a", "response_a": "b"}\n' * 20)
    given = [f"--data.train={path}", "--model.source=/no/such/model", f"--run_dir={tmp_path / 'run'}"]
    error = refused(capsys, "train", *given)
    assert "columns.jsonl: 20 of 20 rows are malformed" in error
    assert "columns.jsonl:1: field '(row)': no layout has the columns ['prompt', 'response_a']" in error
    assert "no model at '/no/such/model'" in refused(capsys, "train", *given, "--data.on_error=skip")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: it has no rows" in refused(
        capsys, "train", *given, f"--data.train={tmp_path}/empty.jsonl"
    )
    assert f"run_dir is '{path}', a file" in refused(capsys, "train", *given, f"--run_dir={path}")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dpo ")


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only errors that this project raises on purpose are shown as one line."""
    monkeypatch.setitem(cli.COMMANDS, "train", lambda arguments: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["train"])
    assert capsys.readouterr().err == ""


# ---- a run from end to end ----


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of settings for three steps of a tiny model on made-up rankings, on one device."""
    from dpo.evaluation import heldout, token_ratios
    from dpo.training import preparation

    make_mesh = preparation.make_mesh
    for module, name in (
        (preparation, "make_mesh"),
        (heldout, "own_mesh"),
        (token_ratios, "own_mesh"),
    ):
        monkeypatch.setattr(module, name, lambda config: make_mesh(config, jax.devices()[:1]))
    rows = [
        {"prompt": f"item {i}", "responses": ["yes, very good", "perhaps", "no"], "scores": [2.0, 1.0, 0.0]}
        for i in range(8)
    ]
    for name in ("train", "eval"):
        text = "".join(json.dumps(row | {"prompt": f"{name} {row['prompt']}"}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = tmp_path / "settings.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(tmp_path / "run"),
                "model": {
                    "source": str(tiny_model_dir),
                    "reference_store": str(tmp_path / "reference"),
                    "attention": "plain",  # the quickest to trace
                },
                "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
                "objective": {"name": "plackett_luce", "beta": 0.5},
                "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
                "training": {"batch_size": 4, "steps": 4},
            }
        )
    )
    return path


def test_train_evaluate_and_export_from_the_command_line(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--config", str(settings), "--training.steps=3"]) == 0
    printed = capsys.readouterr().out
    for name in ("export", "report.html", "evaluation.json", "metrics.jsonl", "checkpoints", "config.yaml"):
        assert (run / name).exists()
        assert str(run / name) in printed.replace("\n", "")
    after_training = json.loads((run / "evaluation.json").read_text())
    assert after_training["rankings"]["kendall_tau"][0] > 0.5
    assert "Kendall's tau" in printed
    token_by_token = json.loads((run / "evaluation.tokens.json").read_text())
    assert token_by_token["policy"] == str(run / "export")
    assert len(token_by_token["pairs"]) == 8
    assert 'class="text tokens"' in (run / "report.html").read_text()
    assert json.loads((run / "summary.json").read_text())["versions"]["jax"] == jax.__version__

    # evaluate scores the export anew and comes to the same figures
    (run / "evaluation.json").unlink()
    assert main(["evaluate", "--run", str(run)]) == 0
    again = json.loads((run / "evaluation.json").read_text())
    assert again["accuracy"] == after_training["accuracy"]
    assert again["margin"] == pytest.approx(after_training["margin"], rel=1e-3)

    # of other data the figures are printed, and the run's stay
    assert main(["evaluate", "--run", str(run), "--limit=2"]) == 0
    assert "--output FILE keeps them" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((run / "evaluation.json").read_text()) == again

    # a data report of an earlier start, with other data perhaps, is made anew
    (run / "data.json").write_text("{}")
    assert main(["train", "--config", str(settings), "--training.steps=3"]) == 0
    assert json.loads((run / "data.json").read_text())["rows"] == 8

    # export writes the same weights from the checkpoint
    other = tmp_path / "exported"
    assert main(["export", str(run), "--output", str(other)]) == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (other, run / "export"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert "no checkpoint of step 99; allowed are [3]" in refused(capsys, "export", str(run), "--step=99")

    # both carry the same model card; a hub id, with a dash as it reads better, uploads the directory
    cards = [(path / "README.md").read_text() for path in (other, run / "export")]
    assert cards[0] == cards[1]
    assert "(`rewards/accuracies`)" in cards[0]
    pushed: list[tuple] = []
    monkeypatch.setattr(hub, "require_repository", lambda name, private: None)
    monkeypatch.setattr(
        hub, "push_to_hub", lambda *args, **choices: pushed.append((args, choices)) or "address"
    )
    assert main(["export", str(run), "--output", str(other), "--dtype=bfloat16", "--hub-id=me/x"]) == 0
    assert pushed == [((other, "me/x"), {"private": True, "message": "The policy after 3 steps"})]
    assert json.loads((other / "config.json").read_text())["dtype"] == "bfloat16"

    # an export that was deleted is missed by what needs it, with what helps
    shutil.rmtree(run / "export")
    for command in (["evaluate", f"--run={run}"], ["generate", str(run), "Hello"]):
        error = refused(capsys, *command)
        assert "its export was deleted; allowed: wait for its end, or write the newest checkpoint" in error
        assert error.rstrip().endswith(f"as a model with dpo export {run}")
    assert main(["train", "--config", str(settings), "--training.steps=3"]) == 0
    assert f"dpo export {run} writes it" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "checkpoints/1", "starts.json", "wandb.run"])
def test_a_directory_that_is_no_run_is_not_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """`--run_dir=.` beside one's own settings."""
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("objective: {beta: 0.3}  # mine")
    (tmp_path / "notes.txt").write_text("other files are nobody's business")
    error = refused(capsys, "train", f"--run_dir={tmp_path}", "--model.source=/no/such/model")
    assert f"is no run and holds {name.split('/')[0]}, which a run would write over" in error
    assert own.read_text().endswith("# mine")


@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
def test_a_directory_that_is_no_diffusion_example_is_not_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """Also where own settings of the example stand there, with what somebody wrote beside them."""
    own = tmp_path / name
    own.write_text("eta: 1.0  # mine")
    error = refused(capsys, "diffusion", f"--run_dir={tmp_path}", "--reference_updates=1")
    assert f"is no diffusion example and holds {name}, which a diffusion example would write over" in error
    assert own.read_text().endswith("# mine")


def test_inspect_shows_the_report_and_an_example(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.json"
    assert main(["inspect", "--config", str(settings), "--example=7", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "longer is better" in printed
    assert "train item 7" in printed
    report = json.loads(output.read_text())
    assert (report["rows"], report["kept"], report["overlap"]["same_prompt"]) == (8, 8, 0)
    assert "example is 8; allowed is 0 to 7" in refused(
        capsys, "inspect", "--config", str(settings), "--example=8"
    )
    assert main(["inspect", "--config", str(settings), "--rows=3", f"--output={output}"]) == 0
    report = json.loads(output.read_text())
    assert (report["rows"], report["kept"], report["overlap"]["heldout"]) == (3, 3, 3)


@pytest.mark.ci
def test_a_win_rate_can_follow_training(settings: Path, tmp_path: Path) -> None:
    command = ["train", "--config", str(settings), "--training.steps=1", "--winrate=longer"]
    assert main(command) == 0
    run = tmp_path / "run"
    result = json.loads((run / "winrate" / "winrate.json").read_text())
    assert result["temperatures"]["1.0"]["prompts"] == 8
    assert "Win-rate over the reference" in (run / "report.html").read_text(encoding="utf-8")
    sampled = (run / "winrate" / "samples.jsonl").read_bytes()
    assert main(command) == 0, "a finished run: nothing is sampled anew"
    assert (run / "winrate" / "samples.jsonl").read_bytes() == sampled


OWN_OBJECTIVE = """
import jax
from dpo import Objective
from dpo.losses.pairs import on_pairs


def margin(beta: float = 0.1, gamma: float = 0.5) -> Objective:
    return Objective(
        on_pairs(lambda w, l: jax.nn.softplus(gamma - beta * (w.log_ratio - l.log_ratio)), "all")
    )
"""
"""As docs/python.md has it."""


@pytest.mark.ci
def test_a_run_of_an_own_objective_is_opened_by_every_command_without_its_code(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, run = "objective_of_a_run_in_test_cli", tmp_path / "run"
    (tmp_path / f"{module}.py").write_text(OWN_OBJECTIVE)
    given = [f"--objective.name={module}:margin", "--objective.gamma=1.0"]
    assert main(["train", "--config", str(settings), "--training.steps=1", *given]) == 0
    (tmp_path / f"{module}.py").unlink()
    monkeypatch.delitem(sys.modules, module)
    for words in (["report", str(run)], ["evaluate", "--run", str(run)]):
        assert main(words) == 0, words
    assert main(["winrate", "--run", str(run), "--judge", "longer", "--max_new_tokens", "4"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["beta"] == 0.5, "the settings' own"
    assert f"{module}:margin" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.ci
def test_a_run_is_repeated_from_its_saved_settings(settings: Path, tmp_path: Path) -> None:
    main(
        [
            "train",
            "--config",
            str(settings),
            "--training.steps=2",
            "--data.eval=null",
            "--objective.name=dpo",
            "--objective.beta=0.2",
        ]
    )
    first = tmp_path / "run"
    assert yaml.safe_load((first / "config.yaml").read_text())["objective"] == {"name": "dpo", "beta": 0.2}
    main(["train", "--config", str(first / "config.yaml"), f"--run_dir={tmp_path / 'again'}"])

    def losses(run: Path) -> list[float]:
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    assert losses(first) == losses(tmp_path / "again")


def test_evaluate_needs_no_run(settings: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """A policy that is its reference has every delta at zero: all ties, accuracy one half."""
    output = tmp_path / "figures.json"
    arguments = ["evaluate", f"--policy={tiny_model_dir}", f"--reference={tiny_model_dir}", "--limit=5"]
    assert main([*arguments, f"--data={tmp_path / 'eval.jsonl'}", f"--output={output}"]) == 0
    figures = json.loads(output.read_text())
    assert figures["rows"] == 5
    assert figures["ties"] == figures["pairs"] == 15
    rate, low, high = figures["accuracy"]
    assert (rate, low < rate < high) == (0.5, True)
    assert figures["beta"] == 0.1


def test_evaluate_refuses_models_with_different_tokens(
    settings: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    (other / "SHA256SUMS").unlink()  # a change that is meant
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    arguments = ["evaluate", f"--policy={tiny_model_dir}", f"--reference={other}"]
    assert "make different tokens" in refused(capsys, *arguments, f"--data={tmp_path / 'eval.jsonl'}")


def test_what_helps_is_said_as_the_options_of_the_command(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run has `data.on_error`; `dpo evaluate` has `--on_error`, and `dpo winrate` neither."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b"}\n')
    given = [f"--policy={tiny_model_dir}", f"--data={data}"]
    text = refused(capsys, "evaluate", *given, f"--reference={tiny_model_dir}")
    assert "--on_error" in text
    assert "data.on_error" not in text
    said = "data.columns, data.eval_split, data.on_error, data.eval[0].columns, data.evaluated"
    assert with_options(said, WinrateConfig) == (
        "--columns, --split, data.on_error, data.eval[0].columns, data.evaluated"
    )


def test_going_on_is_the_default_and_what_may_differ_is_for_one_start() -> None:
    from dpo.cli import read_train_settings

    assert read_train_settings([]).training.resume == "auto"
    assert read_train_settings(["--resume", "never"]).training.resume == "never"
    assert read_train_settings(["--training.resume=never", "--resume", "auto"]).training.resume == "auto"
    assert read_train_settings(["--training.resume=never"]).training.resume == "never"
    assert read_train_settings(["--allow_changed", "data", "versions"]).training.allow_changed == [
        "data",
        "versions",
    ]


def test_an_interrupted_run_has_its_own_exit_code(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from dpo.training import loop

    @contextmanager
    def stop_at_once():
        yield lambda: True

    monkeypatch.setattr(loop, "stop_requests", stop_at_once)
    assert main(["train", "--config", str(settings)]) == STOPPED.code
