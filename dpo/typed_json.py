"""JSON files that a command left, read as the type that says what they hold.

A run directory may come from somebody else, or from another version. So what stands in a file is of its type,
or is refused by file and field, before anything is made of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from dpo.outcomes import UserError
from dpo.regular_files import why_no_file
from dpo.text_encoding import encoding_problem

T = TypeVar("T")
MAX_BYTES = 1 << 28
"""Of such a file."""
MAX_DEPTH = 50
"""Lists and objects in each other."""


class Length(NamedTuple):
    """How many values a list has: `Annotated[list[float], Length(3)]`."""

    count: int


def read_typed(path: Path, kind: type[T], *, remedy: str = "", whole: bool = True) -> T:
    """What a JSON file holds, which is of a type; names that the type does not have are left aside.

    `remedy` says what helps, and `whole` that every name of an object has to be there.

    Raises:
      UserError: naming the file, and the field that is of another type.
    """
    try:
        if (problem := why_no_file(path)) is not None:
            raise UserError(problem)
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"it has more than {MAX_BYTES} bytes")
        found = parse_typed(path.read_bytes(), kind, whole=whole)
    except (OSError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}{remedy}") from error
    return found


def parse_typed(content: bytes, kind: type[T], *, whole: bool = True) -> T:
    """The same of a text; the error begins with the field.

    Raises:
      UserError: for what is no JSON, or is of another type.
    """
    if (problem := encoding_problem(content[:4])) is not None:
        raise UserError(problem)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from error
    return require_typed(found, kind, whole=whole)


def require_typed(value: Any, kind: type[T], *, whole: bool = True) -> T:
    """The same of a value of JSON."""
    _check(value, kind, "", 0, whole=whole)
    return cast(T, value)


def _check(value: Any, hint: Any, name: str, depth: int, *, whole: bool) -> None:
    """Refuse a value, or what is in it, that is not what its hint says."""
    if depth > MAX_DEPTH:
        raise UserError(f"{name[:100]} lies in more than {MAX_DEPTH} lists and objects")
    if is_typeddict(hint) and isinstance(value, dict):
        return _check_object(value, hint, name, depth, whole=whole)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (NotRequired, Required):
        return _check(value, arguments[0], name, depth, whole=whole)
    if origin is Annotated:
        _check(value, arguments[0], name, depth, whole=whole)
        if isinstance(arguments[1], Length) and len(value) != arguments[1].count:
            raise UserError(f"{_named(name)} has {len(value)} values; allowed are {arguments[1].count}")
        return None
    if origin in (Union, UnionType):
        return _check_one_of(value, hint, name, depth, whole=whole)
    if not _is_a(value, hint):
        raise _wrong(value, hint, name)
    inner = Any if not arguments or origin is Literal else arguments[-1]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        _check(one, inner, f"{name}.{str(key)[:100]}" if name else str(key)[:100], depth + 1, whole=whole)
    return None


def _check_one_of(value: Any, hint: Any, name: str, depth: int, *, whole: bool) -> None:
    """Of several objects it is the one that has most of its names."""
    fitting = [one for one in get_args(hint) if _is_a(value, one)]
    if not fitting:
        raise _wrong(value, hint, name)
    known = [len(value.keys() & get_type_hints(one)) if is_typeddict(one) else 0 for one in fitting]
    _check(value, fitting[known.index(max(known))], name, depth, whole=whole)


def _check_object(value: dict[str, Any], kind: Any, name: str, depth: int, *, whole: bool) -> None:
    optional = not kind.__total__
    for key, hint in get_type_hints(kind, include_extras=True).items():
        inner = f"{name}.{key}" if name else key
        if key in value:
            _check(value[key], hint, inner, depth + 1, whole=whole)
        elif whole and get_origin(hint) is not NotRequired and (get_origin(hint) is Required or not optional):
            raise UserError(f"{inner} is not there")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value itself, and not what is in it, is of a hint."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _is_a(value, get_args(hint)[0])
    if origin is Literal:
        return isinstance(value, (str, int)) and value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_a(value, one) for one in get_args(hint))
    kind = origin or hint
    if kind in (Any, object):
        return True
    if is_typeddict(kind) or kind in (dict, Mapping):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, float) or (_is_whole(value) and math.isfinite(_as_float(value)))
    if kind is int:
        return _is_whole(value) and abs(value) < 1 << 53
    return isinstance(value, NoneType if kind is None else kind)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _wrong(value: Any, hint: Any, name: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return UserError(f"{_named(name)} is {shown}; allowed is {_words(hint)}")


def _named(name: str) -> str:
    return name or "what it holds"


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    NoneType: "null",
}


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (NotRequired, Required, Annotated):
        return _words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    return _WORDS.get(origin or hint, "an object")
