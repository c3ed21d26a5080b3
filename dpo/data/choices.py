"""Verdicts between two responses, in the ways that data sets write them: sides, numbers, strengths, flags."""

from __future__ import annotations

import math
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


OTHER_NUMBERS = "other_numbers"
"""The reason of a row whose number is none of those that this project reads there.

Other rows' numbers may then mean something else too: they are not learned, whatever else may be skipped.
"""


def by_side(
    value: Any,
    field: str,
    names: tuple[str, str],
    counts_from: int | None = None,
    *,
    setting: str = "data.columns",
) -> Ranks:
    """A side by its name (a, model_a, the column's own), by a number, or a tie.

    A number says which of the columns it is where their names end in numbers; else `counts_from` is the first
    one's, and with None it is not known. `setting` is where the user can say it.
    """
    text = _as_word(value)
    if (named := side_of_word(text, names)) is not None:
        return named
    first = _number_of(names[0], counts_from)
    number = _number(text)
    if first is not None and number is not None and number - first in _BY_NUMBER:
        return _BY_NUMBER[number - first]
    words = f"{names[0]}, {names[1]}, model_a, model_b, a, b, tie"
    if number is None:
        numbers = "" if first is None else f", {first}, {first + 1}"
        raise MalformedRowError(field, "unknown_side", f"found {show(value)}; allowed are {words}{numbers}")
    if first is None:
        detail = (
            f"found {show(value)}, and the rows do not say whether {names[0]} is 0 or 1 (numbers behind "
            f"words do not); allowed are {words}, or names that say it: {setting} {{response_0: {names[0]}, "
            f"response_1: {names[1]}}} or {{response_1: {names[0]}, response_2: {names[1]}}}"
        )
    else:
        detail = (
            f"found {show(value)}, where {names[0]} is {first}; allowed are {words}, {first}, {first + 1}"
        )
    raise MalformedRowError(field, OTHER_NUMBERS, detail)


_BY_NUMBER = {0.0: FIRST, 0.5: TIE, 1.0: SECOND}


def side_of_word(text: str, names: tuple[str, str]) -> Ranks | None:
    """A side by a word in lower case; None for a number, or a word that is none."""
    if text in _FIRST or text == names[0].lower():
        return FIRST
    if text in _SECOND or text == names[1].lower():
        return SECOND
    return TIE if text in _TIES else None


def count_of(value: Any, names: tuple[str, str]) -> int | Ranks | None:
    """What a verdict says of how verdicts beside it count: the first one's number, or that it is a word.

    None where it says nothing of it: a tie, a 1, anything else.
    """
    text = _as_word(value)
    named = side_of_word(text, names)
    if named in (FIRST, SECOND):
        return named
    number = _number(text)
    return None if number is None else {0.0: 0, 2.0: 1}.get(number)


def counts_by_name(names: tuple[str, str]) -> bool:
    """Whether the columns' names say how numbers of them count."""
    return _number_of(names[0], None) is not None


def by_strength(value: Any, field: str) -> Ranks:
    """How much better the second response is: below 0 the first is better, 0 is a tie."""
    strength = finite(value, field)
    return TIE if strength == 0 else FIRST if strength < 0 else SECOND


def by_index(value: Any, field: str, first: int) -> Ranks:
    """The number of the better response, 0 or 1, where the first one's is `first`."""
    number = finite(value, field)
    if number not in (0, 1):
        raise MalformedRowError(field, OTHER_NUMBERS, f"found {show(value)}; allowed are 0 and 1")
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
    is_more = (number := _number(word)) is not None and not -1 <= number <= 1
    raise MalformedRowError(field, OTHER_NUMBERS if is_more else "wrong_type", detail)


def _as_word(value: Any) -> str:
    """A text, number or flag in lower case; whole numbers without a point, anything else as no word."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() < 64):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    return value.strip().lower() if isinstance(value, str) else ""


def as_count(value: Any) -> int | None:
    """A whole number from 1 on, or text that is one; None for anything else."""
    word = _as_word(value)
    number = int(word) if word.isdecimal() and len(word) < 10 else 0
    return number or None


def _number(word: str) -> float | None:
    """A finite number that a text is; None for any other text."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number_of(name: str, otherwise: int | None) -> int | None:
    return int(name[-1]) if name[-1].isdecimal() else otherwise
