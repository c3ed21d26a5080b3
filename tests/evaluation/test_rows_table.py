"""The table of held-out rows has the figures of the evaluation, and its tokens sum to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from numpy.testing import assert_allclose
from tiny_model import write_tiny_model

from dpo.cli import main
from dpo.evaluation.rows_table import write_lines


def test_every_response_is_a_line_whose_tokens_sum_to_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": "Say A.", "chosen": "A", "rejected": "B b"},
        {"prompt": [{"role": "user", "content": "Say B."}], "responses": ["B", "A", "C"], "ranks": [1, 1, 2]},
    ]
    data = tmp_path / "eval.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = write_tiny_model(tmp_path, seed=1)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    table = tmp_path / "rows.jsonl"
    arguments = [f"--policy={tiny_model_dir}", f"--reference={other}", f"--data={data}", "--beta=0.5"]
    assert main(["evaluate", *arguments, f"--rows={table}"]) == 0
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert [(line["row"], line["rank"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]
    assert [line["location"] for line in lines] == [f"{data}:1"] * 2 + [f"{data}:2"] * 3
    assert [line["text"] for line in lines] == ["A", "B b", "B", "A", "C"]
    assert json.loads(lines[2]["prompt"]) == rows[1]["prompt"]
    for line in lines:
        assert len(line["token_ids"]) == len(line["policy_tokens"]) == line["tokens"]
        assert_allclose(np.sum(line["policy_tokens"]), line["policy"], rtol=1e-5)
        assert_allclose(np.sum(line["reference_tokens"]), line["reference"], rtol=1e-5)
        assert_allclose(line["reward"], 0.5 * (line["policy"] - line["reference"]), rtol=1e-6)

    write_lines(str(tmp_path / "rows.parquet"), lines)
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist() == lines


def test_another_ending_is_refused_before_anything_is_scored(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"--policy={tiny_model_dir}", f"--reference={tiny_model_dir}"]
    assert main(["evaluate", *models, "--data=shipped:sentiment_eval.jsonl", "--rows=rows.xlsx"]) == 2
    assert "ends with .parquet or .jsonl" in capsys.readouterr().err
