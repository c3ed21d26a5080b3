"""Reference log-probs on their way to a store, written every minute: a second start goes on from there.

    reference/
      3f…/            a store
      8a….pieces/     rows of a store that is not whole yet
        5c….safetensors     some rows; the name is the SHA-256 of the file

A piece holds whole rows as they were scored, so that a store that was begun several times has the bits of one
that was made at once. A piece whose bytes are not those of its name is left out, and its rows scored again.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dpo.data.batch import Batch
from dpo.files import new_file, writing
from dpo.outcomes import USER, outcome_of
from dpo.parallel.distributed import is_main

PIECES = ".pieces"
PIECE_SECONDS = 60.0
"""Between two pieces."""
INDEX = "index"
"""The name of a piece's row numbers, beside those of its sums."""

Score = Callable[[Batch], dict[str, Float[np.ndarray, "P K"]]]
"""Sums of one batch's responses on the host."""


class Pieces:
    """Rows of one store that were scored, in memory and, in the main process, on the disk."""

    def __init__(
        self,
        directory: Path,
        shape: tuple[int, int],
        rows: dict[str, Float[np.ndarray, "n K"]],
        *,
        every: float = PIECE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        noted: Callable[[], None] = lambda: None,
    ):
        """`rows` are those of earlier starts, NaN where there are none: the same in every process.

        `noted` is called in the main process whenever a piece has reached the disk.
        """
        self._directory, self._shape = directory, shape
        self._rows = {name: np.array(values) for name, values in rows.items()}
        self._every, self._clock, self._written = every, clock, clock()
        self._noted = noted
        self._known: Bool[np.ndarray, " n"] = np.zeros(shape[0], bool)
        for values in rows.values():
            self._known |= np.isfinite(values).any(axis=1)
        self._new: list[np.ndarray] = []

    @property
    def num_known(self) -> int:
        """Rows that need not be scored."""
        return int(self._known.sum())

    def remembered(self, score: Score) -> Score:
        """The same sums; those of a batch whose rows are all known are looked up."""

        def look_up_or_score(batch: Batch) -> dict[str, Float[np.ndarray, "P K"]]:
            index, width = np.asarray(batch.index), np.asarray(batch.present).shape[1]
            if self._known[index[index >= 0]].all():
                return {name: values[np.maximum(index, 0), :width] for name, values in self._rows.items()}
            sums = score(batch)
            self._add(batch, sums)
            return sums

        return look_up_or_score

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While inside, rows reach the disk now and then, and at an end that another start goes on from."""
        try:
            yield
        except BaseException as error:
            if outcome_of(error) is not USER:  # whose weights or data will be others
                with contextlib.suppress(OSError):  # the first error is the one to be told
                    self.write()
            raise

    def write(self) -> None:
        """Write the rows that no piece has; raises `WriteError` where there is no room."""
        index, self._written = np.concatenate([np.zeros(0, np.int64), *self._new]), self._clock()
        self._new.clear()
        if not len(index) or not is_main():
            return
        content = save({INDEX: index, **{name: values[index] for name, values in self._rows.items()}})
        path = self._directory / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        with writing("a piece of the reference log-probs", path):
            self._directory.mkdir(parents=True, exist_ok=True)
        with new_file("a piece of the reference log-probs", path) as beside:
            beside.write_bytes(content)
        self._noted()

    def remove(self) -> None:
        """Once the store is whole nobody needs them."""
        self._new.clear()
        if is_main():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _add(self, batch: Batch, sums: dict[str, Float[np.ndarray, "P K"]]) -> None:
        """Rows that are new and finite; of a row that comes again the first sums count."""
        index, present = np.asarray(batch.index), np.asarray(batch.present)
        arrays = {name: np.where(present, np.asarray(values), np.nan) for name, values in sums.items()}
        whole = np.all([np.isfinite(values) | ~present for values in arrays.values()], axis=(0, 2))
        taken = np.flatnonzero((index >= 0) & whole & ~self._known[np.maximum(index, 0)])
        _, first = np.unique(index[taken], return_index=True)
        taken = taken[first]
        for name, values in arrays.items():
            rows = self._rows.setdefault(name, np.full(self._shape, np.nan, np.float32))
            rows[index[taken], : values.shape[1]] = values[taken]
        self._known[index[taken]] = True
        self._new.append(index[taken].astype(np.int64))
        if self._clock() - self._written >= self._every:
            self.write()


def read_pieces(directory: Path, shape: tuple[int, int]) -> dict[str, Float[np.ndarray, "n K"]]:
    """The rows of all whole pieces, NaN elsewhere; in the main process, which alone reads."""
    rows: dict[str, Float[np.ndarray, "n K"]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != path.stem:
            continue
        try:
            piece = load(content)
        except SafetensorError:
            continue
        index = piece.pop(INDEX)
        if any(values.shape != (len(index), shape[1]) for values in piece.values()):
            continue
        for name, values in piece.items():
            rows.setdefault(name, np.full(shape, np.nan, np.float32))[index] = values
    return rows
