"""The reference's log-probs: computed once, stored on disk under a fingerprint, looked up by row.

A store is a directory named by its fingerprint that holds `sums.safetensors` ("logps" and what else an
objective needs, [rows, K], float32, NaN where there is no response), `meta.json` (what the fingerprint is
made of) and checksums. It is written beside and renamed, so a store that exists is whole; its checksums and a
re-scored batch are verified when it is opened. A store that does not fit is refused; nothing is ever replaced
by the policy's own log-probs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from dpo.data.batch import Batch
from dpo.files import alone, damaged_files, new_directory, require_writable, unlisted_files
from dpo.outcomes import UserError
from dpo.parallel.distributed import fetch, from_main, on_main
from dpo.training.pieces import PIECES, Pieces, Score, read_pieces
from dpo.training.progress import time_left

FORMAT = 2
SOME_ROWS = "rows"
"""Part of the identity of a store that has only those rows of the data that a run reads."""
RELATIVE_TOLERANCE = 1e-3
ABSOLUTE_TOLERANCE = 1e-2
PROGRESS_SECONDS = 15.0
"""Between two lines that say how far scoring has come."""

Rows = dict[str, Float[np.ndarray, "n K"]]
"""Sums of every row of a data set; NaN where a row has no response k."""

Locate = Callable[[int], str]
"""Where a row stands in the data, file and line."""


def fingerprint_parameters(params: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(fetch(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def score_rows(
    score: Score, batches: Iterable[Batch], *, num_rows: int, num_responses: int, locate: Locate
) -> Rows:
    """Sums of every row of a data set, in its order; of a row that comes again the first ones count.

    Raises:
      ValueError: when a sum is not finite, naming the rows by where they stand in the data.
    """
    rows: Rows = {}
    for batch in batches:
        real = np.asarray(batch.index) >= 0
        index, present = np.asarray(batch.index)[real], np.asarray(batch.present)[real]
        for name, values in score(batch).items():
            values = np.asarray(values, np.float32)[real]
            bad = index[(present & ~np.isfinite(values)).any(1)]
            if bad.size:
                listed = ", ".join(f"{locate(row)} (row {row})" for row in bad.tolist())
                raise UserError(f"{name} of {listed} are not finite: check the weights and the data")
            whole = rows.setdefault(name, np.full((num_rows, num_responses), np.nan, np.float32))
            new = np.isnan(whole[index]).all(axis=1)
            whole[index[new], : values.shape[1]] = np.where(present, values, np.nan)[new]
    return rows


class ReferenceStore:
    """The reference's sums over the responses of one data set, by row id."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def lookup(self, index: Int[np.ndarray, " P"]) -> dict[str, Float[np.ndarray, "P K"]]:
        """Sums of the rows of a batch; 0 for absent responses and padding prompts (index −1).

        Raises:
          LookupError: for a row that was not scored.
        """
        rows = np.asarray(index)
        for values in self.rows.values():
            missing = rows[(rows >= 0) & np.isnan(values[np.maximum(rows, 0)]).all(axis=1)]
            if missing.size:
                raise LookupError(f"the reference has not scored the rows {missing.tolist()}")
        return {
            name: np.where(rows[:, None] >= 0, np.nan_to_num(values[np.maximum(rows, 0)], nan=0.0), 0)
            for name, values in self.rows.items()
        }


def open_or_compute(
    directory: Path,
    identity: dict[str, str],
    *,
    score: Score,
    make_batches: Callable[[], Iterable[Batch]],
    make_probe: Callable[[], Batch],
    num_rows: int,
    num_scored: int,
    num_responses: int,
    locate: Locate,
    log: Callable[[str], None],
    copy_in: Path | None = None,
    noted: Callable[[], None] = lambda: None,
) -> ReferenceStore:
    """Open the store of this identity under `directory`, or compute and write it.

    `copy_in` is a second directory, looked in first and given a copy: a run that is moved with it finds the
    same bits where there is no `directory`, or another one. `noted` is called when some of the rows that are
    computed have reached the disk. Of several processes the main one reads and writes. Of the data's
    `num_rows` the batches have `num_scored`; a store that has all of them, computed before, serves as well.

    `identity` names all that determines the numbers: weights, tokenised data (ids, template, truncation),
    dtype and which sums. `make_batches()` yields the rows to be scored, each in one batch at least,
    `make_probe()` any of these.

    Raises:
      ValueError: when a store is damaged, or its re-scored rows differ: it names the store and what to do.
    """
    shape = (num_rows, num_responses)
    found = on_main(lambda: _find(identity, [directory] if copy_in is None else [copy_in, directory]))
    path, identity = (Path(found[0]), found[1]) if found else (directory / _fingerprint(identity), identity)
    if found is not None:
        store = ReferenceStore(_shared(lambda: _read(path, identity, shape), shape))
        probe = make_probe()
        _verify_rows(store, path, score, probe, locate)
        log(f"reference log-probs: opened {path}, {int((probe.index >= 0).sum())} of its rows re-scored")
    else:
        counted = f"{num_rows} rows" if num_scored == num_rows else f"{num_scored} of {num_rows} rows"
        log(f"reference log-probs: computing {counted}, once for this data and these weights")
        on_main(lambda: require_writable(directory, "reference log-probs"))
        beside = path.with_name(path.name + PIECES)
        pieces = Pieces(beside, shape, _shared(lambda: read_pieces(beside, shape), shape), noted=noted)
        if pieces.num_known:
            log(f"reference log-probs: {pieces.num_known} of these rows are there from a start before")
        batches = with_progress(make_batches(), num_rows=num_scored, log=log)
        with pieces.kept():
            rows = score_rows(
                pieces.remembered(score),
                batches,
                num_rows=num_rows,
                num_responses=num_responses,
                locate=locate,
            )
        store = ReferenceStore(_shared(lambda: _write(path, identity, rows), shape))
        pieces.remove()
        log(f"reference log-probs: stored in {path}")
    if copy_in is not None:
        on_main(lambda: _copy(path, copy_in / path.name))
    return store


def _find(identity: dict[str, str], directories: Sequence[Path]) -> tuple[str, dict[str, str]] | None:
    """The store of this identity, or of the same with all rows, in the first directory that has either.

    Its place is a text, which passes from process to process as JSON.
    """
    whole = {name: value for name, value in identity.items() if name != SOME_ROWS}
    for directory in directories:
        for one in (identity, whole):
            path = directory / _fingerprint(one)
            if path.exists():
                return str(path), one
    return None


def with_progress(
    batches: Iterable[Batch],
    *,
    num_rows: int,
    log: Callable[[str], None],
    every: float = PROGRESS_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Batch]:
    """The same batches; says every so often how many rows are done, and how long the others should take."""
    began = said = clock()
    done = 0
    for batch in batches:
        now = clock()
        if done and now - said >= every:
            left = time_left((now - began) / done * (num_rows - done))
            log(f"reference log-probs: {done} of {num_rows} rows, {left}")
            said = now
        yield batch
        done += int((np.asarray(batch.index) >= 0).sum())


def _shared(get: Callable[[], Rows], shape: tuple[int, int]) -> Rows:
    """The main process's rows on every process."""
    found: Rows = {}

    def names_here() -> list[str]:
        found.update(get())
        return sorted(found)

    names = on_main(names_here)
    return from_main({name: found.get(name, np.zeros(shape, np.float32)) for name in names})


def _copy(path: Path, copy: Path) -> None:
    if not copy.exists():
        with new_directory("reference log-probs", copy) as beside:
            shutil.copytree(path, beside, dirs_exist_ok=True)


def _fingerprint(identity: dict[str, str]) -> str:
    content = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _write(path: Path, identity: dict[str, str], rows: Rows) -> Rows:
    """Store the sums, unless another process was quicker; returns what is stored."""
    shape = next(iter(rows.values())).shape
    with alone(path.with_name(f"{path.name}-store")):  # another one than that which `new_directory` takes
        if path.exists():
            return _read(path, identity, shape)
        with new_directory("reference log-probs", path) as beside:
            save_file(rows, beside / "sums.safetensors")
            meta = json.dumps({"format": FORMAT, "identity": identity}, indent=1, sort_keys=True)
            (beside / "meta.json").write_text(meta)
    return rows


def _read(path: Path, identity: dict[str, str], shape: tuple[int, ...]) -> Rows:
    advice = "delete it to compute it again"
    problems = damaged_files(path) + unlisted_files(path)
    if problems:
        raise UserError(f"reference store {path} is damaged ({'; '.join(problems)}); {advice}")
    stored = json.loads((path / "meta.json").read_text())["identity"]
    rows = load_file(path / "sums.safetensors")
    shapes = {name: values.shape for name, values in rows.items() if values.shape != shape}
    if shapes or stored != identity:
        raise UserError(f"reference store {path} holds {shapes or stored}, not {shape}, {identity}; {advice}")
    return rows


def _verify_rows(store: ReferenceStore, path: Path, score: Score, batch: Batch, locate: Locate) -> None:
    """Re-score one batch and refuse the store when a value moved."""
    index = np.asarray(batch.index)
    stored = store.lookup(index)
    for name, values in score(batch).items():
        now, then = np.asarray(values), stored[name][:, : values.shape[1]]
        checked = np.asarray(batch.present) & (index >= 0)[:, None]
        near = np.abs(now - then) <= RELATIVE_TOLERANCE * np.abs(then) + ABSOLUTE_TOLERANCE  # not of a NaN
        differs = checked & ~near
        if differs.any():
            p, k = np.argwhere(differs)[0]
            raise UserError(
                f"reference store {path} does not belong to this model and data: {name} of "
                f"{locate(int(index[p]))} (row {index[p]}), response {k} is {then[p, k]:.4f} there and "
                f"{now[p, k]:.4f} now; delete the store"
            )
