"""JSON of rows: a decoder that takes no key twice, and a file that is one list, read value by value."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo.outcomes import UserError
from dpo.text_encoding import require_utf8


def begins_a_list(path: Path) -> bool:
    """Whether the first thing in a file is a JSON list.

    Raises:
      UserError: for a file that cannot be read, or is of another encoding than UTF-8.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(_WINDOW)
            require_utf8(path, beginning)
            return beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def list_rows(path: Path, *, most: int) -> Iterator[Any]:
    """The values of a file that is one JSON list; of its text only what the next one needs is in memory.

    Raises:
      UserError: for what is no such list, or has a value of more than `most` characters.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = _Text(path, file, most)
            text.skip("[")
            mark = text.next()
            while mark != "]":
                yield text.value()
                mark = text.next()
                if mark != "]":
                    text.skip(",")
            text.skip("]")
            if text.next():
                raise text.wrong("Extra data", 0)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


class _Text:
    """The text of a JSON file from one place on."""

    def __init__(self, path: Path, file: io.TextIOBase, most: int) -> None:
        self._path, self._file, self._most = path, file, most
        self._text, self._at, self._before = "", 0, 0

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def skip(self, mark: str) -> None:
        """Go behind a character that has to be the next one."""
        if self.next() != mark:
            raise self.wrong(f"Expecting {mark!r}", 0)
        self._at += 1

    def value(self) -> Any:
        """The next value; where the text that was read ends in it, it is tried again with twice as much."""
        while True:
            self.next()
            try:
                found, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self._at
                if not self._read_on():
                    raise self.wrong(error.msg, ahead) from error
                continue
            except (ValueError, RecursionError) as error:
                raise self.wrong(describe(error), 0) from error
            long = end - self._at
            if end + _CUT < len(self._text) or not self._read_on():
                self._at += long
                return found

    def _read_on(self) -> bool:
        """Whether there was more; what lies behind is let go."""
        rest = len(self._text) - self._at
        if rest > self._most:
            raise self.wrong(f"a row of more than {self._most} characters", 0)
        more = self._file.read(max(_WINDOW, rest))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def wrong(self, what: str, ahead: int) -> UserError:
        """What is said of a place so many characters ahead."""
        place = self._before + self._at + ahead + 1
        return UserError(f"{self._path}: not JSON at character {place}: {what}; allowed is a list of rows")


_WINDOW = 1 << 20
"""Characters of a JSON list that are read at a time."""
_CUT = len("e+")
"""Most characters of a number that can stand behind what is a number without them, as in 1e+ of 1e+14."""
_BLANK = re.compile(r"[ \t\n\r]*")


def describe(error: Exception) -> str:
    """What is wrong, in a few words."""
    return (error.msg if isinstance(error, json.JSONDecodeError) else str(error))[:160]


class DuplicateKeyError(ValueError):
    """A name that an object has twice; without it the last value would count in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(f"has {twice[:100]!r} twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Made once: to make one takes longer than to decode a row."""


def decode(text: str) -> Any:
    """What a JSON text says. Most lines have white space at their end alone, which need not be sought."""
    if text.startswith("{"):
        found, end = DECODER.raw_decode(text)
        if text[end:] in _LINE_ENDS:
            return found
    return DECODER.decode(text)


_LINE_ENDS = ("", "\n", "\r\n")
