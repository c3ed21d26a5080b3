"""The distribution of this package: its name on an index, its version, and the files that come with it.

A checkout keeps settings and data at its top, in `configs/` and `data/`. The build of a wheel (`setup.py`)
copies them into the package, so that an installed package brings them along.
"""

from __future__ import annotations

import filecmp
import os
import re
import sys
import tomllib
from collections.abc import Collection
from functools import cache
from importlib import metadata
from pathlib import Path

from dpo.outcomes import UserError

DISTRIBUTION = "dpo-jax"
"""What is installed with pip; the import and the command are `dpo`."""
PREFIX = "shipped:"
"""Begins a source of data that comes with the package, such as shipped:sentiment_train.jsonl."""

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "shipped"
"""Where `setup.py` puts `configs/` and `data/` in a wheel; a checkout has no such directory."""


def own_python() -> tuple[list[str], dict[str, str]]:
    """Command and environment of a Python that finds this package, and no module of the working directory.

    Both `python -c` and `python -m` look there first, and what lies in it may be anybody's.
    """
    paths = dict.fromkeys([*filter(None, sys.path), str(_PACKAGE.parent)])
    return [sys.executable, "-P"], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@cache
def version() -> str:
    """The version of the code that runs: of the checkout that holds it, or of the installed distribution."""
    project = _PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        found = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if found.get("name") == DISTRIBUTION:
            return found["version"]
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown: neither installed nor a checkout"


def settings_names(known: Collection[str] | None = None) -> list[str]:
    """Names that stand for shipped files of settings: `sentiment_pairs` is `configs/sentiment_pairs.yaml`.

    Of those alone that set nothing but what is `known`, where that is given.
    """
    files = sorted(_shipped("configs").glob("*.yaml"))
    return [path.stem for path in files if known is None or _names_in(path) <= set(known)]


def _names_in(path: Path) -> set[str]:
    """What a shipped file sets, or the sections in which it does."""
    return set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE))


def find_settings(given: str) -> str:
    """A file of settings: what was given, or the shipped one of that name where there is no such file."""
    if not Path(given).exists() and given in settings_names():
        return str(_shipped("configs") / f"{given}.yaml")
    return given


def find_data(source: str) -> str:
    """A source of data as it was given, or the path of `shipped:FILE`.

    Raises:
      ValueError: naming the files there are, for another one.
    """
    if not source.startswith(PREFIX):
        return source
    there = {path.name: path for path in sorted(_shipped("data").glob("*.jsonl"))}
    name = source.removeprefix(PREFIX)
    if name not in there:
        raise UserError(f"{source}: no such file comes with the package; allowed: {', '.join(there)}")
    return str(there[name])


def is_shipped(source: str) -> bool:
    """Whether a source of data is one that comes with the package: by its content, wherever it stands."""
    path = Path(find_data(source)).expanduser()
    return path.is_file() and any(
        filecmp.cmp(path, other, shallow=False) for other in _shipped("data").glob("*.jsonl")
    )


def _shipped(kind: str) -> Path:
    return (_INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent) / kind
