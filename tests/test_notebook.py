"""The example notebook runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_run.ipynb"


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_kept_without_outputs(cells: list[dict[str, Any]]) -> None:
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


def test_it_names_the_option_that_shows_every_setting(cells: list[dict[str, Any]]) -> None:
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "(`dpo train --help-all` lists them all)" in text


@pytest.mark.ci
def test_it_runs_to_its_end(
    cells: list[dict[str, Any]],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cell by cell in one namespace, as a kernel does it, with a tiny model in the cell of parameters."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= {"MODEL": str(tiny_model_dir), "STEPS": 2}
    assert names["result"].status == "finished"
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert "held out: 16 rows" in printed
    assert "report: runs/first/report.html" in printed
