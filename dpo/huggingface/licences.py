"""Under which licence a model directory says it stands, and which hub model it is."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from dpo.huggingface.foreign_json import JsonObject, find_problem, require_file, show
from dpo.outcomes import UserError, told_by
from dpo.regular_files import is_there

MAX_README_BYTES = 1 << 20


def read_licence(directory: Path) -> str | None:
    """The `license` in the front matter of a directory's README.md.

    Raises:
      UserError: for one that is no line of text: it is written on the card of what is made of the model.
    """
    path = directory / "README.md"
    found = read_front_matter(path).get("license")
    if not isinstance(found, str):
        return None
    if not found.isprintable() or len(found) > 200:
        raise UserError(f"{path}: license is {show(found)}; allowed is one line of at most 200 characters")
    return found


def read_front_matter(path: Path) -> JsonObject:
    """The YAML between the first two lines of dashes; empty where there is none, or it is not a mapping.

    Raises:
      UserError: for a file that is too long, and for values that no card has.
    """
    if not is_there(path):
        return {}
    require_file(path, MAX_README_BYTES)
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
        problem = find_problem(values) if isinstance(values, dict) else None
    except yaml.YAMLError:
        return {}
    except (ValueError, RecursionError, TypeError) as error:  # a date of month 13, 5,000 digits, 900 lists
        raise UserError(f"{path}: its front matter cannot be read: {told_by(error)}") from error
    if problem:
        raise UserError(f"{path}: {problem}")
    return values if isinstance(values, dict) else {}
