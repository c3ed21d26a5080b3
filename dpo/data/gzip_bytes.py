"""The bytes of a gzip file, of which no stretch may be long that says nothing.

A file may consist of members that are all empty, or of one whose header has no end: Python's own reader goes
on through it, a piece of Python for each member or character, and a small part of a gigabyte takes minutes.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

from dpo.outcomes import UserError

MOST_SILENT = 1 << 20
"""Bytes of a file behind each other that may give no byte of text."""
_BLOCK = 1 << 14
"""Bytes that are read in one go: what follows a member is copied for the next one."""


class GzipBytes(io.RawIOBase):
    """What all members of a gzip file hold, one after the other; zeros behind them are let pass."""

    def __init__(self, path: Path) -> None:
        """Opens the file."""
        self._path, self._file = path, path.open("rb")
        self._decoder = zlib.decompressobj(wbits=31)
        self._left, self._silent, self._begun = b"", 0, False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes, as many as fit and are at hand; 0 at the end.

        Raises:
          UserError: for a file that says nothing for long.
          EOFError: for one that is cut off.
          zlib.error: for one that is no gzip file.
        """
        while data := self._left or self._file.read(_BLOCK):
            member = data if self._begun else data.lstrip(b"\0")
            if not member:
                self._left = b""
                self._be_silent(len(data))
                continue
            self._begun = True
            text = self._decoder.decompress(member, len(buffer))
            if self._decoder.eof:
                self._left, self._begun = self._decoder.unused_data, False
                self._decoder = zlib.decompressobj(wbits=31)
            else:
                self._left = self._decoder.unconsumed_tail
            if text:
                self._silent = 0
                buffer[: len(text)] = text
                return len(text)
            self._be_silent(len(data) - len(self._left))
        if self._begun:
            raise EOFError("its end is missing")
        return 0

    def _be_silent(self, count: int) -> None:
        self._silent += count
        if self._silent > MOST_SILENT:
            raise UserError(f"{self._path}: cannot be read: more than {MOST_SILENT} bytes that hold no text")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
