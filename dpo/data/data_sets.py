"""Data sets that the datasets library opens: on the hub, in folders, saved to disk, in Arrow files."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from dpo.data.table_checks import check_arrow, check_card, check_saved, prepare_folder
from dpo.outcomes import UserError


def open_data_set(source: str, split: str, *, data_files: str | None = None, name: str | None = None) -> Any:
    """Anything `datasets.load_dataset` opens, and what `save_to_disk` wrote.

    Raises:
      UserError: when it cannot be opened, has no such split, or is refused before it is.
    """
    try:
        return _find_data_set(source, split, data_files)
    except Exception as error:  # of a library, about what a stranger wrote
        if isinstance(error, UserError):
            raise
        what = f"{name or source} could not be opened as a data set (split {split!r})"
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


def _has_subset(repository: str, name: str, where: dict[str, Any]) -> bool:
    """Whether a subset of this name is there, or in the cache when offline; else it is a folder's."""
    import datasets

    try:
        datasets.load_dataset_builder(repository, name=name, **where)
    except ValueError:
        return False
    return True


def _find_data_set(source: str, split: str, data_files: str | None) -> Any:
    import datasets

    if (Path(source) / "dataset_dict.json").is_file() or (Path(source) / "state.json").is_file():
        check_saved(Path(source))
        saved = datasets.load_from_disk(source)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"no split {split!r}; allowed are {', '.join(map(str, saved))}")
        return saved[split]
    if data_files is not None:
        check_arrow([Path(data_files)])
        return datasets.load_dataset(source, split=split, data_files=data_files)
    named, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    repository, _, subset = named.partition(":")
    where: dict[str, Any] = {"revision": revision} if revision else {}
    is_folder = Path(repository).is_dir()
    listed = is_folder and check_card(Path(repository))
    if subset:
        where |= {"name": subset} if _has_subset(repository, subset, where) else {"data_dir": subset}
    if is_folder:
        prepare_folder(Path(repository), where, listed=listed)
    found = datasets.load_dataset(repository, split=split, **where)
    if found.info.builder_name != "csv":
        return found
    text = datasets.Features({name: datasets.Value("string") for name in found.column_names})
    return datasets.load_dataset(repository, split=split, **where, features=text, keep_default_na=False)


def row_without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The same below a row's columns: a column that is null is told from one that is not there."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A row of Arrow without the nulls in its objects: a struct has every key that any row's object has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


class _Digest(io.RawIOBase):
    """A file that keeps nothing of what is written but its SHA-256."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)


def fingerprint_data_set(data_set: Any) -> str:
    """Of the columns as Arrow streams them, and of which rows are taken in which order."""
    import pyarrow

    digest = _Digest()
    for table in (data_set.data.table, data_set._indices and data_set._indices.table):
        if table is not None:
            schema = table.schema.remove_metadata()
            with pyarrow.ipc.new_stream(pyarrow.PythonFile(digest, "w"), schema) as stream:
                for batch in table.to_batches():
                    stream.write_batch(batch.replace_schema_metadata(None))
    return digest.sha256.hexdigest()
