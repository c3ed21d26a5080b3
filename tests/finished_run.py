"""A directory as a finished run leaves it, with hostile text in it, and readers of the pages made from it."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo.config import Config, DataConfig, save_config
from dpo.judging.match import RESULT_SETTINGS
from dpo.judging.winrate import Judged, describe_pairs
from dpo.pages.report import write_report

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{ 7 * 7 }} & ‘ok’"


@pytest.fixture(name="run")
def finished(tmp_path: Path) -> tuple[Path, Config]:
    """A run that a test may change."""
    return leave_run(tmp_path)


@pytest.fixture(name="page_text", scope="session")
def written_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the run as it was left."""
    return write_report(*leave_run(tmp_path_factory.mktemp("finished"))).read_text()


def leave_run(directory: Path) -> tuple[Path, Config]:
    """What a finished run of 90 steps leaves, with hostile text wherever text comes from outside."""
    run_dir = directory / "run<b>"
    run_dir.mkdir()
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{HOSTILE} {i}", "chosen": HOSTILE, "rejected": "plain", "source": f"s<i>{i % 2}"}
        for i in range(30)
    ]
    (directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(90):
            noise = float(rng.normal(0, 0.05))
            metrics = {
                "loss": 0.69 - 0.004 * step + noise,
                "rewards/accuracies": 0.5 + 0.005 * step,
                "seconds": 2.0,
            }
            metrics |= {"rewards/chosen": 0.01 * step, "rewards/rejected": -0.02 * step, "grad_norm": "inf"}
            file.write(json.dumps({"step": step, **metrics}) + "\n")
            if step % 30 == 29:
                file.write(
                    json.dumps({"step": step + 1, "eval/rewards/accuracies": 0.4 + 0.005 * step}) + "\n"
                )
    reference = rng.normal(-60, 10, (30, 2))
    numbers = {
        "policy": reference + np.stack([rng.normal(4, 5, 30), rng.normal(-3, 5, 30)], 1),
        "reference": reference,
        "present": np.ones((30, 2), bool),
        "lengths": rng.integers(5, 50, (30, 2)),
        "ranks": np.tile([0, 1], (30, 1)),
        "origin": np.arange(30),
    }
    save_file(
        {name: np.ascontiguousarray(values) for name, values in numbers.items()},
        run_dir / "heldout.safetensors",
    )
    (run_dir / "data.json").write_text(json.dumps(data_report()))
    write_match(run_dir / "winrate")
    write_tokens(run_dir, directory, numbers)
    config = Config(run_dir=str(run_dir), data=DataConfig(eval=str(directory / "eval.jsonl")))
    save_config(config, run_dir / "config.yaml")
    (run_dir / "summary.json").write_text("{}")
    return run_dir, config


def data_report() -> dict[str, Any]:
    """As `dpo inspect` makes it, of one source with a hostile name and a malformed row."""
    lengths = {"mean": 7.5, "p50": 7, "p90": 9, "p99": 9, "max": 9}
    nothing = ("duplicates", "tied", "all_tied", "identical_responses", "scores_against_ranks", "truncated")
    return dict.fromkeys(nothing, 0) | {
        "rows": 30,
        "preferences": 29,
        "kept": 27,
        "skipped": {"empty": 1},
        "problems": [HOSTILE],
        "layouts": {"pair": 30},
        "unused_columns": {"id": 30},
        "dropped": {"too_long": 2},
        "first_dropped": {"too_long": "rows.jsonl:4: 9 tokens"},
        "warnings": ["3 of 30 preferences (10%) are left out"],
        "remarks": {},
        "first_remarks": {},
        "sources": {HOSTILE: 30},
        "responses": {"2": 29},
        "with_scores": 0,
        "lengths": {"prompt": lengths, "response": lengths},
        "longer_is_better": {"rate": 0.5, "low": 0.3, "high": 0.7, "comparisons": 26, "equal_length": 1},
        "distinct_prompts": 25,
        "conflicting": 6,
        "first_found": {"conflicting": ["rows.jsonl:2", "rows.jsonl:3"]},
        "overlap": {"heldout": 12, "same_prompt": 0, "same_first_message": 0, "examples": []},
    }


def write_match(directory: Path) -> None:
    """What `dpo winrate` leaves for 12 prompts, each with hostile text: two wins to one loss."""
    directory.mkdir()
    lines, judged = [], []
    for i in range(12):
        wins = i % 3 > 0
        prompt = [{"role": "user", "content": f"{HOSTILE} {i}"}]
        rewards = [0.9, -0.1] if wins else [0.2, 0.3 + 0.01 * i]
        common = {"prompt": prompt, "policy": HOSTILE, "opponent": f"other {i}", "temperature": 1.0}
        common["winner"] = "policy" if wins else "opponent"
        lines += [
            {"key": f"{i}a", **common, "details": {"rewards": rewards}},
            {"key": f"{i}b", **common, "details": {"rewards": rewards[::-1]}},
        ]
        first, second = ("first", "second") if wins else ("second", "first")
        judged.append(Judged(f"{i}", HOSTILE + "x" * i, f"other {i}", first, second))
    figures = describe_pairs(judged) | {
        "verdicts": [[f"{i}a", f"{i}b"] for i in range(12)],
        "reward": {"reward, policy": [0.6, 0.5, 0.7], "reward, opponent": [0.1, 0.0, 0.2]},
        "log_ratio": {"KL, nats": [12.0, 11.0, 13.0]},
    }
    result = {
        "policy": "p",
        "opponent": Config().model.source,
        "data": "eval.jsonl",
        "judge": {"judge": "reward", "reward": f"vader {HOSTILE}"},
        "settings": dict.fromkeys(RESULT_SETTINGS) | {"judge": "vader", "seed": 0, "samples": 1},
        "temperatures": {"0.5": figures, "1.0": figures},
    }
    (directory / "winrate.json").write_text(json.dumps(result))
    stale = {"key": "stale", "prompt": "not of this result"}
    (directory / "verdicts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [stale, *lines]))


def write_tokens(run_dir: Path, tmp_path: Path, numbers: dict[str, np.ndarray]) -> None:
    """Per-token log-probs of every pair, in two tokens of which one is far from the reference."""
    delta = 0.1 * np.diff(numbers["reference"] - numbers["policy"], axis=1)[:, 0]
    side = {"tokens": [HOSTILE, "", " end\n"], "policy": [-1.0, -9.0, -1.0], "reference": [-4.0, -1.0, -1.2]}
    pairs = [
        {"location": f"{tmp_path}/eval.jsonl:{row + 1}", "row": row, "better": 0, "worse": 1, "delta": value}
        | {"sides": {"better": side, "worse": side}}
        for row, value in enumerate(delta.tolist())
    ]
    (run_dir / "evaluation.tokens.json").write_text(json.dumps({"pairs": pairs}))


class Page(HTMLParser):
    """Tags that are open, tags with attributes, and the visible text."""

    VOID = ("meta", "br", "path", "use", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def open_in_chromium(
    page: Path, picture: Path, *, width: int = 1280, height: int = 900, scheme: str = "light"
):
    """What the browser logs to its console while it shows a page; the picture is what it shows."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", f"--screenshot={picture}", f"--window-size={width},{height}",
            f"--user-data-dir={picture.with_suffix('.profile')}",
            *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
            f"file://{page}",
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
