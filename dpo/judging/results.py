"""The figures of matches in one directory: each judge's, opponent's and data set's in a file of its own."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dpo.config import DataConfig
from dpo.files import CHECKSUMS_FILE, replace_text
from dpo.judging.figures import MatchResult
from dpo.outcomes import UserError
from dpo.typed_json import read_typed

RESULT_FILE = "winrate.json"
"""Of the first match; a second one is beside it, as winrate-JUDGE.json."""
VERDICTS_FILE = "verdicts.jsonl"
"""Of all matches of the directory; a verdict's key says which judge's it is."""


def read_results(directory: Path) -> dict[Path, MatchResult]:
    """All matches that were measured there, the first one first.

    Raises:
      ValueError: naming a file that is damaged.
    """
    paths = sorted(directory.glob("winrate*.json"), key=lambda path: (path.name != RESULT_FILE, path.name))
    return {path: _read(path) for path in paths}


def listed_files(directory: Path) -> str | None:
    """SHA-256 of the checksums that a model's directory lists of its files; None without a list.

    It takes no time, since no weights are read: who opens the model compares them with the list. The model
    card is left out, which says more of a model than what it computes.
    """
    try:
        lines = (directory / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    files = sorted(line for line in lines if not line.endswith("  README.md"))
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def is_of(result: MatchResult, policy: Path) -> bool:
    """Whether a match may be shown as the policy's: it is no other's, and none that was there before.

    Where either says nothing of its files, as in versions before, it may.
    """
    now = listed_files(policy)
    return now is None or "policy_files" not in result or result["policy_files"] == now


def write_result(directory: Path, result: MatchResult) -> Path:
    """Write a match's figures over its own of before, and beside those of any other judge or opponent."""
    path = _place(directory, result)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    replace_text(path, text, what="the win-rate")
    return path


def read_as(data: DataConfig) -> dict[str, Any]:
    """How the held-out data are read, as given or as the run has it, by the names of `dpo winrate`."""
    return {
        "split": data.eval_split,
        "limit": data.max_eval,
        "row_layout": data.row_layout,
        "columns": data.columns,
        "ignore_columns": data.ignore_columns,
        "chat_template": data.chat_template,
        "template_kwargs": data.template_kwargs,
        "template_characters": data.template_characters,
    }


def _read(path: Path) -> MatchResult:
    result = read_typed(path, MatchResult, remedy=_REMEDY)
    if not result["temperatures"] or not all(map(_TEMPERATURE.fullmatch, result["temperatures"])):
        names = repr(list(result["temperatures"]))[:100]
        raise UserError(f"{path} is damaged: temperatures has {names}; allowed are numbers as names{_REMEDY}")
    if not isinstance(result["settings"].get("judge"), str):
        raise UserError(f"{path} is damaged: settings.judge is no text{_REMEDY}")
    return result


_REMEDY = "; delete it, and run dpo winrate again"
_TEMPERATURE = re.compile(r"\d{1,9}(\.\d{1,20})?(e[+-]?\d\d?)?")


def _place(directory: Path, result: MatchResult) -> Path:
    found = read_results(directory)
    for path, kept in found.items():
        if _compared(kept) == _compared(result):
            return path
    if not found:
        return directory / RESULT_FILE
    first = next(iter(found.values()))
    words = [str(result["settings"]["judge"])]
    words += [] if _is_same(result["opponent"], first["opponent"]) else [result["opponent"]]
    words += [] if _is_same(result["data"], first["data"]) else ["other-data"]
    name = "-".join(["winrate", *(re.sub(r"[^\w.]+", "-", Path(word).name).strip("-") for word in words)])
    numbers = ["", *(f"-{number}" for number in range(2, len(found) + 2))]
    return next(path for end in numbers if (path := directory / f"{name}{end}.json") not in found)


def _compared(result: MatchResult) -> tuple[object, ...]:
    """What tells one match from another: a measurement of the same with other settings takes its place."""
    given = (result["policy"], result["opponent"], result["data"])
    return *map(_whole_path, given), result["judge"]


def _is_same(source: object, other: object) -> bool:
    return _whole_path(source) == _whole_path(other)


def _whole_path(source: object) -> object:
    """A source that is a path here, however it was spelled; what is none, or not there any more, as it is."""
    path = Path(source).expanduser() if isinstance(source, str) else None
    return source if path is None or not path.exists() else str(path.resolve())
