"""What only a run directory names on the hub is not asked for with the account's token."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from dpo import hub_names
from dpo.cli import main
from dpo.commands.checks import check_heldout, load_run
from dpo.config import EvaluateConfig
from dpo.data import data_sets, hub_sets
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.outcomes import UserError
from dpo.runs import model_of


@pytest.fixture(autouse=True)
def begun_anew():
    hub_names.forget()
    yield
    hub_names.forget()


@pytest.fixture
def asked(monkeypatch):
    """What the hub was asked for, and whether only the cache was looked into; it has nothing."""
    found = []

    def download(hub_id: str, *, local_files_only: bool, **rest: object) -> str:
        found.append((hub_id, local_files_only))
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return found


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run directory, whose config.yaml names a model and data of the hub."""
    directory = tmp_path / "run"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "adapter").mkdir()
    (directory / "config.yaml").write_text(
        "model: {source: owner/name@v2}\ndata: {train: owner/data, eval: [owner/other]}\n"
    )
    config = {"base_model_name_or_path": "another/base"}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("opens", [open_checkpoint, load_tokenizer])
def test_a_model_that_only_a_run_names_is_not_fetched(run, asked, opens):
    source = load_run(run).model.source
    with pytest.raises(
        UserError, match=r"for what .*config.yaml names nothing is fetched; allowed: fetch it first"
    ):
        opens(source)
    assert asked == [("owner/name", True)]


def test_the_model_under_a_runs_adapters_is_not_fetched(run, asked):
    """`dpo generate RUN` reads no setting of the run but this one."""
    _, _, base = model_of(run).rpartition(" on ")
    with pytest.raises(UserError, match="hf download owner/name --revision v2"):
        load_tokenizer(base)
    assert asked == [("owner/name", True)]


def test_export_of_a_run_fetches_nothing(run, asked, capsys):
    assert main(["export", run, "--dtype", "base"]) == 2
    assert "'owner/name' is not in the hub's cache here" in capsys.readouterr().err
    assert asked == [("owner/name", True)]


def test_what_the_user_names_is_fetched_as_ever(run, asked):
    check_heldout(EvaluateConfig(run=run, reference="owner/name", data="owner/data"), load_run(run))
    with pytest.raises(UserError, match="could not be fetched"):
        load_tokenizer("owner/name@v2")
    assert asked == [("owner/name", False)]
    assert hub_sets.token_for("owner/data") is None
    assert hub_sets.token_for("owner/other") is False


def test_a_command_begins_anew(run):
    load_run(run)
    assert hub_names.named_by("owner/data:subset@v1") is not None
    main(["--version"])
    assert hub_names.named_by("owner/data:subset@v1") is None


def test_a_data_set_that_only_a_run_names_is_asked_for_without_the_token(run, monkeypatch, capsys):
    asked = []

    def load(name: str, **how: object) -> None:
        asked.append(("builder", how.get("token")))
        raise OSError("no such data set")

    def fetch(name: str, file: str, *, token: bool | None, **how: object) -> str:
        assert "owner/data: the hub is asked for it without your account's token" in capsys.readouterr().out
        asked.append((file, token))
        raise OSError("no such data set")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr("datasets.load_dataset_builder", load)
    load_run(run)
    with pytest.raises(UserError, match="owner/data"):
        data_sets.open_data_set("owner/data", "train")
    assert asked == [("README.md", False), ("builder", False)]
