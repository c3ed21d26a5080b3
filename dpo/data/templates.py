"""Templates that others wrote (a tokenizer's chat template, a judge's prompt), where they can do no harm.

jinja2's immutable sandbox keeps a template away from Python. It does not keep it from running for ever or
from filling memory: two nested loops or `{{ "x" * 10 ** 10 }}` are enough, and what is one call into C no
handler in this process could interrupt. So templates are rendered by a process of their own
(`template_worker`), whose CPU time, memory and output are capped, which may not write files and sees none of
the environment's secrets. It is started with the first template and serves all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo.outcomes import UserError
from dpo.regular_files import require_regular
from dpo.text_encoding import require_utf8_file

MAX_TEMPLATE = 1_000_000
"""Characters of a template; the longest chat templates have some ten thousand."""


TEMPLATE_DATE = "2024-07-26"
"""What `strftime_now` in a chat template takes for today: the date that Llama 3.2's template falls back on.

The day on which a program runs would make other tokens, and with them another run, of the same data.
"""


class Limits(NamedTuple):
    """How much rendering may take."""

    seconds: float = 5.0
    """Seconds of CPU time that rendering one text may take."""
    characters: int = 100_000
    """Characters that a rendered text may have beside twice those that it is made of."""
    texts: int = 64
    """So many times `characters` all texts that are rendered in one go may have, beside the same."""


LIMITS = Limits()
MEMORY = 1 << 30
"""Bytes of address space that the process that renders may take."""
PATIENCE = 60.0
"""Seconds of wall-clock time for one text beyond its CPU time, after which the process is taken for dead."""

SECONDS_A_TEXT = 0.005
"""Of CPU time that all texts which are rendered in one go may take, beside those that one may take."""
CHARACTERS_A_SECOND = 1_000_000
"""Of what they are made of, for each of which one more second is given."""
_GROUP = 64
_GROUP_CHARACTERS = 1 << 20
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")


class TemplateLimitError(UserError):
    """A template needed more than `Limits`, or ended the process that renders it."""


class Refusal(NamedTuple):
    """A template raised an error for one input, by its own will or by a mistake."""

    reason: str


class Marked(NamedTuple):
    """A text, and the places in it that its template marks as the assistant's, in characters."""

    text: str
    marks: list[tuple[int, int]]


class SandboxedTemplate:
    """A jinja2 template, checked when it is made."""

    def __init__(
        self,
        text: str,
        *,
        name: str,
        dialect: Literal["chat", "judge"] = "chat",
        date: str = TEMPLATE_DATE,
        limits: Limits = LIMITS,
        setting: str = "",
    ) -> None:
        """`name` says in errors what the template is, and `setting` what raises its limit of characters.

        The dialect "chat" is that of transformers' chat templates, on the given date (YYYY-MM-DD); in "judge"
        a variable that is not there is an error.

        Raises:
          ValueError: when the text is no template.
          TemplateLimitError: when it is longer than MAX_TEMPLATE, or compiling it is beyond the limits.
        """
        self.text, self._name, self._limits = text, name, limits
        self._remedy = f"; {setting} allows more, if the template is to be trusted" if setting else ""
        self._kind = {"dialect": dialect, "date": date}
        if len(text) > MAX_TEMPLATE:
            raise TemplateLimitError(f"{name} has {len(text)} characters; allowed are {MAX_TEMPLATE}")
        self.render_all([])

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for one set of variables, which hold JSON's types only.

        Raises:
          ValueError: when the template raises an error.
          TemplateLimitError: when it is beyond the limits.
        """
        (rendered,) = self.render_all([variables])
        if isinstance(rendered, Refusal):
            raise UserError(f"{self._name}: {rendered.reason}")
        return rendered

    def render_all(self, inputs: Sequence[Mapping[str, Any]]) -> list[str | Refusal]:
        """The text, or the template's error, for every set of variables.

        Raises:
          TemplateLimitError: when one of them is beyond the limits.
        """
        return [found if isinstance(found, Refusal) else found.text for found in self.render_marked(inputs)]

    def render_marked(self, inputs: Sequence[Mapping[str, Any]]) -> list[Marked | Refusal]:
        """The same with the places of what the template marks by `{% generation %}`."""
        lines = [json.dumps(variables) for variables in inputs]
        found: list[Marked | Refusal] = []
        left = self._limits.texts * self._limits.characters
        together = self._limits.seconds + SECONDS_A_TEXT * len(lines)
        together += sum(map(len, lines)) / CHARACTERS_A_SECOND
        seconds = together
        for group in _groups(lines):
            answers, spent = self._ask(group, left=seconds, together=together)
            found += answers
            seconds -= spent
            left += 2 * sum(map(len, group))
            left -= sum(len(answer.text) for answer in answers if isinstance(answer, Marked))
            if left < 0:
                most = self._limits.texts * self._limits.characters
                what = f"it wrote more than {most} characters for {len(inputs)} texts"
                raise TemplateLimitError(f"{self._name} is refused: {what}{self._remedy}")
        return found

    def _ask(
        self, inputs: Sequence[str], *, left: float, together: float
    ) -> tuple[list[Marked | Refusal], float]:
        """The answers, and the seconds that they took of those that are left."""
        settings = {"template": self.text, **self._kind, **self._limits._asdict()}
        settings |= {"sizes": list(map(len, inputs)), "left": left, "together": together}
        request = f'{json.dumps(settings)[:-1]}, "inputs": [{", ".join(inputs)}]}}\n'
        patience = self._limits.seconds + PATIENCE
        compiled, *answers = _WORKER.ask(request, num_inputs=len(inputs), patience=patience)
        last = [compiled, *answers][-1]
        if last.get("limit"):
            remedy = self._remedy if "characters" in last["error"] else ""
            raise TemplateLimitError(f"{self._name} is refused: {last['error']}{remedy}")
        if "error" in compiled:
            raise UserError(f"{self._name}: {compiled['error']}")
        found = [
            Marked(answer["text"], [(start, end) for start, end in answer.get("marks", ())])
            if "text" in answer
            else Refusal(answer["error"])
            for answer in answers
        ]
        return found, last.get("spent", 0.0)


_MAX_FILE = 1 << 22
"""Bytes of a template file that is read."""


def read_template(path: str | Path, *, name: str) -> str:
    """The text of a template file.

    Raises:
      ValueError: when it cannot be read, or is not UTF-8.
    """
    try:
        if require_regular(Path(path), name=f"{name} {path}").stat().st_size > _MAX_FILE:
            raise UserError(f"{name} {path}: has more than {_MAX_FILE} bytes")
        require_utf8_file(Path(path), name=f"{name} {path}")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} {path}: cannot be read: {error}; allowed is a UTF-8 file") from error


def _groups(lines: list[str]) -> Iterator[list[str]]:
    """Inputs that go in one request: there is always one group, and none grows large."""
    group: list[str] = []
    size = 0
    for line in lines:
        if group and (len(group) == _GROUP or size + len(line) > _GROUP_CHARACTERS):
            yield group
            group, size = [], 0
        group.append(line)
        size += len(line)
    yield group


class _EndedError(Exception):
    """The process that renders is gone, or silent; says how."""


class _Worker:
    """The process that renders: one request at a time, started when needed, replaced when it failed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: str, *, num_inputs: int, patience: float) -> list[dict[str, Any]]:
        """The answer for the template and, where that is well-formed, for each input up to a breach."""
        with self._lock:
            process = self._running()
            try:
                answers = _exchange(process, request, 1 + num_inputs, patience)
            except _EndedError as error:
                self.close()
                return [{"error": f"the process that renders it {error}", "limit": True}]
            except BaseException:
                self.close()  # an answer may be on its way
                raise
            if answers[-1].get("limit"):
                self.close()
            return answers

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a parent's is not ours to end
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py")), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
                cwd="/",
                start_new_session=True,
            )
        return self._process


def _exchange(
    process: subprocess.Popen[bytes], request: str, most: int, patience: float
) -> list[dict[str, Any]]:
    """Send a request, and read up to `most` answers: fewer after an error of the template, or a limit."""
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode("ascii"))
        process.stdin.flush()
    except BrokenPipeError:
        raise _EndedError(_how(process)) from None
    answers: list[dict[str, Any]] = []
    for line in _lines(process, patience):
        answers.append(json.loads(line))
        if len(answers) == most or "error" in answers[0] or answers[-1].get("limit"):
            return answers
    raise _EndedError(_how(process))


def _lines(process: subprocess.Popen[bytes], patience: float) -> Iterator[bytes]:
    """Lines that the process writes until it ends; `patience` is the longest silence."""
    assert process.stdout is not None
    rest: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        last = time.monotonic()
        while new := _read(process.stdout.fileno(), selector, last + patience - time.monotonic()):
            *lines, end = new.split(b"\n")
            for line in lines:
                yield b"".join((*rest, line))
                rest, last = [], time.monotonic()
            rest.append(end)


def _read(pipe: int, selector: selectors.BaseSelector, seconds: float) -> bytes:
    if seconds <= 0 or not selector.select(seconds):
        raise _EndedError("does not answer")
    return os.read(pipe, 1 << 20)


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process that closed its output came to its end."""
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return "stopped writing"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


_WORKER = _Worker()
atexit.register(_WORKER.close)
