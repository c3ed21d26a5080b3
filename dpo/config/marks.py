"""What is said of a setting beside its default: whether a number depends on it, and where it matters.

    save_every: int | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD))

A mark is written where the setting is, so that a new one cannot be forgotten in a table somewhere else. What
has none decides numbers, is compared when a run goes on, and must be the same in all processes of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

Mark = Literal["beside the numbers", "a place", "off the card", "a process's own"]

BESIDE: Mark = "beside the numbers"
"""No number depends on it: it may change between the parts of one run."""
PLACE: Mark = "a place"
"""It says where something is; what is there is compared instead, so that it may be moved."""
OFF_THE_CARD: Mark = "off the card"
"""An export's card does not list it: whoever repeats the run need not know it."""
OWN: Mark = "a process's own"
"""It may differ among the processes of a run: each has its own, or it is compared in another form."""


def marks(*given: Mark) -> Mapping[str, frozenset[Mark]]:
    """The metadata of a field of settings that has these marks."""
    return MappingProxyType({"marks": frozenset(given)})


@cache
def marked(settings: type, mark: Mark) -> tuple[str, ...]:
    """Dotted names of the settings, or of whole sections of them, that have a mark, in their order."""
    return tuple(_marked(settings, mark, ""))


def _marked(settings: type, mark: Mark, prefix: str) -> list[str]:
    hints, found = get_type_hints(settings), list[str]()
    for item in fields(settings):
        if mark in _marks_of(item):
            found.append(prefix + item.name)
        elif is_dataclass(hints[item.name]):
            found += _marked(hints[item.name], mark, f"{prefix}{item.name}.")
    return found


def _marks_of(item: Field[Any]) -> frozenset[Mark]:
    return item.metadata.get("marks", frozenset())
