"""Values of a row's columns, taken for what they must be or refused by name, and shown shortly in errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo.data.json_text import DECODER, DuplicateKeyError
from dpo.data.malformed import MalformedRowError

_LONGEST_SHOWN = 60
_NO_NUMBER = ("", "nan", "na", "n/a", "none", "null")


def read_text(value: Any, field: str) -> str:
    """A string with more than white space in it."""
    text = read_any_text(value, field)
    if not text or text.isspace():
        raise MalformedRowError(
            field, "empty", "found nothing but white space; allowed is a string with text"
        )
    return text


def is_plain_text(value: Any) -> bool:
    """Whether a value is a text that begins with a letter or a digit, as most do: it is text alone.

    Of any other `read_text` says whether it is one.
    """
    return type(value) is str and value[:1].isalnum() and (value.isascii() or _is_unicode(value))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_any_text(value: Any, field: str) -> str:
    """A string of valid Unicode, which may be empty."""
    if not isinstance(value, str):
        raise MalformedRowError(field, "wrong_type", f"found {name_type(value)}; allowed is a string")
    try:
        if not value.isascii():
            value.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"character {error.start} is half a surrogate pair; allowed is valid Unicode"
        raise MalformedRowError(field, "invalid_unicode", detail) from None
    return value


def read_json(value: Any, field: str) -> Any:
    """Anything that JSON can say, which is what a template may see."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        detail = "a text in it has half a surrogate pair; allowed is valid Unicode"
        raise MalformedRowError(field, "invalid_unicode", detail) from None
    except (TypeError, ValueError, RecursionError) as error:
        detail = f"{str(error)[:120]}; allowed is what JSON can say"
        raise MalformedRowError(field, "wrong_type", detail) from None
    return value


def read_list(value: Any, field: str, *, least: int = 1) -> Sequence[Any]:
    """A list of at least so many values, or the same as JSON text (as tables of text have it)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, field)
    if not _is_list(value) or len(value) < least:
        found = f"a list of {len(value)}" if isinstance(value, list) else name_type(value)
        reason = "too_few_responses" if least > 1 else "wrong_type"
        raise MalformedRowError(field, reason, f"found {found}; allowed is a list of {least} or more")
    return value


def read_objects(value: Any, field: str, *, least: int = 1) -> list[Mapping[str, Any]]:
    """A list of objects."""
    items = read_list(value, field, least=least)
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            detail = f"found {name_type(item)}; allowed is an object"
            raise MalformedRowError(f"{field}[{i}]", "wrong_type", detail)
    return list(items)


def parse_json(text: str, field: str) -> Any:
    """What a JSON text says."""
    try:
        return DECODER.decode(text)
    except DuplicateKeyError as error:
        raise MalformedRowError(field, "duplicate_key", f"{error}; allowed is once") from None
    except (ValueError, RecursionError) as error:
        detail = f"text that looks like JSON and is not: {str(error)[:120]}; allowed is JSON (double quotes)"
        raise MalformedRowError(field, "invalid_json", detail) from None


def as_object(value: Any, field: str) -> Mapping[str, Any] | None:
    """An object, or the same as JSON text; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_json(value, field)
    return value if isinstance(value, Mapping) else None


def read_numbers(value: Any, field: str, count: int) -> list[float]:
    """One finite number for each of so many responses."""
    return [
        number if type(number) is float and math.isfinite(number) else finite(number, f"{field}[{k}]")
        for k, number in enumerate(_one_each(value, field, count))
    ]


def read_scores(value: Any, field: str, count: int) -> list[float]:
    """One score for each of so many responses, NaN where there is none."""
    return [
        number if type(number) is float and math.isfinite(number) else read_score(number, f"{field}[{k}]")
        for k, number in enumerate(_one_each(value, field, count))
    ]


def read_score(value: Any, field: str) -> float:
    """A number; NaN, which a missing number becomes in tables, says that there is no score."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if isinstance(value, str) and value.strip().lower() in _NO_NUMBER:
        return math.nan
    return finite(value, field)


def finite(value: Any, field: str) -> float:
    """A finite number, or text that is one (as tables of text have it)."""
    number = _as_number(value)
    if number is None or not math.isfinite(number):
        raise MalformedRowError(field, "not_a_number", f"found {show(value)}; allowed is a finite number")
    return number


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > _LONGEST_SHOWN:
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _one_each(value: Any, field: str, count: int) -> Sequence[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, field)
    if not _is_list(value):
        detail = f"found {name_type(value)}; allowed is a list with one number a response"
        raise MalformedRowError(field, "wrong_type", detail)
    if len(value) != count:
        detail = f"{len(value)} for {count} responses; allowed is one number a response"
        raise MalformedRowError(field, "length_mismatch", detail)
    return value


def _is_list(value: Any) -> bool:
    """Whether it is a list or like one; a list is known at once, which every row asks several times."""
    return type(value) is list or (isinstance(value, Sequence) and not isinstance(value, (str, bytes)))


def is_empty(value: Any) -> bool:
    """Whether a column of a row says nothing: null, no text, no element."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (not value and isinstance(value, (Sequence, Mapping)))


def show(value: Any) -> str:
    """A scalar, shortened, or the name of any other type: a row may hold anything, of any depth."""
    if isinstance(value, (str, float, bool)):
        text = repr(value[: _LONGEST_SHOWN + 1] if isinstance(value, str) else value)
        return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 128 else "an integer beyond any number"
    return name_type(value)


def show_names(names: Iterable[Any]) -> str:
    """The first names of a row's columns."""
    found = sorted(show(str(name)) for name in names)
    return f"[{', '.join(found[:20])}{', …' if len(found) > 20 else ''}]"


def name_type(value: Any) -> str:
    """The type of a value in JSON's words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
