"""Every command of docs/first_week.md, one after the other, on a tiny model and a file of preferences."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dpo.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first_week.md"
STARTS = {"inspect", "train", "sweep"}
"""Commands that take the default model where the page names none."""

BAR = r"\d%\|.*|it/s|\r(?!\n)"
"""What tqdm draws."""


def commands() -> list[list[str]]:
    """The words of each command in a block of the page."""
    fenced = r"^```(\w*)\n(.*?)^```$"
    blocks = re.findall(fenced, PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for kind, block in blocks if not kind for line in block.splitlines()]


def test_the_page_has_the_whole_story() -> None:
    told = [words[0] for words in commands()]
    assert told[:2] == ["inspect", "train"]
    assert {"sweep", "report", "winrate", "plan", "export", "generate", "evaluate"} < set(told)


@pytest.mark.slow
@pytest.mark.ci
def test_the_first_week(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    for name, count in (("train", 16), ("eval", 12)):
        rows = [
            {
                "prompt": f"{name} {i}: rain?",
                "chosen": f"Rain is lovely, {i}.",
                "rejected": f"It is bad, {i}.",
            }
            for i in range(count)
        ]
        (tmp_path / "my" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in commands():
        if "gguf" in words:  # the tiny model's vocabulary has no merges, which llama.cpp needs
            continue
        own = words[0] in STARTS and not any("model.source" in word for word in words)
        model = [f"--model.source={tiny_model_dir}"] if own else []
        assert main([*words, *model]) == 0, " ".join(words)
        said, complained = capfd.readouterr()
        print(said)
        assert not re.findall(BAR, said + complained), f"a library's progress bar in: {' '.join(words)}"
    for left in ("runs/first/report.html", "runs/comparison.html", "runs/sweep/sweep.json"):
        assert (tmp_path / left).is_file(), left
    for left in ("runs/adapters/adapter", "my-model", "runs/second/export", "runs/first/winrate"):
        assert (tmp_path / left).is_dir(), left
