"""Rows of a Parquet file, each of its row groups looked at by a limited process before it is decoded here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.data_sets import row_without_nulls
from dpo.data.table_checks import check_groups
from dpo.data.table_worker import ROWS
from dpo.outcomes import UserError


def parquet_rows(path: Path, offset: int) -> Iterator[Any]:
    """The rows from one on, the first being 0.

    Raises:
      UserError: naming a file that is not Parquet, or that says more than a reader should hold.
    """
    with _parquet(path) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        group = int(np.searchsorted(ends, offset, side="right"))
        skip = offset - int(ends[group - 1] if group else 0)
        yield from _after(skip, _each_batch(path, file, group))


def parquet_length(path: Path) -> int:
    """How many rows a file has.

    Raises:
      UserError: as for its rows.
    """
    with _parquet(path) as file:
        return file.metadata.num_rows


def _each_batch(path: Path, file: Any, first: int) -> Iterator[Any]:
    """Batches from a row group on, each group looked at before this process decodes it."""
    for group in range(first, file.num_row_groups):
        check_groups(path, group, rows=1)
        yield from file.iter_batches(ROWS, row_groups=[group])


def _after(skip: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Rows of Arrow's batches but for the first ones; a map is an object, as it was before it was a table."""
    for batch in batches:
        rows = batch.slice(min(skip, len(batch))).to_pylist(maps_as_pydicts="strict")
        yield from map(row_without_nulls, rows)
        skip = max(0, skip - len(batch))


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    check_groups(path, 0, rows=1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
