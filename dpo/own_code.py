"""Functions of the user's own, named as `module:function`: the only place where their code is imported.

The working directory is no place that Python imports from while a command of this project runs: what lies
in it may have been downloaded. It becomes the last one while the module that the user names is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo.outcomes import UserError


def import_function(
    name: str, *, setting: str, allowed: str = "(prompt, response) to a number"
) -> Callable[..., Any]:
    """The function that `module:function` names; its module is looked for here after everywhere else.

    What the function itself imports while it runs is no longer looked for in the working directory.

    Raises:
      ValueError: when there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        with _working_directory_last():
            found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{setting} {name!r}: {error}; it must be importable from {Path.cwd()}") from error
    if not callable(found):
        raise UserError(f"{setting} {name!r} is not a function; allowed: {allowed}")
    return found


def fingerprint_code(function: Callable[..., Any]) -> str:
    """Of the file that a function stands in, or of its own text in a notebook; of nothing without either."""
    content, function = b"", inspect.unwrap(function)
    with suppress(TypeError, OSError):
        path = Path(inspect.getsourcefile(function) or "")
        content = path.read_bytes() if path.is_file() else inspect.getsource(function).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def require_own_word(name: str, *, setting: str, arguments: Sequence[str]) -> None:
    """Refuse a function that is named in a settings file alone: importing it runs what may be others' code.

    Raises:
      ValueError: when `--SETTING` is not among the arguments of the command.
    """
    option = f"--{setting}"
    if not any(argument == option or argument.startswith(f"{option}=") for argument in arguments):
        raise _in_a_file_alone(name, setting, f"{option}={name}")


def require_own_word_for_objectives(
    terms: Sequence[Mapping[str, Any]], *, arguments: Sequence[str], as_said: str = "--objective.name={}"
) -> None:
    """Refuse an objective `module:function` that no option of the command line names, as a judge is refused.

    Raises:
      ValueError: naming the objective and the option to say it with, `as_said` with the name in it.
    """
    pairs = zip(arguments, [*arguments, ""][1:], strict=True)
    spoken = [f"{option} {value}" for option, value in pairs if option.startswith("--objective")]
    for name in (str(term.get("name")) for term in terms):
        if ":" in name and not any(name in words for words in spoken):
            option = as_said.format(name)
            raise _in_a_file_alone(name, option.strip("-").partition("=")[0], option)


def _in_a_file_alone(name: str, setting: str, option: str) -> UserError:
    return UserError(
        f"{setting} is {name!r} in a settings file; a function's module is code that would run, so it "
        f"has to be said on the command line: {option}"
    )


@contextmanager
def _working_directory_last() -> Iterator[None]:
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        places = [place for place, path in enumerate(sys.path) if path == here]
        if places:
            del sys.path[places[-1]]
