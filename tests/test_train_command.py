"""What `dpo train` says of a run that is finished, whatever has become of its data since."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from finished_run import finished  # noqa: F401

from dpo.commands import train
from dpo.config import Config, LoraConfig, WinrateConfig
from dpo.outcomes import EnvironmentFailure
from dpo.pages import page
from dpo.runs import DATA_FILE
from dpo.training import loop


def test_a_template_that_is_not_there_is_found_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "REPORT_TEMPLATE", "gone.html.jinja")
    monkeypatch.setattr(train, "check_settings", lambda *_: None)
    monkeypatch.setattr(loop, "train", lambda _: pytest.fail("it was begun"))
    with pytest.raises(EnvironmentFailure, match=r"dpo/pages/gone\.html\.jinja can't be read"):
        train.train_and_report(Config(), judge=None, arguments=[])


@pytest.mark.parametrize("change", ["removed", "others"])
def test_data_that_were_removed_or_changed_are_said_and_refuse_nothing(
    run: tuple[Path, Config], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, config = run
    data = Path(str(config.data.eval))
    data.unlink() if change == "removed" else data.write_text(data.read_text().splitlines()[0] + "\n")
    (run_dir / "evaluation.json").write_text("{}")
    train._report(run_dir, config)
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the held-out figures are not in the report:" in said
    assert "WARNING: what the training data hold is not in the report:" in said
    assert not (run_dir / "evaluation.json").exists(), "figures of another start are not this run's"
    page = (run_dir / "report.html").read_text()
    assert "its figures can&#39;t be shown" in page or "its figures can't be shown" in page
    assert data.name in page


def test_a_run_directory_that_is_gone_at_its_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(train, "check_settings", lambda *_: None)
    monkeypatch.setattr(loop, "train", lambda _: loop.RunResult(run_dir, "finished", {}))
    with pytest.raises(EnvironmentFailure, match=f"the run directory {run_dir} was deleted"):
        train.train_and_report(Config(run_dir=str(run_dir)), judge=None, arguments=[])


@pytest.mark.parametrize(
    ("merged", "said"), [(True, "export {} writes"), (False, "export {} --format adapter ")]
)
def test_a_policy_that_is_gone_is_written_again_by_the_command_that_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    merged: bool,
    said: str,
) -> None:
    config = Config(run_dir=str(tmp_path), lora=LoraConfig(rank=4, merged=merged))
    for name in ("check_settings", "check_models_of", "_report"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(loop, "train", lambda _: loop.RunResult(tmp_path, "already finished", {}))
    train.train_and_report(config, judge=None, arguments=[])
    assert said.format(tmp_path) in " ".join(capsys.readouterr().out.split())


def test_several_processes_name_the_match_that_one_would_play(capsys: pytest.CaptureFixture[str]) -> None:
    train._measure(WinrateConfig(run="r", judge="longer", max_new_tokens=48), Config(), alone=False)
    assert "dpo winrate --run r --judge longer --max_new_tokens 48" in capsys.readouterr().out


def test_the_data_report_is_known_by_what_it_was_made_from(
    run: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy (`cp -r`) or a clock that was set back changes times of modification, and nothing else."""
    run_dir, config = run
    made: list[None] = []

    def report_data(*_: object) -> tuple[dict[str, int], None]:
        made.append(None)
        return {"rows": len(made)}, None

    monkeypatch.setattr(train, "report_data", report_data)
    monkeypatch.setattr("dpo.huggingface.tokenizer_files.load_tokenizer", lambda _: None)
    train._describe_data(run_dir, config)
    for path in (run_dir / DATA_FILE, run_dir / "config.yaml"):
        os.utime(path, (0, 0) if path.name == DATA_FILE else None)
    train._describe_data(run_dir, config)
    assert len(made) == 1, "it is still of these settings"
    (run_dir / "summary.json").write_text('{"steps": 9}')
    train._describe_data(run_dir, config)
    assert json.loads((run_dir / DATA_FILE).read_text())["rows"] == 2, "another end of the run"
