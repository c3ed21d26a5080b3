"""Everything that a command prints passes here: texts of data, models and servers show, and none acts.

`guarded_output` puts a guard before standard output and standard error for the time of a command. What other
libraries print, log or warn passes it too, and so does a traceback. Rich, which writes the terminal's own
commands (colours, the progress bar), goes around it through `console`, which shows the text of every piece
in the same way. A last resort it is not: code of C libraries that writes to the descriptor is not seen.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from dpo.hidden import cut_secrets

LONGEST_LINE = 2000
MOST_LINES = 60
"""What an error may take of a terminal: names come from files, and a file can be full of them."""
_OF_A_BAR = re.compile(r"(?:\x1b\[A)+")
"""What tqdm writes to draw in a line above."""


def plural(count: int, what: str) -> str:
    """A number of things in words: 1 row, 2 rows."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def show_controls(text: str) -> str:
    """The text with control characters as symbols (␛ for escape), line ends and tabs as they are.

    What turns the direction of a line, ends one or hides shows by its number, ⟨U+202E⟩; so does half of a
    surrogate pair, which cannot be written at all. The environment's secrets do not show.
    """
    return _ACTS.sub(_show, cut_secrets(text))


def _show(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 32 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return "\ufffd" if code < 0xA0 else f"⟨U+{code:04X}⟩"


_ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""C0 and C1; marks, embeddings, overrides and isolates of direction; separators of lines and paragraphs; what
has no width and no use in a line; halves of pairs; tags. Joiners stay: scripts and emoji need them."""


class Sink:
    """A text stream that never fails. Once nobody takes what is written, it goes nowhere.

    What is said is never a reason to end. `failure` is why the first of it was not taken, where somebody may
    miss it: a disk that is full, no reader that has gone (a closed pipe, a lost terminal).
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self.failure is None and not reader_has_gone(self.stream, error):
            self.failure = error
        lead_nowhere(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Guard:
    """A text stream whose control characters show. What a progress bar begins its line with stays."""

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = Sink(stream)
        """By this name Rich finds the stream itself; `console` guards what it prints."""

    def write(self, text: str) -> int:
        stream = self.rich_proxied_file
        if _OF_A_BAR.fullmatch(text):
            return stream.write(text)
        start = "\r" if text.startswith("\r") else ""
        shown = start + show_controls(text[len(start) :])
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def reader_has_gone(stream: Any, error: OSError) -> bool:
    """Whether who was to take what a stream says has gone: a closed pipe, a lost terminal."""
    if error.errno in (errno.EPIPE, errno.ECONNRESET):
        return True
    try:
        return error.errno == errno.EIO and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False


def lead_nowhere(stream: Any) -> None:
    """Let what is written to a stream from here on be dropped, and what waits in it."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
            stream.flush()
        finally:
            os.close(nowhere)


class _ShownConsole(Console):
    @property
    def file(self) -> Any:
        """The stream below all guards; Rich looks below one only, and its own is on top of a live bar."""
        stream = self._file or (sys.stderr if self.stderr else sys.stdout)
        while (below := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = below
        return stream if isinstance(stream, Sink) else Sink(stream)

    @file.setter
    def file(self, new_file: Any) -> None:
        self._file = new_file

    def print(self, *objects: Any, **how: Any) -> None:
        """Rich would leave some control characters of a plain text out without a word."""
        super().print(*(show_controls(one) if isinstance(one, str) else one for one in objects), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield Segment(show_controls(segment.text), segment.style)


def console(**settings: Any) -> Console:
    """Rich's console, which shows the control characters of whatever it prints."""
    return _ShownConsole(**settings)


def print_plain(text: str) -> None:
    """Lines to standard output as they are, without markup; control characters show as symbols."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Standard output and standard error behind a guard; as they were afterwards."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (one if isinstance(one, Guard) or one is None else Guard(one) for one in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unguarded(stream: Any) -> Any:
    """The stream behind the guard: for what is no terminal and wants the text as it is."""
    return stream.rich_proxied_file.stream if isinstance(stream, Guard) else stream


def unprinted() -> OSError | None:
    """Why standard output was not taken, where somebody may miss what was printed."""
    if not isinstance(sys.stdout, Guard):
        return None
    sys.stdout.flush()
    return sys.stdout.failure


def shortened(text: str) -> str:
    """An error's text in what a terminal holds: long lines lose their middle, many lines those after."""
    lines = text.split("\n")
    more = [f"  and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
    return "\n".join([*map(_shorten_line, lines[:MOST_LINES]), *more])


def _shorten_line(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    half = LONGEST_LINE // 2
    return f"{line[:half]} … ({len(line) - 2 * half} characters) … {line[-half:]}"
