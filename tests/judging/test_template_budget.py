"""One budget of characters holds wherever a template of others is rendered: in training, and after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import CHAT_TEMPLATE, write_tiny_reward_model

from dpo import python
from dpo.cli import main
from dpo.config import Config, DataConfig, EvaluateConfig, WinrateConfig, heldout_settings
from dpo.huggingface.pretrained import open_shapes
from dpo.judging.journal import Journal
from dpo.judging.judges import Question
from dpo.judging.kinds import open_judge
from dpo.judging.match import make_pairs
from dpo.judging.samples import Request
from dpo.models.drawing import SamplingConfig
from dpo.training.on_policy import prompt_ids
from dpo.training.talk import as_trained

WORDY = "{{ 'x' * 3000 }}"
FEW = 1000


def with_template(directory: Path, copy: Path) -> Path:
    """The model with a chat template that writes 3,000 characters of its own."""
    shutil.copytree(directory, copy)
    (copy / "SHA256SUMS").unlink()
    (copy / "chat_template.jinja").write_text(WORDY + CHAT_TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def wordy(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_model_dir, tmp_path_factory.mktemp("wordy") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}))
    return path


def winrate(wordy: Path, rows: Path, judge: str = "longer", **more: Any) -> WinrateConfig:
    where = {"policy": str(wordy), "opponent": "data:best", "data": str(rows), "output": str(rows.parent)}
    return WinrateConfig(**where, judge=judge, template_characters=FEW, **more)


def settings(given: WinrateConfig) -> Config:
    compared = EvaluateConfig(
        policy=given.policy,
        reference=given.opponent,
        data=given.data,
        template_characters=given.template_characters,
    )
    return heldout_settings(compared, None)


def sample(wordy: Path, rows: Path) -> None:
    given = winrate(wordy, rows)
    requests = [Request("Hi", 0, SamplingConfig(max_new_tokens=1))]
    with Journal(rows.with_name("samples.jsonl")) as journal:
        make_pairs(given, settings(given), [], requests, journal, print)


def ask_local(wordy: Path, rows: Path) -> None:
    list(open_judge(winrate(wordy, rows, f"local:{wordy}"), print).ask([Question("Hi", "a", "b")]))


def ask_reward_model(wordy: Path, rows: Path) -> None:
    model = with_template(write_tiny_reward_model(rows.parent / "plain"), rows.parent / "reward")
    list(open_judge(winrate(wordy, rows, f"reward_model:{model}"), print).ask([Question("Hi", "a", "b")]))


def read_judge_template(wordy: Path, rows: Path) -> None:
    template = rows.with_name("judge.jinja")
    template.write_text(WORDY + "{{ first }}{{ second }}")
    open_judge(winrate(wordy, rows, f"local:{wordy}", template=str(template)), print)


def opened(wordy: Path) -> python.LanguageModel:
    """A model whose end of a turn is not looked for, so that its template is first rendered for a prompt."""
    return python.load(str(wordy), data=DataConfig(end_token="none", template_characters=FEW))


def answer_in_python(wordy: Path, rows: Path) -> None:
    opened(wordy).generate(["Hi"], max_new_tokens=1)


def sample_on_policy(wordy: Path, rows: Path) -> None:
    prompt_ids(Config(data=DataConfig(template_characters=FEW)), ["Hi"], opened(wordy)._policy, 1)


def find_end(wordy: Path, rows: Path) -> None:
    as_trained(open_shapes(str(wordy)), DataConfig(template_characters=FEW))


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "samples of a match": sample,
    "a local judge's chat template": ask_local,
    "a reward model's chat template": ask_reward_model,
    "a judge's own template": read_judge_template,
    "responses in Python": answer_in_python,
    "prompts of samples during a run": sample_on_policy,
    "the end of a turn": find_end,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_held_to_the_budget_that_is_set(place, wordy, rows):
    with pytest.raises(ValueError, match=r"it wrote more than 1\d\d\d characters; .*template_characters"):
        PLACES[place](wordy, rows)


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_command_takes_the_budget(command, wordy, rows, capsys):
    given = {
        "evaluate": [f"--policy={wordy}", f"--reference={wordy}", f"--data={rows}", "--max_length=8000"],
        "generate": [str(wordy), "Hi", "--max_new_tokens=1"],
    }[command]
    assert main([command, *given, f"--template_characters={FEW}"]) == 2
    setting = {"evaluate": "--", "generate": "data."}[command] + "template_characters"
    assert f"characters; {setting} (template_characters in dpo" in capsys.readouterr().err
