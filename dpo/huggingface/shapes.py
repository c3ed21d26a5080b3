"""Shapes of known models as `shape:NAME`: what their public config.json says of the decoder."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

from dpo.huggingface.foreign_json import JsonObject
from dpo.outcomes import UserError

SHAPE_PREFIX = "shape:"


def read_shape(source: str) -> JsonObject:
    """The Hugging Face configuration of `shape:NAME`.

    Raises:
      ValueError: for a name that is not known, with those that are.
    """
    known = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
    name = source.removeprefix(SHAPE_PREFIX)
    if name not in known:
        meant = "".join(
            f" did you mean {SHAPE_PREFIX}{near}?" for near in get_close_matches(name, known, n=1)
        )
        raise UserError(
            f"{source!r} is no known shape;{meant} allowed are {', '.join(SHAPE_PREFIX + n for n in known)}"
        )
    return known[name]
