"""Hyper-parameters: the types and ranges that factories declare in their signatures, and their check.

A factory annotates each argument with `Annotated[type, Range(...)]`, a `Literal` or a plain type; `checked`
reads the signature, so that what a factory takes is written down once.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dpo.outcomes import UserError


@dataclass(frozen=True)
class Range:
    """An interval; each end is inside it unless `open_low` or `open_high`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float | int) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = [] if self.low == -math.inf else [f"{'>' if self.open_low else '>='} {self.low:g}"]
        high = [] if self.high == math.inf else [f"{'<' if self.open_high else '<='} {self.high:g}"]
        return " and ".join(low + high) if low or high else "any"


Strength = Annotated[float, Range(low=0.0, open_low=True)]
FlipProbability = Annotated[float, Range(low=0.0, high=0.5, open_high=True)]
NonNegative = Annotated[float, Range(low=0.0)]
Count = Annotated[int, Range(low=1.0)]


def checked(factories: Sequence[Callable[..., Any]], values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`values` as the factories' arguments. ValueError names the key, the value and what is allowed."""
    hints = {name: hint for factory in factories for name, hint in parameters_of(factory).items()}
    for key in values:
        if key not in hints:
            raise UserError(
                f"{where}: unknown hyper-parameter {key!r} (given {values[key]!r}); "
                f"{suggestion(key, hints)}allowed: {', '.join(hints) or 'none'}"
            )
    return {key: _check(value, hints[key], f"{where}: {key}") for key, value in values.items()}


def suggestion(given: str, allowed: Iterable[str]) -> str:
    """The allowed name that was probably meant, as a question to stand before the list of all; or nothing."""
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f"did you mean {near[0]}? " if near else ""


def parameters_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Name and annotated type of each argument, in order."""
    hints = get_type_hints(factory, include_extras=True)
    return {name: hints[name] for name in inspect.signature(factory).parameters}


def require_types(factory: Callable[..., Any], *, where: str) -> None:
    """Refuse a factory of whose arguments one has no type, or one that no check knows.

    Raises:
      ValueError: naming the argument and what is allowed.
    """
    try:
        hints = get_type_hints(factory, include_extras=True)
    except NameError as error:
        raise UserError(f"{where}: {error}, in the type of an argument") from error
    for name in inspect.signature(factory).parameters:
        try:
            allowed_values(hints[name])
        except (KeyError, TypeError) as error:
            found = f"the type {hints[name]}" if name in hints else "no type"
            raise UserError(
                f"{where}: {name} has {found}; allowed: float, int, bool, a Literal, Annotated with a Range, "
                f"or several of them, as in {name}: float = 0.1"
            ) from error


def allowed_values(hint: Any) -> str:
    """What a type with its range accepts, in words."""
    if get_origin(hint) is Annotated:
        kind, span = get_args(hint)
        words = "an integer" if kind is int else "a number"
        return words if str(span) == "any" else f"{words} {span}"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(allowed_values(part) for part in get_args(hint))
    return {bool: "true or false", NoneType: "null", int: "an integer", float: "a number"}[hint]


def _check(value: Any, hint: Any, where: str) -> Any:
    if not _accepts(value, hint):
        kind = type(value).__name__
        raise UserError(f"{where} is {value!r} ({kind}); allowed: {allowed_values(hint)}")
    is_real = (
        isinstance(value, int) and not isinstance(value, bool) and not _accepts_exactly(value, hint, int)
    )
    return float(value) if is_real else value


def _accepts(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_accepts(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if get_origin(hint) is Annotated:
        kind, span = get_args(hint)
        return _accepts(value, kind) and value in span
    if hint is bool:
        return isinstance(value, bool)
    if hint is NoneType:
        return value is None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (hint is float or isinstance(value, int))


def _accepts_exactly(value: Any, hint: Any, kind: type) -> bool:
    """Whether some alternative of the hint is of this very type and takes the value."""
    if get_origin(hint) in (Union, UnionType):
        return any(_accepts_exactly(value, part, kind) for part in get_args(hint))
    if get_origin(hint) is Annotated:
        return get_args(hint)[0] is kind and _accepts(value, hint)
    return hint is kind
