"""What the README of a folder of data, or of a data set of the hub, says of its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo.outcomes import UserError
from dpo.regular_files import is_inside, is_there, require_regular
from dpo.text_encoding import require_utf8

MAX_CARD = 1 << 20
"""Bytes of a folder's README, and of the files that say what is in it."""


def check_card(folder: Path) -> bool:
    """Whether a folder's README or .huggingface.yaml says which of its files are the data.

    Only files of the folder may be named: `datasets` would fetch others from the hub or a server, with the
    user's token.

    Raises:
      UserError: naming the pattern that leads out, and for values that take long to look through.
    """
    listed = False
    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        configs = _front_matter(path).get("configs") if is_there(path) else None
        listed = listed or bool(configs)
        for pattern in _patterns(configs):
            if not is_inside(pattern) or "://" in pattern or "::" in pattern:
                raise UserError(
                    f"{path}: its data_files or data_dir name {pattern[:200]!r}; allowed are files of "
                    "this folder (a data set of the hub is named by its id, in data.train or data.eval)"
                )
    return listed


def unnamed_subsets(folder: Path) -> set[str]:
    """The subsets that may be meant where none is named: what the card calls the default, or its only one."""
    names, flagged = {"default"}, set[str]()
    for path in (folder / "README.md", folder / ".huggingface.yaml"):
        configs = _front_matter(path).get("configs") if is_there(path) else None
        listed = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
        names |= {str(one.get("config_name", "default")) for one in listed}
        flagged |= {str(one.get("config_name", "default")) for one in listed if one.get("default") is True}
    if flagged:
        return flagged
    return names if len(names) <= 2 else {"default"}


def _front_matter(path: Path) -> dict[Any, Any]:
    text = read_small(path)
    if path.suffix == ".md":
        text = text.split("---", 2)[1] if text.lstrip().startswith("---") and text.count("---") > 1 else ""
    if len(text) > MAX_CARD:
        raise UserError(f"{path}: says more than {MAX_CARD} characters of its data; allowed are as many")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path}: what it says of the data is no YAML: {error}") from error
    _require_few(found, path, 0, [_MAX_VALUES])
    return found if isinstance(found, dict) else {}


_MAX_VALUES = 20_000
"""Values of a card; what an alias stands for is counted each time, as it is read each time."""
_MAX_DEPTH = 20


def _require_few(value: Any, path: Path, depth: int, left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise UserError(f"{path}: says more than {_MAX_VALUES} values, aliases counted; allowed are as many")
    if depth > _MAX_DEPTH:
        raise UserError(f"{path}: has values more than {_MAX_DEPTH} lists and objects deep")
    inner = value.values() if isinstance(value, Mapping) else value
    for one in inner if isinstance(value, (Mapping, list, tuple, set)) else ():
        _require_few(one, path, depth + 1, left)


def _patterns(value: Any) -> Iterable[str]:
    """All texts under `data_files`, `data_dir` or `path` of the configurations, in whatever they lie."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner) if name in ("data_files", "data_dir", "path") else _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "split":
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def read_small(path: Path) -> str:
    """The text of a file that says what is in a folder of data.

    Raises:
      UserError: naming a file that is none, or is too long or not UTF-8.
    """
    if require_regular(path).stat().st_size > 16 * MAX_CARD:
        raise UserError(f"{path}: is longer than {16 * MAX_CARD} bytes")
    content = path.read_bytes()
    require_utf8(path, content)
    return content.decode("utf-8", errors="replace")
