"""JSON that came with a model: read within limits, and each of its values checked by a table of rules.

A configuration is somebody else's, and what is made from it is not: a number of layers makes as many layers.
So before anything is built every value that this project or transformers builds from has its type and its
range (`require`), and no file is read that is no regular one or is longer than it has a reason to be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo.outcomes import UserError
from dpo.regular_files import require_regular
from dpo.text_encoding import require_utf8

MAX_JSON_BYTES = 1 << 24
"""Bytes of a configuration; the longest have some ten thousand."""
MAX_DEPTH = 20
"""Lists and objects in each other."""
MAX_VALUES = 1_000_000
"""Values of a file, each as often as it is there."""
LONGEST_SHOWN = 80

JsonObject = dict[str, Any]
"""An object of JSON that others write: what it holds is not known before it is looked at."""
Rule = Callable[[Any], str | None]
"""What is allowed, where a value is not; None where it is."""


def read_small_json(path: Path, *, most: int = MAX_JSON_BYTES) -> JsonObject:
    """The object in a JSON file that came with a model.

    Raises:
      UserError: with the path, for what is no regular file, is too long, or is refused by `parse_object`.
    """
    require_file(path, most)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    found = parse_object(path, content)
    problem = find_problem(found)
    if problem:
        raise UserError(f"{path}: {problem}")
    return found


def require_file(path: Path, most: int) -> None:
    """Refuse what is no regular file (a pipe has no end), or is longer than `most` bytes."""
    if (size := require_regular(path).stat().st_size) > most:
        raise UserError(f"{path}: is {size} bytes long; allowed are {most}")


def parse_object(path: Path, content: bytes) -> JsonObject:
    """A JSON object; `UserError` for anything else, and for a name that is there twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            raise UserError(f"duplicate names {twice}")
        return dict(pairs)

    require_utf8(path, content)
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found


def check_fields(
    path: Path | str, values: Mapping[str, Any], rules: Mapping[str, Rule], *, group: str = ""
) -> None:
    """Every value that has a rule keeps it.

    Raises:
      UserError: with the path and every field that does not, what it is, and what is allowed.
    """
    problems = [
        f"{group}{name} is {show(values[name])}; allowed is {allowed}"
        for name, rule in rules.items()
        if name in values and (allowed := rule(values[name])) is not None
    ]
    if problems:
        raise UserError(f"{path}: " + "\n  ".join(problems))


def show(value: object) -> str:
    """A value in a few characters; one that holds others by its kind alone, where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value[:LONGEST_SHOWN]) + ("…" if len(value) > LONGEST_SHOWN else "")
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


# ---- rules ----


def whole(least: int, most: int) -> Rule:
    """A whole number in a range."""

    def rule(value: Any) -> str | None:
        fits = type(value) is int and least <= value <= most
        return None if fits else f"a whole number from {least} to {most}"

    return rule


def real(least: float | int, most: float | int, *, above: bool = False) -> Rule:
    """A finite number in a range, without its lower end where `above`."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (least < value if above else least <= value) and value <= most
        return None if fits else f"a number {'above' if above else 'from'} {least:g} to {most:g}"

    return rule


def text(value: Any) -> str | None:
    """A text of at most a thousand characters."""
    return None if isinstance(value, str) and len(value) <= 1000 else "a text of at most 1000 characters"


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def optional(inner: Rule) -> Rule:
    """Null, or what another rule allows."""

    def rule(value: Any) -> str | None:
        allowed = None if value is None else inner(value)
        return None if allowed is None else f"{allowed}, or null"

    return rule


def list_of(inner: Rule, most: int) -> Rule:
    """A list of not too many."""

    def rule(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) > most:
            return f"a list of at most {most} values"
        allowed = next((found for one in value if (found := inner(one)) is not None), None)
        return None if allowed is None else f"a list of which each is {allowed}"

    return rule


def either(first: Rule, second: Rule) -> Rule:
    """What one of two rules allows."""

    def rule(value: Any) -> str | None:
        found = first(value), second(value)
        return None if None in found else f"{found[0]}, or {found[1]}"

    return rule


def mapping_of(inner: Rule, most: int) -> Rule:
    """An object of not too many."""

    def rule(value: Any) -> str | None:
        if not isinstance(value, dict) or len(value) > most:
            return f"an object of at most {most} names"
        allowed = next((found for one in value.values() if (found := inner(one)) is not None), None)
        return None if allowed is None else f"an object in which each value is {allowed}"

    return rule


def find_problem(value: Any) -> str | None:
    """What no configuration has: depth, numbers that no machine holds, text that cannot be written."""
    return _find_problem(value, "", 0, [MAX_VALUES])


def _find_problem(value: Any, where: str, depth: int, left: list[int]) -> str | None:
    left[0] -= 1
    if left[0] < 0:
        return f"it holds more than {MAX_VALUES} values; allowed are as many"
    at = where.lstrip(".") or "the object"
    if depth > MAX_DEPTH:
        return (
            f"{at[:LONGEST_SHOWN]} lies more than {MAX_DEPTH} lists and objects deep; allowed are {MAX_DEPTH}"
        )
    if isinstance(value, str):
        broken = not _is_writable(value)
        return f"{at} is a text with half of a surrogate pair; allowed is Unicode" if broken else None
    if isinstance(value, int) and value.bit_length() > 128:  # transformers writes 1e30 for "no limit"
        return f"{at} is {show(value)}; allowed are whole numbers of 128 bits"
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        if isinstance(name, str) and not _is_writable(name):
            return f"{at} has a name with half of a surrogate pair; allowed is Unicode"
        problem = _find_problem(one, f"{where}.{str(name)[:LONGEST_SHOWN]}", depth + 1, left)
        if problem:
            return problem
    return None


def _is_writable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
