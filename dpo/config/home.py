"""`~/` and `~NAME/` in settings, wherever they come from."""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass, replace
from typing import Any


def at_home(value: Any) -> Any:
    """Settings with the home directory in place of `~/` at the start of a text, in groups and lists too.

    `~NAME/` is the home of somebody, where there is such a one. A text that is `~` alone is the own home: as
    the name of a directory it would be one that is called so.
    """
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: at_home(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **found)
    if isinstance(value, tuple) and getattr(value, "_fields", ()) == ("key", "val"):
        return dict([value])  # jsonargparse's, of --data.train.rows=5: no group
    if isinstance(value, list | tuple):
        return type(value)(map(at_home, value))
    if isinstance(value, str) and (value == "~" or re.match(r"~[\w.-]*/", value)):
        return os.path.expanduser(value)
    return value
