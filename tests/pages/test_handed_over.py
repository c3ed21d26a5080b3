"""A run directory of somebody else: each of its files is what a run writes, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from finished_run import finished  # noqa: F401 (a fixture)
from safetensors.numpy import load_file, save_file

from dpo.config import Config
from dpo.pages.report import write_report

WINRATE, VERDICTS = "winrate/winrate.json", "winrate/verdicts.jsonl"
DEEP = "[" * 100_000


def changed(path: Path, change: Mapping[str, object]) -> str:
    return json.dumps(json.loads(path.read_text()) | change)


def verdicts(path: Path, change: Mapping[str, object]) -> str:
    return "".join(json.dumps(json.loads(line) | change) + "\n" for line in path.read_text().splitlines())


def with_temperature(path: Path, name: str) -> str:
    figures = next(iter(json.loads(path.read_text())["temperatures"].values()))
    return changed(path, {"temperatures": {name: figures}})


FILES: dict[str, tuple[str, Callable[[Path], str | bytes], str]] = {
    "a step that is a text": ("metrics.jsonl", lambda _: '{"step": "x"}\n', "step is 'x'"),
    "no step": ("metrics.jsonl", lambda _: '{"loss": 1}\n', "metrics.jsonl:1 .*: step is not there"),
    "metrics of another coding": ("metrics.jsonl", lambda _: b"\xff\n", "metrics.jsonl:1 .*: not valid"),
    "metrics in each other": ("metrics.jsonl", lambda _: DEEP + "\n", "metrics.jsonl:1 .*: not valid"),
    "versions that are a number": ("summary.json", lambda _: '{"versions": 7}', "versions is 7"),
    "a list of data": ("data.json", lambda _: "[1]", r"data.json .* what it holds is \[1\]"),
    "tokens of nothing": ("evaluation.tokens.json", lambda _: '{"pairs": 5}', "tokens.json .* pairs is 5"),
    "a list of win-rates": (WINRATE, lambda _: "[]", r"winrate.json .* what it holds is \[\]"),
    "no temperature": (
        WINRATE, lambda p: changed(p, {"temperatures": {}}), "winrate.json .* temperatures"),
    "a temperature that is none": (
        WINRATE,
        lambda p: with_temperature(p, "warm"),
        "winrate.json .* temperatures has"),
    "a judge without a name": (
        WINRATE, lambda p: changed(p, {"settings": {"judge": 3}}), "settings.judge is no text"),
    "a winner nobody knows": (
        VERDICTS, lambda p: verdicts(p, {"winner": "me"}), ".* winner is 'me'"),
    "a prompt of numbers": (
        VERDICTS, lambda p: verdicts(p, {"prompt": [1]}), ".* prompt.0 is 1"),
    "verdicts in each other": (VERDICTS, lambda _: DEEP + "\n", "verdicts.jsonl:1 is not a line"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_run_of_somebody_else_is_refused_by_file(what, run: tuple[Path, Config]):
    run_dir, config = run
    name, make, says = FILES[what]
    content = make(run_dir / name)
    (run_dir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        write_report(run_dir, config)


ARRAYS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "no ranks": (lambda a: a.pop("ranks"), "it has no ranks"),
    "no rows": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "policy is"),
    "another shape": (lambda a: a.update(policy=a["policy"][:, 0].copy()), "policy is"),
    "lengths that are halves": (lambda a: a.update(lengths=a["lengths"] * 0.5), "lengths is float64"),
    "responses of no token": (
        lambda a: a.update(lengths=a["lengths"] * 0),
        "no response, or one of no token",
    ),
    "nothing to be right about": (
        lambda a: a.update(ranks=a["ranks"] * 0 + 7),
        "no row has two responses of different rank",
    ),
    "rows before the first": (lambda a: a.update(origin=a["origin"] - 100), "does not hold the preferences"),
}


@pytest.mark.parametrize("what", [*ARRAYS, "no arrays at all"])
def test_held_out_figures_that_cannot_be_are_not_shown(what, run: tuple[Path, Config]):
    run_dir, config = run
    path = run_dir / "heldout.safetensors"
    change, says = ARRAYS.get(what, (None, "is damaged: Error while deserializing"))
    if change is None:
        path.write_bytes(b"x" * 100)
    else:
        arrays = {name: np.array(values) for name, values in load_file(path).items()}
        change(arrays)
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, path)
    page = write_report(run_dir, config).read_text()
    assert says in page
