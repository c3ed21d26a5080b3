"""Rows of files and data sets, each with where it stands: the only place that opens training data."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_ROW_BYTES = 1 << 26
"""Longest line that is read: without a limit a small compressed file could fill the memory."""


class MalformedRowError(ValueError):
    """A row that cannot be read: which field, a short countable reason, and what is allowed."""

    def __init__(self, field: str, reason: str, detail: str) -> None:
        super().__init__(f"field '{field}': {detail} [{reason}]")
        self.field, self.reason, self.detail = field, reason, detail


def read_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Every row with its location. A row that cannot be decoded comes as the error that says so."""
    path = Path(source)
    suffix = ".jsonl" if path.name.endswith(".jsonl.gz") else path.suffix
    if path.is_file():
        if suffix not in _READERS:
            allowed = ", ".join(_READERS)
            raise ValueError(f"{source}: a file ending in {suffix!r}; allowed are {allowed} (and .jsonl.gz)")
        return _READERS[suffix](path)
    looks_local = suffix in _READERS or path.is_absolute() or source.startswith((".", "~"))
    if looks_local and not path.is_dir():
        raise ValueError(f"{source}: no such file or directory (the working directory is {Path.cwd()})")
    return _read_data_set(source, split)


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            lines = iter(lambda: file.readline(MAX_ROW_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > MAX_ROW_BYTES:
                    raise ValueError(f"{path}:{number}: a line of more than {MAX_ROW_BYTES} bytes")
                if line.strip():
                    yield f"{path}:{number}", _decode_json(line)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON list of rows; anything else is taken for JSON lines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_json_lines(path)
        return
    rows = _decode_json(content)
    if isinstance(rows, MalformedRowError):
        raise ValueError(f"{path}: {rows.detail}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row


def _decode_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return MalformedRowError(
            "(row)", "invalid_unicode", f"byte {error.start} is not UTF-8; allowed is UTF-8"
        )
    except (ValueError, RecursionError) as error:
        return MalformedRowError(
            "(row)", "invalid_json", f"{str(error)[:120]}; allowed is one JSON object a line"
        )


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    builder = {".csv": "csv", ".arrow": "arrow"}[path.suffix]
    yield from _read_data_set(builder, "train", data_files=str(path), name=str(path))


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_table,
    ".arrow": _read_table,
}


def _read_data_set(
    source: str, split: str, *, data_files: str | None = None, name: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Anything `datasets.load_dataset` opens, and what `save_to_disk` wrote."""
    from datasets.exceptions import DatasetsError

    try:
        opened = _open_data_set(source, split, data_files)
    except (ValueError, OSError, DatasetsError) as error:
        what = f"{name or source} could not be opened as a data set (split {split!r})"
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
    for number, row in enumerate(opened, start=1):
        yield f"{name or source}:{number}", row


def _open_data_set(source: str, split: str, data_files: str | None) -> Iterable[Any]:
    import datasets

    if (Path(source) / "dataset_dict.json").is_file() or (Path(source) / "state.json").is_file():
        saved = datasets.load_from_disk(source)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"no split {split!r}; allowed are {', '.join(map(str, saved))}")
        return saved[split]
    repository, _, subset = source.partition(":")
    if not subset:
        return datasets.load_dataset(source, split=split, data_files=data_files)
    if subset in datasets.get_dataset_config_names(repository):
        return datasets.load_dataset(repository, subset, split=split)
    return datasets.load_dataset(repository, data_dir=subset, split=split)
