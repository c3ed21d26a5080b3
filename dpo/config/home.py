"""`~/` in settings, wherever they come from."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any


def at_home(value: Any) -> Any:
    """Settings with the home directory in place of `~/` at the start of a text, in groups and lists too."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: at_home(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **found)
    if isinstance(value, list | tuple):
        return type(value)(map(at_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
