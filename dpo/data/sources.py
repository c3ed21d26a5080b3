"""Rows of files and data sets, each with where it stands."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo.data.csv_rows import csv_rows
from dpo.data.data_sets import fingerprint_data_set, open_data_set, row_without_nulls
from dpo.data.gzip_bytes import GzipBytes
from dpo.data.json_text import DuplicateKeyError, begins_a_list, decode, describe, list_rows
from dpo.data.malformed import MalformedRowError
from dpo.data.parquet_rows import parquet_length, parquet_rows
from dpo.distribution import find_data
from dpo.outcomes import UserError, told_by
from dpo.regular_files import is_there
from dpo.text_encoding import require_utf8

MAX_ROW_BYTES = 1 << 26
"""Longest line that is read: without a limit a small compressed file could fill the memory."""
MAX_PART_BYTES = 1 << 28
"""Of JSON lines in one part but for its last line: a small compressed file has many long ones."""
MAX_WHOLE_BYTES = 1 << 30
"""Of rows of JSON lines in memory at once: a win-rate's, and neighbours that may be one preference."""
FOR_NEIGHBOURS = "several files, or rows that have all responses to a prompt"
"""What helps where neighbouring rows may be one preference and are too long together."""
MAX_BLANK_LINES = 1 << 20
"""Blank lines behind each other; a small compressed file could have them without end."""
MAX_BLANK_BYTES = MAX_PART_BYTES
"""Bytes of them: they may be long."""

_BUFFER = 1 << 17


class Part(NamedTuple):
    """Some rows of a source, one after the other."""

    offset: int = 0
    """Where the first one is: bytes before it in JSON lines, rows before it elsewhere."""
    number: int = 1
    """The first one's line or row."""
    rows: int | None = None
    """How many; None is all that follow."""
    size: int | None = None
    """What the source must measure to be the one that was cut; None is anything."""
    end: int | None = None
    """Where the part that follows begins; None where it is not known."""


def read_rows(source: str, split: str, part: Part) -> Iterator[tuple[str, Any]]:
    """The rows of a part with their locations. A row that cannot be decoded comes as the error that says so.

    Raises:
      ValueError: when there is no such source, it cannot be read, or it is not the one that was cut.
    """
    opened = _open(source, split)
    if part.size is not None and (size := opened.size()) != part.size:
        raise UserError(
            f"{source}: {size} {opened.unit} in this process and {part.size} in process 0; allowed is "
            "the same data everywhere"
        )
    return islice(opened.read(part), part.rows)


def cut(source: str, split: str, *, count: int, limit: int | None = None) -> list[Part]:
    """The first `limit` rows of a source as `count` parts in order, which differ by at most one row.

    A file of JSON lines is looked through for where lines end, without decoding them.
    """
    starts, size = _find_starts(source, split, limit)
    return _parts(starts, [len(starts) * i // count for i in range(count + 1)], size)


def cut_whole(source: str, split: str, *, limit: int | None, helps: str) -> Part:
    """The first `limit` rows of a source in one part, which will be in memory all at once: `UserError` where
    they are lines of more than `MAX_WHOLE_BYTES` together, as a small gzip file may hold."""
    starts, size = _find_starts(source, split, limit)
    if len(starts) and starts[-1, 0] - starts[0, 0] > MAX_WHOLE_BYTES:
        raise UserError(f"{source}: more than {MAX_WHOLE_BYTES} bytes of rows in memory; allowed: {helps}")
    return _parts(starts, [0, len(starts)], size)[0]


def cut_every(source: str, split: str, *, rows: int, limit: int | None = None) -> list[Part]:
    """The first `limit` rows of a source as parts of so many rows, of which the last has what is left.

    Parts of long rows, where these are known beforehand, have fewer (`MAX_PART_BYTES`).
    """
    starts, size = _find_starts(source, split, limit)
    borders = [0]
    while borders[-1] < len(starts):
        most = np.searchsorted(starts[:, 0], starts[borders[-1], 0] + MAX_PART_BYTES, side="right")
        borders.append(min(borders[-1] + rows, int(most)))
    return _parts(starts, borders, size)


def _find_starts(source: str, split: str, limit: int | None) -> tuple[Int[np.ndarray, "n 2"], int]:
    """Offset and number of every row, and the size of the source."""
    opened = _open(source, split)
    return np.fromiter(islice(opened.starts(), limit), dtype=np.dtype((np.int64, 2))), opened.size()


def _parts(starts: Int[np.ndarray, "n 2"], borders: Sequence[int], size: int) -> list[Part]:
    """The parts between one border and the next."""
    places = [(int(starts[b, 0]), int(starts[b, 1])) if b < len(starts) else None for b in borders]
    return [
        Part(*(here or (0, 1)), stop - start, size, following and following[0])
        for (here, start), (following, stop) in pairwise(zip(places, borders, strict=True))
    ]


def is_file_name(source: str) -> bool:
    """Whether a source can only be a file, by its ending; others may be directories or on the hub."""
    return source.endswith((*_READERS, ".jsonl.gz"))


def has_splits(source: str) -> bool:
    """Whether a source may be cut into named parts: no file is, and no single table that was saved."""
    path = Path(find_data(source))
    is_one_table = (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file()
    return not (path.is_file() or is_file_name(source) or is_one_table)


def is_read_whole(source: str) -> bool:
    """Whether a part of a source takes reading all of it: a file of JSON, which may be one list."""
    return source.endswith(".json")


def fingerprint_rows(source: str, split: str) -> str:
    """SHA-256 of what a source holds: the bytes of a file, or the values of a data set's columns.

    Raises:
      ValueError: when there is no such source, or it cannot be read.
    """
    return _open(source, split).fingerprint()


class _Source(NamedTuple):
    """How one kind of source is read."""

    read: Callable[[Part], Iterator[tuple[str, Any]]]
    """Rows from where a part begins to the end."""
    starts: Callable[[], Iterable[tuple[int, int]]]
    """Offset and number of every row."""
    size: Callable[[], int]
    unit: str
    fingerprint: Callable[[], str]


def _open(source: str, split: str) -> _Source:
    path = Path(find_data(source))
    suffix = ".jsonl" if path.name.endswith(".jsonl.gz") else path.suffix
    if not path.is_dir() and is_there(path):
        if suffix not in _READERS:
            allowed = ", ".join(_READERS)
            raise UserError(f"{source}: a file ending in {suffix!r}; allowed are {allowed} (and .jsonl.gz)")
        read, starts = _READERS[suffix]
        return _Source(
            lambda part: read(path, part),
            lambda: starts(path),
            lambda: path.stat().st_size,
            "bytes",
            lambda: _fingerprint_file(path),
        )
    _refuse_parts_of_a_file(source)
    looks_local = suffix in _READERS or path.is_absolute() or source.startswith((".", "~"))
    if looks_local and not any(Path(name).is_dir() for name in (path, source.partition(":")[0])):
        raise UserError(f"{source}: no such file or directory (the working directory is {Path.cwd()})")
    data_set = cache(lambda: open_data_set(source, split))
    return _Source(
        lambda part: _rows_of(data_set, source, part),
        lambda: _each_row(len(data_set())),
        lambda: len(data_set()),
        "rows",
        lambda: fingerprint_data_set(data_set()),
    )


def _refuse_parts_of_a_file(source: str) -> None:
    """A subset and a revision are a hub data set's, and what is named before them is not asked for there."""
    named = source.partition("@")[0].partition(":")[0]
    is_file = Path(named).is_file() or (is_file_name(named) and not Path(named).is_dir())
    if named != source and is_file:
        raise UserError(
            f"{source}: {named} is the name of a file, which has no subset (:) and no revision (@); allowed "
            f"is {named} alone"
        )


def _fingerprint_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_json_lines(path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    for _, number, line in _lines(path, part):
        yield f"{path}:{number}", _decode_json(line)


def _line_starts(path: Path) -> Iterator[tuple[int, int]]:
    return ((offset, number) for offset, number, _ in _lines(path, Part()))


def _lines(path: Path, part: Part) -> Iterator[tuple[int, int, bytes]]:
    """Lines that are not blank, each with the bytes before it and its number."""
    try:
        with _open_lines(path) as file:
            if part.offset == 0:
                require_utf8(path, file.peek(4))
            offset = file.seek(part.offset) if file.seekable() else _skip(file, part.offset)
            lines = iter(lambda: file.readline(MAX_ROW_BYTES + 1), b"")
            last, end = part.number, offset
            for number, line in enumerate(lines, start=part.number):
                if len(line) > MAX_ROW_BYTES:
                    raise UserError(f"{path}:{number}: a line of more than {MAX_ROW_BYTES} bytes")
                offset += len(line)
                if not line.isspace():
                    last, end = number, offset
                    yield offset - len(line), number, line
                elif number - last > MAX_BLANK_LINES or offset - end > MAX_BLANK_BYTES:
                    raise UserError(
                        f"{path}:{number}: more than {MAX_BLANK_LINES} blank lines, or {MAX_BLANK_BYTES} "
                        "bytes of them"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _open_lines(path: Path) -> io.BufferedReader:
    return io.BufferedReader(GzipBytes(path), _BUFFER) if path.suffix == ".gz" else path.open("rb")


def _skip(file: io.BufferedReader, count: int) -> int:
    """Pass so many bytes, or all that there are; how many that were."""
    left = count
    while left and (passed := len(file.read(min(left, _BUFFER)))):
        left -= passed
    return count - left


def _read_json(path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    """One JSON list of rows; anything else is taken for JSON lines."""
    if not begins_a_list(path):
        _refuse_one_object(path)
        yield from _read_json_lines(path, part)
        return
    for number, row in enumerate(
        islice(list_rows(path, most=MAX_ROW_BYTES), part.offset, None), start=part.number
    ):
        yield f"{path}:{number}", row


def _refuse_one_object(path: Path) -> None:
    """An object over many lines is no row a line: each would be named as malformed."""
    _, number, line = next(_lines(path, Part()), (0, 0, b"{}"))
    text = line.removeprefix(codecs.BOM_UTF8).strip()
    if text.startswith(b"{") and b"}" not in text and b"]" not in text:
        raise UserError(
            f"{path}:{number}: an object over several lines; allowed is a list of rows, [{{…}}, {{…}}], or "
            "one row a line"
        )


def _json_starts(path: Path) -> Iterator[tuple[int, int]]:
    if not begins_a_list(path):
        return _line_starts(path)
    return ((row, row + 1) for row, _ in enumerate(list_rows(path, most=MAX_ROW_BYTES)))


def _each_row(count: int) -> Iterator[tuple[int, int]]:
    return ((row, row + 1) for row in range(count))


def _decode_json(line: bytes) -> Any:
    try:
        return decode(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return MalformedRowError(
            "(row)", "invalid_unicode", f"byte {error.start} is not UTF-8; allowed is UTF-8"
        )
    except (ValueError, RecursionError) as error:
        at = f"not JSON at character {error.pos + 1}: " if isinstance(error, json.JSONDecodeError) else ""
        reason = "duplicate_key" if isinstance(error, DuplicateKeyError) else "invalid_json"
        detail = f"{at}{describe(error)}; allowed is one JSON object a line"
        return MalformedRowError("(row)", reason, detail)


def _read_parquet(path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(parquet_rows(path, part.offset), start=part.number):
        yield f"{path}:{number}", row


def _read_csv(path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    for line, row in islice(csv_rows(path, most=MAX_ROW_BYTES, blank=MAX_BLANK_LINES), part.offset, None):
        yield f"{path}:{line}", row


def _csv_starts(path: Path) -> Iterator[tuple[int, int]]:
    return (
        (row, line) for row, (line, _) in enumerate(csv_rows(path, most=MAX_ROW_BYTES, blank=MAX_BLANK_LINES))
    )


def _read_table(path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    return _rows_of(lambda: _open_table(path), str(path), part)


def _table_starts(path: Path) -> Iterator[tuple[int, int]]:
    return _each_row(len(_open_table(path)))


def _open_table(path: Path) -> Any:
    return open_data_set("arrow", "train", data_files=str(path), name=str(path))


_READERS: dict[
    str,
    tuple[Callable[[Path, Part], Iterator[tuple[str, Any]]], Callable[[Path], Iterator[tuple[int, int]]]],
] = {
    ".jsonl": (_read_json_lines, _line_starts),
    ".json": (_read_json, _json_starts),
    ".parquet": (_read_parquet, lambda path: _each_row(parquet_length(path))),
    ".csv": (_read_csv, _csv_starts),
    ".tsv": (_read_csv, _csv_starts),
    ".arrow": (_read_table, _table_starts),
}


def _rows_of(open_it: Callable[[], Any], name: str, part: Part) -> Iterator[tuple[str, Any]]:
    rows, number = open_it(), part.number - 1
    try:
        for number, row in enumerate(rows.skip(part.offset) if part.offset else rows, start=part.number):
            yield f"{name}:{number}", row_without_nulls(row)
    except Exception as error:  # of a library, about a value that a stranger wrote
        what = f"{name}:{number + 1}: a value of this row cannot be read"
        raise UserError(f"{what}: {told_by(error)}") from error
