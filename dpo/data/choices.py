"""Verdicts between two responses, in the ways that data sets write them: sides, numbers, strengths, flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.data.malformed import MalformedRowError
from dpo.data.values import finite, show

Ranks = tuple[int, int]
FIRST, SECOND, TIE = (0, 1), (1, 0), (0, 0)

_TIES = frozenset(
    {"tie", "ties", "tie (bothbad)", "both", "both_bad", "bothbad", "both_good", "equal", "draw", "same"}
)
_FIRST = frozenset({"a", "model_a", "response_a", "first", "left"})
_SECOND = frozenset({"b", "model_b", "response_b", "second", "right"})
_YES = ("true", "1", "1.0", "+1", "yes", "desirable", "chosen", "like", "thumbs_up", "good", "positive", "👍")
_NO = (
    "false",
    "0",
    "0.0",
    "no",
    "undesirable",
    "rejected",
    "dislike",
    "thumbs_down",
    "bad",
    "negative",
    "👎",
)


def by_side(value: Any, field: str, names: tuple[str, str]) -> Ranks:
    """A side by its name (a, model_a, the column's own), by a number, or a tie.

    A number says which of the columns it is where their names end in numbers; else they count from 0.
    """
    text = _as_word(value)
    first, second = _number_of(names[0], 0), _number_of(names[1], 1)
    if text in _FIRST or text == names[0].lower() or text == str(first):
        return FIRST
    if text in _SECOND or text == names[1].lower() or text == str(second):
        return SECOND
    if text in _TIES or text == "0.5":
        return TIE
    detail = f"found {show(value)}; allowed are {names[0]}, {names[1]}, a, b, tie, {first}, {second}"
    raise MalformedRowError(field, "unknown_side", detail)


def by_strength(value: Any, field: str) -> Ranks:
    """How much better the second response is: below 0 the first is better, 0 is a tie."""
    strength = finite(value, field)
    return TIE if strength == 0 else FIRST if strength < 0 else SECOND


def by_index(value: Any, field: str, first: int) -> Ranks:
    """The number of the better response, 0 or 1, where the first one's is `first`."""
    number = finite(value, field)
    if number not in (0, 1):
        raise MalformedRowError(field, "unknown_side", f"found {show(value)}; allowed are 0 and 1")
    return FIRST if number == first else SECOND


def by_flags(flags: Mapping[str, Any]) -> Ranks:
    """Three flags, of which one is set: the first is better, the second is, or neither."""
    chosen = [is_desirable(value, field) for field, value in flags.items()]
    if sum(chosen) != 1:
        detail = f"{sum(chosen)} of {', '.join(flags)} are set; allowed is one"
        raise MalformedRowError(next(iter(flags)), "unknown_side", detail)
    return (FIRST, SECOND, TIE)[chosen.index(True)]


def is_desirable(value: Any, field: str) -> bool:
    """A label of one response: true or false, 1 or 0, or a word that says so."""
    word = _as_word(value)
    if word in _YES:
        return True
    if word in _NO:
        return False
    detail = f"found {show(value)}; allowed are {', '.join(_YES)} (desirable) and {', '.join(_NO)}"
    raise MalformedRowError(field, "wrong_type", detail)


def _as_word(value: Any) -> str:
    """A text, number or flag in lower case; whole numbers without a point, anything else as no word."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() < 64):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    return value.strip().lower() if isinstance(value, str) else ""


def _number_of(name: str, place: int) -> int:
    return int(name[-1]) if name[-1].isdecimal() else place
