"""A function of the user's own is imported from here on the user's word, and nothing else ever is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.own_code import import_function

HOSTILE = "from pathlib import Path\nPath(__file__).with_name('RAN').write_text(__name__)\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_module_is_found_here_and_only_while_it_is_imported(here: Path) -> None:
    (here / "beside_my_judge.py").write_text("LIMIT = 3\n")
    (here / "my_judge_found_here.py").write_text(
        "from beside_my_judge import LIMIT\ndef short(prompt, response):\n    return LIMIT - len(response)\n"
    )
    (here / "json.py").write_text("raise RuntimeError('the library is found before what lies here')\n")
    before = list(sys.path)
    assert import_function("my_judge_found_here:short", setting="judge")("x", "ab") == 1
    assert sys.path == before
    assert importlib.util.find_spec("beside_my_judge_too") is None
    with pytest.raises(
        ValueError, match=r"judge 'no_such_module_here:f': No module named .* importable from"
    ):
        import_function("no_such_module_here:f", setting="judge")
    assert sys.path == before


def test_a_judge_that_is_no_function_leaves_the_path_alone(
    here: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What libraries look for while models are loaded and run is never looked for here."""
    (here / "zstandard_found_here.py").write_text(HOSTILE)
    (here / "prompts.jsonl").write_text(json.dumps({"prompt": "Say A.", "chosen": "A", "rejected": "B"}))
    from dpo.judging import samples

    real, seen = samples.generate, []

    def look(*arguments, **rules):
        seen.append(importlib.util.find_spec("zstandard_found_here"))
        return real(*arguments, **rules)

    monkeypatch.setattr(samples, "generate", look)
    command = ["winrate", f"--policy={tiny_model_dir}", "--opponent=data:best", "--data=prompts.jsonl"]
    assert main([*command, "--output=out", "--judge=longer", "--max_new_tokens=4"]) == 0
    assert seen == [None]


def test_python_m_imports_nothing_from_here(here: Path) -> None:
    for name in ("pathlib", "platform", "json", "jsonargparse", "yaml", "rich", "jax"):
        (here / f"{name}.py").write_text("open('RAN', 'w').write(__name__)\n")
    done = subprocess.run([sys.executable, "-m", "dpo", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("dpo "), done.stderr
    assert not (here / "RAN").exists()


@pytest.mark.parametrize(
    ("command", "setting"), [("winrate", "judge"), ("frontier", "reward"), ("train", "winrate")]
)
def test_a_settings_file_alone_does_not_run_a_module(
    here: Path, command: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function = f"named_in_a_file_of_{command}:f"
    (here / f"named_in_a_file_of_{command}.py").write_text(HOSTILE)
    (here / "rows.jsonl").write_text(json.dumps({"prompt": "Say A.", "chosen": "A", "rejected": "B"}))
    settings: dict[str, object] = {setting: function}
    settings |= {
        "winrate": {"policy": "p", "opponent": "data:best", "data": "rows.jsonl", "output": "out"},
        "frontier": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "train": {"run_dir": "run", "data": {"train": "rows.jsonl", "eval": "rows.jsonl"}},
    }[command]
    (here / "settings.yaml").write_text(json.dumps(settings))
    assert main([command, "--config=settings.yaml"]) == 2
    message = f"{setting} is {function!r} in a settings file"
    assert message in capsys.readouterr().err
    assert not (here / "RAN").exists()
    assert main([command, "--config=settings.yaml", f"--{setting}={function}"]) == 2
    assert "has no attribute 'f'" in capsys.readouterr().err
    assert (here / "RAN").exists(), "on the user's word it is imported"


OWN_OBJECTIVE = """
from __future__ import annotations
import jax
from dpo.losses import Objective
from dpo.losses.pairs import on_pairs

def margin(beta: float = 0.25, gamma: float = 0.5) -> Objective:
    loss = lambda w, l: jax.nn.softplus(gamma - beta * (w.log_ratio - l.log_ratio))
    return Objective(on_pairs(loss, "all"))

def needy(beta: float) -> Objective:
    return Objective(lambda scores: scores.policy.sum(1))

def number() -> int:
    return 3

def untyped(beta=0.1) -> Objective:
    return margin(beta)

def of_texts(kind: str = "x") -> Objective:
    return margin()

def of_nothing(beta: Unknown = 0.1) -> Objective:
    return margin()
"""


def test_an_own_objective_is_made_on_the_users_word_and_its_runs_open_without_its_code(here: Path) -> None:
    from dpo.config import Config
    from dpo.losses import make_objective, reward_scale, with_own_beta
    from dpo.runs import objective_title

    (here / "my_losses_here.py").write_text(OWN_OBJECTIVE)
    spec = {"name": "my_losses_here:margin", "gamma": 1.0}
    assert make_objective(spec).name == "my_losses_here:margin"
    noted = with_own_beta(spec)
    assert noted == spec | {"beta": 0.25}
    elsewhere = {"name": "code_that_is_not_here:margin", "beta": 0.25}
    assert reward_scale(elsewhere) == 0.25
    assert "code_that_is_not_here:margin (beta 0.25)" in objective_title(Config(objective=elsewhere))
    assert with_own_beta({"name": "dpo"}) == {"name": "dpo"}
    with pytest.raises(ValueError, match=r"unknown hyper-parameter 'gama'.*gamma"):
        make_objective({"name": "my_losses_here:margin", "gama": 1.0})
    with pytest.raises(ValueError, match="beta has no default value"):
        make_objective({"name": "my_losses_here:needy"})
    with pytest.raises(ValueError, match="returns int; allowed"):
        make_objective({"name": "my_losses_here:number"})
    with pytest.raises(ValueError, match="beta has no type; allowed: float, int"):
        make_objective({"name": "my_losses_here:untyped"})
    with pytest.raises(ValueError, match="kind has the type <class 'str'>; allowed"):
        make_objective({"name": "my_losses_here:of_texts", "kind": "y"})
    with pytest.raises(ValueError, match="name 'Unknown' is not defined, in the type of an argument"):
        make_objective({"name": "my_losses_here:of_nothing"})
    with pytest.raises(ValueError, match="import the module that does"):
        reward_scale({"name": "registered_in_another_program"})


@pytest.mark.parametrize("command", ["train", "inspect", "plan", "diffusion", "frontier"])
def test_a_settings_file_alone_does_not_run_an_objective(
    here: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function = f"objective_in_a_file_of_{command}:f"
    (here / f"{function.removesuffix(':f')}.py").write_text(HOSTILE)
    settings: dict[str, object] = {"objective": {"name": function}}
    said = f"--objective.name={function}"
    if command == "frontier":
        (here / "rows.jsonl").write_text(json.dumps({"prompt": "Say A.", "chosen": "A", "rejected": "B"}))
        settings = {"objectives": [function], "train": "rows.jsonl", "eval": "rows.jsonl", "reward": "vader"}
        said = f"--objectives=[{function}]"
    (here / "run.yaml").write_text(json.dumps(settings))
    assert main([command, "--config=run.yaml"]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "RAN").exists()
    if command in ("diffusion", "frontier"):
        assert main([command, "--config=run.yaml", said]) == 2
        assert "has no attribute 'f'" in capsys.readouterr().err
        assert (here / "RAN").exists(), "on the user's word it is imported"


def test_the_word_may_be_given_in_any_spelling() -> None:
    from dpo.own_code import require_own_word_for_objectives

    for arguments in (
        ["--objective.name=m:f"],
        ["--objective.name", "m:f"],
        ["--objective={name: m:f}"],
        ["--objectives=[{name: m:f}, {name: sft}]"],
    ):
        require_own_word_for_objectives([{"name": "m:f"}, {"name": "sft"}], arguments=arguments)
    for arguments in ([], ["--config=m:f"], ["--run_dir", "m:f"]):
        with pytest.raises(ValueError, match="has to be said on the command line"):
            require_own_word_for_objectives([{"name": "m:f"}], arguments=arguments)


def test_the_figures_at_the_end_have_the_default_beta_of_an_own_objective(
    here: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the metrics, and of `dpo evaluate` afterwards."""
    from dpo.commands import train as command
    from dpo.training import loop

    (here / "my_losses_at_the_end.py").write_text(OWN_OBJECTIVE)
    (here / "rows.jsonl").write_text(json.dumps({"prompt": "Say A.", "chosen": "A", "rejected": "B"}))
    (here / "run").mkdir()
    seen = []
    finished = loop.RunResult(here / "run", "finished", {})
    monkeypatch.setattr(loop, "train", lambda config: seen.append(command.beta_of(config)) or finished)
    monkeypatch.setattr(command, "_report", lambda _, config: seen.append(command.beta_of(config)))
    given = [f"--model.source={tiny_model_dir}", "--data.train=rows.jsonl", "--run_dir=run"]
    assert main(["train", *given, "--objective.name=my_losses_at_the_end:margin"]) == 0
    assert seen == [0.25, 0.25]
