"""Data sets that the datasets library opens: on the hub, in folders, saved to disk, in Arrow files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from dpo.data.cards import check_card
from dpo.data.hub_sets import fetch, look_at_card, require_card, say_without_token, token_for
from dpo.data.table_checks import (
    check_arrow,
    check_folder,
    check_saved,
    is_prepared,
    prepare,
    require_folder,
)
from dpo.outcomes import UserError, told_by
from dpo.regular_files import is_there


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
        raise UserError(f"{what}: {told_by(error)}") from error


def _find_data_set(source: str, split: str, data_files: str | None) -> Any:
    import datasets

    if any([is_there(Path(source) / name) for name in ("dataset_dict.json", "state.json")]):
        check_saved(Path(source))
        saved = _load_saved(source)
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
    if revision and Path(repository).is_dir():
        raise UserError(
            f"{repository} is a directory, which has no revision (@{revision}); allowed is {named} alone"
        )
    if Path(repository).name in ("", "..") and Path(repository).is_dir():  # no name for datasets
        repository = str(Path(repository).resolve())
    where: dict[str, Any] = {"revision": revision} if revision else {}
    place = (
        _open_folder(repository, subset)
        if Path(repository).is_dir()
        else _open_hub(repository, subset, revision)
    )
    if token_for(repository) is False and not Path(repository).is_dir():
        where["token"] = False
    if subset:
        where |= {"name": subset} if _has_subset(repository, subset, where) else {"data_dir": subset}
    found = _read_split(repository, split, where, place)
    if found.info.builder_name != "csv":
        return found
    text = datasets.Features({name: datasets.Value("string") for name in found.column_names})
    return _read_split(repository, split, where | {"features": text, "keep_default_na": False}, place)


def _load_saved(directory: str) -> Any:
    """What `save_to_disk` wrote, with all of its columns: a format may show some, in other types."""
    import datasets

    try:
        return datasets.load_from_disk(directory).with_format(None)
    except Exception as error:  # of a library, about what a stranger wrote
        what = f"{directory}: its state.json or dataset_info.json is not what save_to_disk writes"
        raise UserError(f"{what}: {told_by(error)}") from error


def _has_subset(repository: str, name: str, where: Mapping[str, Any]) -> bool:
    """Whether a subset of this name is there, or in the cache when offline; else it is a folder's."""
    import datasets

    try:
        datasets.load_dataset_builder(repository, name=name, **where)
    except ValueError:
        return False
    return True


_Files = Mapping[str, Sequence[Path]]
_Place = Callable[[Any], Callable[[], _Files]]
"""Checks what `datasets` would read, and gives what brings the files of each split to this machine."""


def _read_split(repository: str, split: str, where: Mapping[str, Any], place: _Place) -> Any:
    """A split of what `datasets` keeps, which a limited process makes unless it was made before."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(repository, **where)
    except (TypeError, AttributeError, LookupError) as error:
        what = (
            "its README.md or .huggingface.yaml says under configs or dataset_info what datasets cannot read"
        )
        raise UserError(f"{repository}: {what}: {told_by(error)}") from error
    files = place(builder)
    if not is_prepared(builder):
        prepare(repository, builder, files())
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _open_folder(repository: str, subset: str) -> _Place:
    folder = Path(repository)
    require_folder(folder)
    whole = not check_card(folder) and not subset

    def check(builder: Any) -> Callable[[], _Files]:
        files = check_folder(folder, builder, whole=whole)
        return lambda: files

    return check


def _open_hub(repository: str, subset: str, revision: str) -> _Place:
    say_without_token(repository)
    card = look_at_card(repository, revision or None, subset)

    def check(builder: Any) -> Callable[[], _Files]:
        require_card(card, builder)
        return lambda: fetch(repository, builder)

    return check


def row_without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The same below a row's columns: a column that is null is told from one that is not there.

    Decimal numbers, as databases write them, are numbers like others.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A row of Arrow without the nulls in its objects: a struct has every key that any row's object has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return float(value) if isinstance(value, Decimal) else value


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
