"""Looks at data files in a process of its own (`dpo.limited`): are they what they say?

    {"kind": "parquet", "path", "first": row group, "until": one not to look at or null,
     "rows": how many are needed, "taken": bytes of those that were looked at before}
        gives {"seen": the row group after those that were looked at now, "taken": bytes with theirs}
    {"kind": "arrow", "path"} gives {"rows": how many}
    {"kind": "data_set", "reader", "files": {split: paths}, "config", "info", …, "directory": where to}
        gives {"made": true}
    anything that is wrong gives {"error": what}; before it a line says {"at": file} of each that it opens

"size" is how many bytes are stored of the files.

Of tables every value is decoded and validated, and what the rows will take as Python's values is counted.
Files of a folder or of the hub are made into what `datasets` keeps of them. It runs without the rest of the
project.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

POINTER = 8
"""Bytes that a value in a Python list takes at least."""
ROWS = 1024
"""Of a batch."""
WINDOW = 1 << 28
"""Bytes of a Parquet file that are looked at in one go at least, where it has as many."""
BASE, FACTOR = 1 << 28, 1000
"""What a file may take when it is decoded: so many bytes, and so many times its own, as with gzip."""
BATCH = 1 << 29
"""Bytes that a batch may take when it is decoded."""


class _WrongError(Exception):
    """What a file is refused for."""


def main(request: dict[str, Any]) -> None:
    """Answer one request."""
    memory = request["memory"]
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, request["seconds"]),
        (resource.RLIMIT_FSIZE, request["writes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        said = _KINDS[request["kind"]](request)
    except MemoryError:
        said = {"error": f"it takes more than {memory >> 20} MiB of memory to read"}
    except BaseException as error:
        text = _told_by(error)
        if "malloc of size" in text or "realloc of size" in text:
            text = f"it takes more than {memory >> 20} MiB of memory to read"
        said = {"error": "".join([*(f"{os.path.basename(path)}: " for path in _AT_FAULT[-1:]), text])[:500]}
    print(json.dumps(said), flush=True)


def _told_by(error: BaseException) -> str:
    """What the innermost error with a text says: what raised the others came from it."""
    chain = [error]
    while (inner := chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    for one in reversed(chain):
        if text := str(one).strip():
            return text if isinstance(one, _WrongError) else f"{type(one).__name__}: {text}"
    return f"{type(error).__name__}, which the library that reads it raised without a word"


# ---- Parquet ----


def _look_at_parquet(request: dict[str, Any]) -> dict[str, Any]:
    """So many row groups from `first` as hold the rows that are needed, and a window's bytes at least.

    None from `until` on: it was looked at already.
    """
    import pyarrow.parquet

    path, first = request["path"], request["first"]
    allowed = _Allowed(request["size"])
    with pyarrow.parquet.ParquetFile(path) as file:
        about = file.metadata
        _require_names_once(file.schema_arrow)
        allowed.take(about.num_rows * POINTER)
        allowed.taken, rows, size = request["taken"], 0, 0
        group, last = first, about.num_row_groups if request["until"] is None else request["until"]
        while group < last and (size < WINDOW or rows < request["rows"]):
            rows += _count(file, group, allowed)
            size += max(0, about.row_group(group).total_byte_size)
            group += 1
    return {"seen": group, "taken": allowed.taken}


def _count(file: Any, group: int, allowed: _Allowed) -> int:
    """The rows of a group, which are as many as it says."""
    found, said = 0, file.metadata.row_group(group).num_rows
    for batch in file.iter_batches(ROWS, row_groups=[group], use_threads=False):
        batch.validate(full=True)
        found += len(batch)
        allowed.take(measure(batch))
    if found != said:
        raise _WrongError(f"group {group} of its rows has {found}, and says {said}")
    return found


class _Allowed:
    """What the rows of files of so many bytes together may take."""

    def __init__(self, size: int) -> None:
        self.most = BASE + FACTOR * size
        self.taken = 0

    def take(self, size: int) -> None:
        self.taken += size
        if self.taken > self.most:
            raise _WrongError(
                f"its rows take more than {self.most} bytes, which is {BASE} and {FACTOR} times its size; "
                "allowed is a file that is not blown up so"
            )
        if size > BATCH:
            raise _WrongError(f"{ROWS} of its rows take {size} bytes; allowed are {BATCH}")

    def take_table(self, table: Any) -> None:
        """The same of a table that is made of a file; of types that are not read, what they take there."""
        for batch in table.to_batches(max_chunksize=ROWS):
            try:
                size = measure(batch)
            except _WrongError:
                size = batch.nbytes
            self.take(size)


# ---- Arrow ----


def _look_at_arrow(request: dict[str, Any]) -> dict[str, Any]:
    return {"rows": _count_arrow(request["path"], request["size"])}


def _count_arrow(path: str, size: int) -> int:
    rows, allowed = 0, _Allowed(size)
    for batch in _arrow_batches(path):
        rows += len(batch)
        allowed.take(len(batch) * POINTER)
        allowed.taken -= len(batch) * POINTER
        for start in range(0, len(batch), ROWS):
            allowed.take(measure(batch.slice(start, ROWS)))
    return rows


def _arrow_batches(path: str) -> Iterator[Any]:
    """Batches of Arrow's stream, which `datasets` writes, or of its file format, each of them valid."""
    import pyarrow

    with pyarrow.OSFile(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        _require_names_once(reader.schema)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)
            yield batch


# ---- what rows take ----


def measure(batch: Any) -> int:
    """About the bytes that the rows of a batch take as Python's values."""
    return sum(_measure(column, name) for name, column in zip(batch.schema.names, batch.columns, strict=True))


def _measure(array: Any, name: str) -> int:
    from pyarrow import types

    kind, pointers = array.type, POINTER * len(array)
    if types.is_struct(kind):
        return pointers + sum(_measure(field, name) for field in array.flatten())
    if types.is_map(kind):
        return pointers + _measure(array.keys, name) + _measure(array.items, name)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pointers + _measure(array.flatten(), name)
    if types.is_dictionary(kind) and _is_text(kind.value_type):
        return pointers + _take_dictionary(array)
    if types.is_dictionary(kind) and types.is_primitive(kind.value_type):
        return pointers
    if types.is_null(kind) or types.is_primitive(kind) or types.is_decimal(kind) or _is_text(kind):
        return pointers + array.nbytes
    raise _WrongError(f"its column {name[:100]!r} has the type {str(kind)[:100]}, which is not read")


def _require_names_once(fields: Any) -> None:
    """Of a schema or of objects, however deep: of two values by one name a row would have the last."""
    if twice := _find_twice(field.name for field in fields):
        raise _WrongError(f"it has two columns, or fields of an object, named {twice}; allowed is one")
    for field in fields:
        _require_names_once([field.type.field(at) for at in range(field.type.num_fields)])


def _find_twice(names: Iterable[str]) -> str | None:
    """The first that comes again, as a message shows it."""
    seen = set[str]()
    twice = next((name for name in names if name in seen or seen.add(name)), None)
    return None if twice is None else repr(twice[:100])


def _take_dictionary(array: Any) -> int:
    """Bytes of texts that are each written as the number of one."""
    from pyarrow.compute import call_function

    lengths = call_function("binary_length", [array.dictionary]).take(array.indices)
    return call_function("sum", [lengths]).as_py() or 0


def _is_text(kind: Any) -> bool:
    """Text or bytes, each value of its own bytes: what is a view may show the same ones many times."""
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_it(kind) for is_it in texts) or types.is_fixed_size_binary(kind)


# ---- data sets of `datasets` ----

READERS = {"csv": "Csv", "json": "Json", "parquet": "Parquet", "arrow": "Arrow"}
"""Modules of `datasets` that make tables of files, and the class in each."""
_AT_FAULT: list[str] = []
"""The file that is being read: errors of readers do not name it."""


def _tell_what_is_read(paths: set[str]) -> None:
    """Note each of some files when it is opened, and say so: where the process ends, this was its last."""

    def note(event: str, given: tuple[Any, ...]) -> None:
        path = given[0] if event == "open" else None
        if isinstance(path, str) and path in paths and path not in _AT_FAULT:
            _AT_FAULT[:] = [path]
            os.write(1, json.dumps({"at": os.path.basename(path)}).encode() + b"\n")

    sys.addaudithook(note)


def _make_data_set(request: dict[str, Any]) -> dict[str, Any]:
    """What `datasets` keeps of the files of a data set, in a directory."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from pyarrow.parquet import read_schema

    datasets.disable_progress_bars()
    _tell_what_is_read({path for paths in request["files"].values() for path in paths})
    reader, features = request["reader"], request["features"]
    module = importlib.import_module(f"datasets.packaged_modules.{reader}.{reader}")
    files = {split: DataFilesList(paths, []) for split, paths in request["files"].items()}
    for path in _each_file(request, "parquet"):
        _require_names_once(read_schema(path))
    builder = getattr(module, READERS[reader])(
        cache_dir=request["cache"],
        dataset_name=request["name"],
        config_name=request["config_name"],
        data_files=DataFilesDict(files),
        info=datasets.DatasetInfo.from_dict(request["info"]),
        features=None if features is None else datasets.Features.from_dict(features),
        **request["config"],
    )
    for path in _each_file(request, "csv"):
        _require_columns_once(path, builder.config.pd_read_csv_kwargs)
    for path in _each_file(request, "json"):
        _require_names_once_in_json(path, builder.config.encoding or "utf-8")
    builder._generate_tables = _within(_Allowed(request["size"]), builder._generate_tables)
    builder.download_and_prepare(request["directory"])
    return {"made": True}


def _each_file(request: dict[str, Any], reader: str) -> Iterator[str]:
    """The files of a data set that this reader reads, each at fault while it is looked at."""
    for paths in request["files"].values() if request["reader"] == reader else ():
        for path in paths:
            _AT_FAULT[:] = [path]
            yield path
    _AT_FAULT.clear()


def _within(allowed: _Allowed, generate_tables: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A reader's tables, counted before they are written: of many files none need be large."""

    def counted(*given: Any, **named: Any) -> Iterator[Any]:
        for key, table in generate_tables(*given, **named):
            allowed.take_table(table)
            yield key, table

    return counted


def _require_names_once_in_json(path: str, encoding: str) -> None:
    """Of a file of JSON, objects a line or one value: of two values by one name readers take the last.

    What is no JSON is left to who reads it.
    """
    import fsspec

    with open(path, "rb") as file:
        beginning = file.read(max(map(len, _COMPRESSED)))
    how = next((how for mark, how in _COMPRESSED.items() if beginning.startswith(mark)), None)
    opened: Any = partial(fsspec.open, path, "rb", compression=how)
    with opened() as file:
        first = file.readline()
        are_lines = not first.removeprefix(BOM_UTF8).lstrip().startswith(b"[")
        for line in chain([first], file) if are_lines else ():
            are_lines &= _is_json(line.removeprefix(BOM_UTF8).decode(encoding, "replace"))
    if not are_lines:
        with opened() as file:
            _is_json(file.read().removeprefix(BOM_UTF8).decode(encoding, "replace"))


def _is_json(text: str) -> bool:
    """Whether it is, or blank. Raises where an object in it has a name twice."""
    try:
        if not text.isspace():
            _SCAN.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _see_names_once(pairs: list[tuple[str, Any]]) -> None:
    if twice := _find_twice(name for name, _ in pairs):
        raise _WrongError(f"has {twice} twice in one object; allowed is once")


_SCAN = json.JSONDecoder(object_pairs_hook=_see_names_once, strict=False)
"""Keeps nothing of what it reads."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_COMPRESSED |= {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
"""How a file is compressed that begins so, as `datasets` tells it."""


def _require_columns_once(path: str, how: dict[str, Any]) -> None:
    """Of a CSV file that names its columns: of two with one name pandas calls the second one NAME.1."""
    import pandas

    if how.get("names") is not None or how.get("header") not in ("infer", 0):
        return
    parsing = {name: how[name] for name in _PARSING if name in how}
    lines = pandas.read_csv(
        path, **parsing, header=None, nrows=1, dtype=str, keep_default_na=False, on_bad_lines="skip"
    )
    if twice := _find_twice(str(name) for row in lines.values.tolist() for name in row):
        raise _WrongError(f"its first line has the column {twice} twice; allowed is once")


_PARSING = (
    *("sep", "engine", "skipinitialspace", "skiprows", "skip_blank_lines", "lineterminator", "quotechar"),
    *("quoting", "escapechar", "comment", "encoding", "encoding_errors", "dialect", "doublequote"),
)
"""Of pandas' settings those that decide which values a line has."""

_KINDS = {"parquet": _look_at_parquet, "arrow": _look_at_arrow, "data_set": _make_data_set}


if __name__ == "__main__":
    main(json.load(sys.stdin))
