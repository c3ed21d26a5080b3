"""Rows of CSV and TSV files, as text, with the lines that they begin on."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo.data.malformed import MalformedRowError
from dpo.outcomes import UserError
from dpo.text_encoding import require_utf8_file


def csv_rows(path: Path, *, most: int, blank: int) -> Iterator[tuple[int, Any]]:
    """Rows of text with the lines that they begin on; "4" is no number here, "None" and "NA" are no nulls.

    Tabs part the values of a file whose name ends in .tsv, commas those of any other. A column without a
    name, as indices and ends of lines have it, is called by its place: "column 1".

    Raises:
      UserError: when the file cannot be read, its values are parted by something else, or a row has more than
        `most` characters, or when more than `blank` lines behind each other are blank.
    """
    delimiter = "\t" if path.suffix == ".tsv" else ","
    csv.field_size_limit(most)
    try:
        require_utf8_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _RowLines(path, file, most)
            rows = csv.reader(lines, strict=True, delimiter=delimiter)
            names = next(rows, [])
            _require_parted(path, names, delimiter)
            names = [name if name.strip() else f"column {i}" for i, name in enumerate(names, start=1)]
            if len(set(names)) < len(names):
                raise UserError(f"{path}:1: a column's name stands there twice; allowed is once")
            line, in_a_row = rows.line_num + 1, 0
            for row in rows:
                lines.left = most
                in_a_row = 0 if row else in_a_row + 1
                if row:
                    yield line, _named(names, row)
                elif in_a_row > blank:
                    raise UserError(f"{path}:{line}: more than {blank} blank lines")
                line = rows.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}; allowed is UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error


def _require_parted(path: Path, names: list[str], delimiter: str) -> None:
    """A first line that is one name with other separators in it is a file of another kind."""
    others = [other for other in ",;\t|" if other != delimiter and other in "".join(names)]
    if len(names) == 1 and others:
        raise UserError(
            f"{path}:1: one column, named {names[0][:200]!r}: {others[0]!r} seems to part its values; "
            "allowed is ',', or a tab in a file whose name ends in .tsv"
        )


class _RowLines:
    """The lines of a CSV file, of which those of one row have a limit: a quote may open and never close."""

    def __init__(self, path: Path, file: io.TextIOBase, most: int) -> None:
        self._path, self._file, self._most = path, file, most
        self.left = most

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise UserError(f"{self._path}: a row of more than {self._most} characters")
        if not line:
            raise StopIteration
        return line


def _named(names: list[str], row: list[str]) -> Any:
    if len(row) != len(names):
        detail = f"has {len(row)} values; allowed are {len(names)}, as many as the first line has names"
        return MalformedRowError("(row)", "length_mismatch", detail)
    return dict(zip(names, row, strict=True))
