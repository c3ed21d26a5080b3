"""A JSONL file that a command adds to as it goes and reads again when it is started a second time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.files import require_same_file, without_locks, writing
from dpo.outcomes import UserError
from dpo.regular_files import is_there, require_regular

Line = Mapping[str, Any]
"""What a line holds: the "key", and what its command keeps under it."""


class Journal:
    """Lines by their "key", the newest of each; what was appended outlives the process."""

    def __init__(self, path: str | Path) -> None:
        """Open a journal, alone, and drop a last line that was cut off when its writer was killed.

        Raises:
          ValueError: while another process has it open, or for a damaged line.
          WriteError: when nothing can be written there.
        """
        self.path = Path(path)
        with writing("a journal", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_there(self.path)  # a pipe is waited for
            self._file = self.path.open("a", encoding="utf-8")
        try:
            self._lock()
            self.lines = read_lines(self.path, cut=True)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Line) -> None:
        """Add one line, which must have a "key"; raises `WriteError` where there is no room."""
        with writing("a line", self.path, note="the lines before it are kept"):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        require_same_file("a line", self._file, self.path)
        self.lines[line["key"]] = line

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path} is in use by another process; wait for it, stop it, or give another output"
            ) from error
        except OSError as error:
            raise without_locks(self.path.parent, error) or error from error

    def close(self) -> None:
        """Close the file; the lines stay readable. Raises `WriteError` where a line is on its way still."""
        with writing("a line", self.path, note="the lines before it are kept"):
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path, *, cut: bool = False) -> dict[str, Line]:
    """All whole lines of a journal by their key; `cut` removes a last line that is not whole from the file.

    Raises:
      ValueError: for any other line that is not a JSON object with a "key".
    """
    require_regular(path)
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if cut and whole < len(content):
        os.truncate(path, whole)
    lines: dict[str, Line] = {}
    for number, text in enumerate(content[:whole].splitlines(), start=1):
        try:
            line = json.loads(text)
            lines[line["key"]] = line
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path}:{number} is not a line of this journal ({error!r}); remove the line or the file"
            ) from error
    return lines
