"""What a run directory's readers share."""

import json
import os
import re
from pathlib import Path

import pytest

from dpo import runs
from dpo.commands.checks import load_run
from dpo.config import Config, ModelConfig, save_config
from dpo.outcomes import UserError
from dpo.runs import (
    LOCK_FILE,
    SUMMARY_FILE,
    flat_settings,
    model_of,
    objective_title,
    read_summary,
    require_run_or_none,
)


def test_all_that_a_run_writes_is_in_the_list_of_its_files():
    page = (Path(__file__).parents[1] / "docs" / "using.md").read_text(encoding="utf-8")
    listed = page.split("## What a run leaves")[1].split("```")[1]
    for text in (listed, runs.__doc__ or ""):
        assert [
            name for name in (*runs._WRITTEN, LOCK_FILE) if not re.search(rf"\b{re.escape(name)}\b", text)
        ] == []


def test_settings_are_flat_by_dotted_names_and_an_empty_section_has_none():
    assert flat_settings({"a": {"b": 1, "c": {"d": [2]}, "e": {}}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [2],
        "f": None,
    }


def test_a_sum_is_titled_by_its_terms():
    config = Config(objectives=[{"name": "dpo", "beta": 0.1}, {"name": "sft"}])
    assert objective_title(config) == "dpo (beta 0.1) + sft"
    assert objective_title(Config()) == "dpo"


def test_a_summary_is_there_or_not_or_named_as_damaged(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / SUMMARY_FILE).write_text(json.dumps({"steps": 3}))
    assert read_summary(tmp_path) == {"steps": 3}
    for content, reason in (("{", "not valid JSON"), ("[]", r"what it holds is \[\]")):
        (tmp_path / SUMMARY_FILE).write_text(content)
        with pytest.raises(ValueError, match=rf"summary\.json is damaged: {reason}"):
            read_summary(tmp_path)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"objective": {"name": "dppo"}}, "objective 'dppo' is none of this project's"),
        ({"objective": {"beta": 0.1}}, "objective: name is None; allowed: dpo"),
        ({"objective": {"name": 5}}, "objective: name is 5; allowed: dpo"),
        ({"objective": {"name": "dpo", "beta": "x"}}, "objective dpo: beta is 'x'; allowed: a number > 0"),
        ({"objective": {"name": "dpo", "beta": 10**400}}, "objective dpo: beta is 1000"),
        ({"objectives": [{"name": "dpo"}, {"name": "stf"}]}, "objective 'stf' is none of this project's"),
    ],
)
def test_an_objective_that_no_command_knows_is_refused_by_file(tmp_path, given, problem):
    save_config(Config(**given), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'config.yaml'}: {problem}")):
        load_run(str(tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "winrate/vader.jsonl"])
def test_a_run_with_a_pipe_in_it_is_refused_where_it_would_be_waited_for(tmp_path, name):
    save_config(Config(), tmp_path / "config.yaml")
    (tmp_path / LOCK_FILE).touch()
    require_run_or_none(tmp_path)
    load_run(str(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    for opened in (lambda: load_run(str(tmp_path)), lambda: require_run_or_none(tmp_path)):
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))} is no file; allowed"):
            opened()


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "winrate/verdicts.jsonl", "export/SHA256SUMS", "data.json"]
)
def test_a_run_with_a_file_that_fills_the_memory_is_refused_by_it(tmp_path, name):
    """As a hole it is a terabyte that takes no room on the way here."""
    save_config(Config(), tmp_path / "config.yaml")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    load_run(str(tmp_path))
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))} has {1 << 40} bytes; allowed"):
        load_run(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "named", "is_said"),
    [
        ("base", "{here}/base", False),
        ("OWNER/NAME", "OWNER/NAME", False),
        ("base", "OWNER/NAME", True),
        ("embedded:a", "OWNER/NAME", True),
    ],
)
def test_adapters_alone_are_opened_on_the_model_that_the_run_trained(
    source, named, is_said, tmp_path, monkeypatch
):
    """Their file may name another, by lora.base_name: a GGUF file's name on the hub, say."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    save_config(Config(model=ModelConfig(source=source)), run / "config.yaml")
    said = {"base_model_name_or_path": named.format(here=tmp_path)}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    assert model_of(str(run)) == f"{run}/adapter" + (f" on {source}" if is_said else "")
    for text in ("model: {}", "a: &a [x]\nmodel: {source: *a}"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml does not say what model\.source is"):
            model_of(str(run))
