"""Renders templates in a process of its own: `templates` starts this file, and nothing imports it.

Requests and answers are JSON, one a line. A request is answered by one line for the template and, where that
is well-formed, one line for each of its inputs:

    {"template", "dialect": "chat" | "judge", "date": what a chat template takes for today,
     "seconds", "characters", "together": seconds that all inputs of all requests may take,
     "left": those that were left,
     "inputs": [{variable: value}, ...], "sizes": characters of each of them}
    {"text", "marks": [[start, end], ...] of its blocks of {% generation %}, where it has any}
    or {"error", "limit": whether a limit was the reason}, and "spent": seconds of the inputs up to here

It runs without the rest of the project (a start takes a tenth of a second), may not write files, and has its
memory and, for every input anew, its CPU time capped by the kernel.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

GRACE = 1
"""Seconds of CPU time after the limit at which the kernel ends the process: one operation can run so long."""
LONGEST_MESSAGE = 500
MARK = ("\ufdd0", "\ufdd1")
"""Begin and end what the assistant says while a text is written: two of Unicode's noncharacters."""
_MARKS = re.compile(f"[{MARK[0]}{MARK[1]}]")
Fields = dict[str, Any]
"""An object of a request or of an answer to it, which are a line of JSON each."""


class _OutOfTimeError(BaseException):
    """Not an `Exception`, so that nothing between a template and the loop below takes it for its own."""


class _OutOfRoomError(Exception):
    """The text is longer than allowed."""


def main(memory: int) -> None:
    """Answer requests until standard input ends."""
    _give_up(resource.RLIMIT_AS, memory)
    _give_up(resource.RLIMIT_FSIZE, 0)
    _give_up(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for line in sys.stdin:
        for answer in _answers(json.loads(line)):
            print(json.dumps(answer), flush=True)


def _give_up(what: int, limit: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # a system without this limit, or with a lower one
        resource.setrlimit(what, (limit, limit))


def _out_of_time(number: int, frame: FrameType | None) -> NoReturn:
    raise _OutOfTimeError


def _answers(request: Fields) -> Iterator[Fields]:
    compiled = _limited(request, None)
    yield compiled
    begun = time.process_time()
    if "text" in compiled:
        for variables, size in zip(request["inputs"], request["sizes"], strict=True):
            answer = _limited(request, variables, size)
            spent = time.process_time() - begun
            if spent > request["left"] and not answer.get("limit"):
                what = f"all its texts together ran for more than {request['together']:.3g} s"
                answer = {"error": what, "limit": True}
            yield answer | {"spent": spent}


def _limited(request: Fields, variables: Fields | None, size: int = 0) -> Fields:
    """The answer to one input within the limits; without variables the template is compiled only."""
    seconds, characters = request["seconds"], request["characters"] + 2 * size
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError):  # beyond a limit that is there already
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + GRACE, most))
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            template = _compile(request["template"], request["dialect"], request["date"])
            return {"text": ""} if variables is None else _answer(_render(template, variables, characters))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _OutOfTimeError:
        return {"error": f"it ran for more than {seconds:g} s", "limit": True}
    except _OutOfRoomError:
        return {"error": f"it wrote more than {characters} characters", "limit": True}
    except MemoryError:
        return {"error": "it used more memory than it may", "limit": True}
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip() or 'raised without a word'}"
        return {"error": message[:LONGEST_MESSAGE], "limit": False}


def _render(template: jinja2.Template, variables: Fields, characters: int) -> str:
    pieces, left = [], characters
    for piece in template.generate(**variables):
        left -= len(piece)
        if left < 0:
            raise _OutOfRoomError
        pieces.append(piece)
    return "".join(pieces)


def _answer(text: str) -> Fields:
    """A text with the places in it that were marked, and without the marks."""
    if MARK[0] not in text:
        return {"text": text}
    pieces = _MARKS.split(text)
    ends = list(accumulate(map(len, pieces)))[:-1]
    if "".join(_MARKS.findall(text)) != "".join(MARK) * (len(ends) // 2):
        raise jinja2.TemplateError("blocks of {% generation %} lie in each other or are cut")
    return {"text": "".join(pieces), "marks": list(zip(ends[0::2], ends[1::2], strict=True))}


@lru_cache(maxsize=8)
def _compile(text: str, dialect: str, date: str) -> jinja2.Template:
    return _ENVIRONMENTS[dialect](date).from_string(text)


def _chat_environment(date: str) -> ImmutableSandboxedEnvironment:
    """As transformers sets it up on that date, so that a chat template writes here what it writes there."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": datetime.fromisoformat(date).strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _judge_environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True)


_ENVIRONMENTS = {"chat": _chat_environment, "judge": lambda _: _judge_environment()}


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says, and changes nothing else."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """The block as a call of its own content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_content"), [], [], body)
        block.set_lineno(line)
        return block

    def _content(self, caller: Macro) -> str:
        return f"{MARK[0]}{caller()}{MARK[1]}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own it does not escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that keeps no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name a value "self"
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name like {name!r}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
