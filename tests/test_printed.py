"""What the pages show of the default run is what a run left in `pages/sentiment_pairs_evaluation.json`.

Its figures (in six digits, without calibration curves) are printed by the code that prints them at the end of
a run, and the numbers that README, results and the settings' comment say are taken from them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo.pages.accuracy_text import figures_as_text
from dpo.training.memory import Choice, Fit

ROOT = Path(__file__).resolve().parents[1]
FIGURES = json.loads((ROOT / "tests" / "pages" / "sentiment_pairs_evaluation.json").read_text())


def words(path: str) -> str:
    """A page with single spaces, comment signs of YAML left out."""
    return re.sub(r"\s+(# )?", " ", (ROOT / path).read_text(encoding="utf-8"))


def shown(interval: list[float], digits: int = 3) -> str:
    estimate, low, high = (f"{number:.{digits}f}" for number in interval)
    return f"{estimate} ({low} to {high})"


def test_what_a_run_prints_is_shown_as_it_is_printed() -> None:
    section = (ROOT / "docs" / "using.md").read_text(encoding="utf-8").split("## What a run prints")[1]
    assert section.split("```")[1].strip("\n") == figures_as_text(FIGURES)


def test_the_results_have_its_figures() -> None:
    page = words("docs/results.md").split("## The default: sentiment pairs")[1].split("### ")[0]
    assert f"| policy, implicit reward | {shown(FIGURES['accuracy'])} |" in page
    for name, row in {
        "longer": "longer is better",
        "reference_logp": "the reference's log-prob",
        "reference_logp_per_token": "the same per token",
    }.items():
        assert f"| {row} | {shown(FIGURES['baselines'][name])} |" in page
        assert shown(FIGURES["over_baselines"][name]) in page
    parts = FIGURES["by_length"]
    for name in ("better_is_shorter", "better_is_longer"):
        assert f"({parts[name]['pairs']} " in page or f"({parts[name]['pairs']})" in page
        assert f"{parts[name]['accuracy'][0]:.3f}" in page
    falls = (-FIGURES["log_ratio"][side][0] for side in ("chosen", "rejected"))
    assert "falls by {:.1f} nats, of rejected ones by {:.1f}".format(*falls) in page


AGREE = [
    ("README.md", "77 of 83 for the policy", "docs/results.md", "77 wins, 0 ties, 6 losses"),
    ("README.md", "8.4 nats of KL (7.5 to 9.2)", "docs/results.md", "nats a response | 8.4 (7.5 to 9.2) |"),
    ("README.md", "took 11 CPU minutes", "docs/results.md", "11 CPU minutes in all"),
    (
        "README.md",
        "8.9 times the tokens/s of TRL 1.16's",
        "docs/performance.md",
        "| 6 | **8.9** (8.9 to 8.9) |",
    ),
    ("README.md", "in 0.28 of its memory", "docs/performance.md", "| 1/3 | **0.28** (full 0.22) |"),
    (
        "docs/lora.md",
        "0.843 (0.759 to 0.916), 1.041, −19.1",
        "docs/performance.md",
        "| 0.843 | 1.041 | −19.09, −29.50 |",
    ),
    ("docs/lora.md", "−19.1 and −29.5", "docs/results.md", "falls by 19.1 nats, of rejected ones by 29.5"),
    ("docs/results.md", "12 steps of 4 rankings", "docs/winrate.md", "a dozen updates instead of thousands"),
    ("docs/results.md", "an hour of two cores", "docs/winrate.md", "about an hour on two cores"),
]
"""What two pages say of one thing."""


@pytest.mark.parametrize(("one", "said", "other", "same"), AGREE, ids=[said for _, said, _, _ in AGREE])
def test_two_pages_say_the_same(one: str, said: str, other: str, same: str) -> None:
    assert said in words(one)
    assert same in words(other)


@pytest.mark.parametrize("page", ["README.md", "configs/sentiment_pairs.yaml"])
def test_the_front_door_says_the_same(page: str) -> None:
    text, (rate, low, high) = words(page), FIGURES["accuracy"]
    right = round(rate * FIGURES["pairs"])
    assert re.search(rf"\b{right}\b", text)
    assert f"95% {low:.2f} to {high:.2f}" in text
    assert f"{rate:.2f}" in text
    assert f"{FIGURES['baselines']['longer'][0]:.2f}" in text


def test_the_line_of_a_run_that_chooses_by_memory_is_what_it_prints() -> None:
    """With the figures of the line itself; the choices are the first two of a list."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^memory: .*$", page, re.MULTILINE)
    peak, limit, more = (float(number) * 2**30 for number in re.findall(r"\d+\.\d+", line))
    dots, full = Choice("dots", 1, 1024), Choice("full", 1, 1024)
    assert Fit(full, peak, limit, ((dots.text, more),)).text == line
