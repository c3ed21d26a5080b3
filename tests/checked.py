"""Types are checked by beartype from a function's first call on: most functions of a worker are never called.

jaxtyping hands over functions that hold a signature and no work. Decorating one costs a millisecond, and the
package has four thousand with two signatures each, some of them made anew with every objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

_checkers: dict[tuple[Any, ...], Callable[..., Any]] = {}


def typechecked(signature: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked by beartype, which looks at its hints as soon as it is called."""
    checker: Callable[..., Any] | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checker
        if checker is None:
            checker = _checker(signature)
        return checker(*args, **kwargs)

    return check


def _checker(signature: Callable[..., Any]) -> Callable[..., Any]:
    """One for all functions of the same name, parameters and hints: closures that a factory makes anew."""
    key = _key(signature)
    if key not in _checkers:
        _checkers[key] = beartype(signature)
    return _checkers[key]


def _key(signature: Callable[..., Any]) -> tuple[Any, ...]:
    code = signature.__code__
    hints = signature.__annotations__.items()
    key = (
        *(signature.__module__, signature.__qualname__, code.co_varnames, code.co_flags),
        *(code.co_argcount, code.co_posonlyargcount, len(signature.__defaults__ or ())),
        *(frozenset(signature.__kwdefaults__ or ()), *hints),
    )
    try:
        hash(key)
    except TypeError:  # a hint that holds a list or a dictionary
        return (signature,)
    return key
