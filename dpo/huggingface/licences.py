"""Under which licence a model directory says it stands, and which hub model it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


def read_licence(directory: Path) -> str | None:
    """The `license` in the front matter of a directory's README.md."""
    found = read_front_matter(directory / "README.md").get("license")
    return found if isinstance(found, str) else None


def read_front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; empty where there is none, or it is not a mapping."""
    if not path.is_file():
        return {}
    found = re.match(
        r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}
