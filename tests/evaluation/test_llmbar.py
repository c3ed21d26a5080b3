"""LLMBar through `dpo evaluate`: tables by subset as RewardBench makes them, on expert preferences."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from dpo.cli import main

NUM_NATURAL, NUM_ADVERSARIAL = 100, 318


@pytest.fixture
def llmbar(shared_dir: Path) -> Path:
    path = shared_dir / "data" / "bench_llmbar.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.slow
def test_the_shared_copy_is_llmbar(llmbar: Path) -> None:
    sources = Counter(json.loads(line)["source"] for line in llmbar.read_text().splitlines())
    assert sources["LLMBar/Natural"] == NUM_NATURAL
    assert sum(n for name, n in sources.items() if "Adversarial" in name) == NUM_ADVERSARIAL


@pytest.mark.slow
def test_llmbar_is_described_by_subset(
    llmbar: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two random models: near chance everywhere, and length alone is worse than chance where it is a trap."""
    lines = [json.loads(line) for line in llmbar.read_text().splitlines()]
    short = [row for row in lines if len(json.dumps(row)) < 1000]
    data, output = tmp_path / "llmbar.jsonl", tmp_path / "figures.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in short))
    other = write_tiny_model(tmp_path / "other", seed=1)
    arguments = [f"--policy={other}", f"--reference={tiny_model_dir}", f"--data={data}", f"--output={output}"]
    assert main(["evaluate", *arguments, "--max_length=1100"]) == 0
    figures = json.loads(output.read_text())
    kept = Counter(row["source"] for row in short)
    found = {name: part["pairs"] for name, part in figures["by_source"].items()}
    assert sum(figures["left_out"].values()) + sum(found.values()) == len(short)
    assert set(found) == set(kept)
    mean = sum(part["accuracy"][0] for part in figures["by_source"].values()) / len(found)
    assert figures["mean_of_sources"]["accuracy"][0] == pytest.approx(mean)
    estimate, low, high = figures["mean_of_sources"]["accuracy"]
    assert low < estimate < high
    neighbor = figures["by_source"]["LLMBar/Adversarial/Neighbor"]
    assert neighbor["longer"][0] < 0.4, "the worse answer is made to look better, and is longer"
    printed = capsys.readouterr().out
    assert all(name[:25] in printed for name in found)
    assert "mean of the sources" in printed
