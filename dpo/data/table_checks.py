"""Tables of strangers are looked at by a limited process before a library opens them in this one.

Parquet and Arrow files are decoded and validated there (`table_worker`), and what `datasets` makes of a
folder or of files of the hub is made there. Nothing is looked at twice by one process, and of a large
Parquet file as much as is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax

from dpo import terminal
from dpo.data.cards import read_small
from dpo.data.table_worker import BASE, FACTOR, READERS
from dpo.limited import look, stored_bytes
from dpo.outcomes import UserError
from dpo.parallel.distributed import is_main
from dpo.regular_files import is_inside, is_there, require_regular
from dpo.text_encoding import require_utf8_file

WORKER = Path(__file__).with_name("table_worker.py")
MAX_FILES = 10_000
"""Files and folders in a folder of data."""
A_WHILE = 5.0
"""Seconds after which a line says what is being done."""


class _Looked(NamedTuple):
    """What was looked at of a file."""

    groups: set[int]
    """Numbers of row groups; of an Arrow file, which is looked at whole, none."""
    taken: int
    """Bytes that their rows take as Python's values."""


_SEEN: dict[tuple[Any, ...], _Looked] = {}
"""Of each file as it was."""


def check_groups(path: Path, group: int, *, rows: int) -> None:
    """Look at a row group of a Parquet file, and at those behind it that hold so many rows or fill a window.

    What all looks of this process find is counted together.

    Raises:
      UserError: for what is no Parquet file, or takes more than it may.
    """
    key = _identify(path)
    seen = _SEEN.get(key, _Looked(set(), 0))
    if group in seen.groups or (key in _SEEN and group == 0 and not seen.groups):  # a file without rows
        return
    until = min((other for other in seen.groups if other > group), default=None)
    request = {"kind": "parquet", "path": str(path.resolve()), "first": group, "until": until}
    request |= {"rows": rows, "taken": seen.taken}
    said = look(WORKER, request, size=stored_bytes(path))
    if "error" in said:
        raise UserError(f"{path}: not a readable Parquet file: {said['error']}")
    _SEEN[key] = _Looked(seen.groups | set(range(group, int(said["seen"]))), int(said["taken"]))


def check_arrow(paths: Sequence[Path]) -> None:
    """Look at all of some Arrow files: one wrong offset ends a process that has the file in its memory.

    Raises:
      UserError: for a file that is not valid.
    """
    new = [path for path in paths if _identify(path) not in _SEEN]
    for path in new:
        request = {"kind": "arrow", "path": str(path.resolve())}
        said = look(WORKER, request, size=stored_bytes(path))
        if "error" in said:
            raise UserError(f"{path}: not a readable Arrow file: {said['error']}")
        _SEEN[_identify(path)] = _Looked(set(), 0)


def _identify(path: Path) -> tuple[Any, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


# ---- what `save_to_disk` wrote ----


def check_saved(directory: Path) -> None:
    """A directory that `save_to_disk` wrote: it names files of its own, which are valid.

    Raises:
      UserError: otherwise.
    """
    splits = directory / "dataset_dict.json"
    if is_there(splits):
        names = _read_json(splits).get("splits")
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise UserError(f"{splits}: splits is {names!r:.200}; allowed is a list of folders in it")
        for name in names:
            check_saved(directory / name)
        return
    state = directory / "state.json"
    said = _read_json(state)
    if (kind := said.get("_format_type")) not in _FORMATS:
        raise UserError(
            f"{state}: _format_type is {kind!r:.200}; allowed are {', '.join(map(str, _FORMATS))}"
        )
    files = said.get("_data_files")
    listed = files if isinstance(files, list) else [None]
    names = [one.get("filename") if isinstance(one, dict) else None for one in listed]
    if not all(map(_is_name, names)):
        raise UserError(f"{state}: _data_files is {files!r:.200}; allowed is a list of files beside it")
    _read_json(directory / "dataset_info.json")
    check_arrow([require_regular(directory / str(name)) for name in names])


_FORMATS = (None, "python", "numpy", "pandas", "arrow", "polars", "torch", "tensorflow", "jax")
"""Which a saved data set may have had; its rows are read without."""


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and is_inside(name) and len(PurePosixPath(name).parts) == 1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found


# ---- folders that `datasets` reads ----


def require_folder(folder: Path) -> None:
    """A folder with not too many files; nothing is opened. What is hidden is not data, and not counted.

    Raises:
      UserError: with the number that is allowed.
    """
    count = 0
    for _, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += len(folders) + len(names)
        if count > MAX_FILES:
            raise UserError(
                f"{folder}: has more than {MAX_FILES} files and folders; allowed are as many, and files of "
                "JSON lines can be put behind each other in one"
            )


def check_folder(folder: Path, builder: Any, *, whole: bool) -> dict[str, list[Path]]:
    """The files of each split that `datasets` would read in a folder.

    `whole` says that nothing but their names tells which of its files are the data.

    Raises:
      UserError: for other files than tables, files outside of the folder, and files that are left out.
    """
    require_tables(str(folder), builder)
    listed = builder.config.data_files or {}
    splits = {str(split): [Path(str(name)) for name in names] for split, names in listed.items()}
    files = [path for paths in splits.values() for path in paths]
    for path in files:
        _require_own(path, folder)
    if whole:
        _require_all(folder, {os.path.realpath(path) for path in files}, builder.name)
    check_arrow([path for path in files if path.suffix == ".arrow"])
    return splits


def require_tables(source: str, builder: Any) -> None:
    """Refuse what `datasets` would read with another reader: of pictures, sounds, archives, HDF5.

    Raises:
      UserError: naming the reader.
    """
    if builder.name not in READERS:
        raise UserError(f"{source}: would be read as {builder.name}; allowed are {', '.join(READERS)}")


def is_prepared(builder: Any) -> bool:
    """Whether `datasets` keeps what it makes of a data set already; offline, nothing else is looked for."""
    return builder.name == "cache" or os.path.isfile(os.path.join(builder.cache_dir, "dataset_info.json"))


def prepare(source: str, builder: Any, files: Mapping[str, Sequence[Path]]) -> None:
    """Have a limited process make what `datasets` keeps of a data set whose files are on this machine.

    Raises:
      UserError: for what the process ends at.
    """
    from datasets import config
    from datasets.utils.py_utils import asdict

    files = _pass_over_empty(source, files)
    for path in (path for paths in files.values() for path in paths if builder.name in ("csv", "json")):
        if getattr(builder.config, "encoding", None) in (None, "utf-8"):
            require_utf8_file(path)
    given = builder.config
    features = getattr(given, "features", None)
    request = {
        "kind": "data_set",
        "reader": builder.name,
        "files": {split: [os.path.abspath(path) for path in paths] for split, paths in files.items()},
        "config": _what_is_set(source, given),
        "config_name": given.name,
        "features": None if features is None else features.to_dict(),
        "info": asdict(builder.info),
        "name": builder.dataset_name,
        "cache": os.path.abspath(config.HF_DATASETS_CACHE),
        "directory": os.path.abspath(builder.cache_dir),
    }
    size = sum(stored_bytes(path) for paths in files.values() for path in paths)
    with _saying_slow(f"{source}: its files, {size >> 20} MiB, are made into tables, which are kept"):
        said = look(WORKER, request, size=size, writes=BASE + FACTOR * size)
    if "error" in said or not is_prepared(builder):
        raise UserError(f"{source}: could not be read: {said.get('error', 'nothing was made of it')}")


def _pass_over_empty(source: str, files: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
    """The files without the empty ones, which are counted aloud: `datasets` ends at nothing else wordlessly.

    Raises:
      UserError: for a split that has no others.
    """
    left = {split: [path for path in paths if path.stat().st_size] for split, paths in files.items()}
    for split, paths in files.items():
        names = [path.name for path in paths if path not in left[split]]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if names and not left[split]:
            raise UserError(
                f"{source}: all files of split {split!r} are empty: {shown}; allowed are files with rows"
            )
        if names:
            say(f"{source}: {len(names)} of {len(paths)} files of split {split!r} are empty: {shown}")
    return left


def say(text: str) -> None:
    """Of several processes the main one speaks.

    Before they have met each does: whether there are others is not asked, which would keep them from meeting.
    """
    if not jax.distributed.is_initialized() or is_main():
        terminal.print_plain(text)


@contextlib.contextmanager
def _saying_slow(text: str) -> Iterator[None]:
    """Print a line once what is inside takes a while."""
    timer = threading.Timer(A_WHILE, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _what_is_set(source: str, given: Any) -> dict[str, Any]:
    """The settings of a reader that are not its defaults: of a card, and what names of files imply."""
    known = ("name", "data_files", "data_dir", "description", "features")
    usual = type(given)()
    values = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if field.name not in known and getattr(given, field.name) != getattr(usual, field.name)
    }
    if "version" in values:
        values["version"] = str(values["version"])
    for name, value in values.items():
        if not _is_plain(value):
            raise UserError(
                f"{source}: its card sets {name} to {value!r:.200}; allowed are texts and numbers"
            )
    return values


def _is_plain(value: Any) -> bool:
    """Whether a value comes back from JSON as it went."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _require_all(folder: Path, read: Collection[str], kind: str) -> None:
    """Refuse a folder of which `datasets` would leave tables out: it takes one kind, and names it knows."""
    tables = (path for path in sorted(folder.rglob("*")) if path.name.endswith(_TABLE_ENDINGS))
    left = [str(path.relative_to(folder)) for path in tables if os.path.realpath(path) not in read]
    if left:
        raise UserError(
            f"{folder}: {', '.join(left[:5])}{', …' if len(left) > 5 else ''} would be left out, because the "
            f"folder is read as {kind}, {len(read)} files of it; allowed are files of one kind whose names "
            "don't tell train from others, a README.md that lists them (configs, data_files), or a list "
            "of files in data.train"
        )


_TABLE_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".tsv", ".arrow")


def _require_own(path: Path, folder: Path) -> None:
    name = os.path.relpath(path, folder.resolve())
    if not path.is_file() or not is_inside(name):
        raise UserError(f"{folder}: {str(path)[:200]!r} is to be read; allowed are files in this folder")
    if path.suffix in (".zip", ".tar", ".7z", ".rar", ".xz", ".zst", ".bz2", ".lz4"):
        raise UserError(f"{path}: allowed in a folder are files that are no archives; unpack it")
