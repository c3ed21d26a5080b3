"""Tokens on disk from start to start: one directory for each fingerprint of all that determines them.

    FINGERPRINT/           one .npy file an array, facts.json, SHA256SUMS; opened as memory maps
    FINGERPRINT.chunks/    what an interrupted preparation has finished; names of files have their checksums
    FINGERPRINT.lock       held while one process prepares; the others wait for it

A directory that has its name is whole. Its checksums are verified at every opening, and one that is damaged
is made anew. Above the limit of the store, what was not opened for the longest time is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.data.chunks import Chunk, open_chunk, write_chunk
from dpo.data.joining import ORIGIN, TokenizedPart, array_names, join_notes, pieces
from dpo.data.tokenized import Fingerprint, TokenizedDataset
from dpo.files import (
    damaged_files,
    new_directory,
    require_writable,
    unlisted_files,
    without_locks,
    writing,
)

FACTS = "facts.json"
NUMBERS = "numbers"
CHUNKS, LOCK, WRITING = ".chunks", ".lock", ".writing"
_WHAT = "prepared tokens"
_NOTE = "data.token_store names another directory, and off keeps nothing"

Log = Callable[[str], None]


class Stored(NamedTuple):
    """What the store has of a source: tokens, and what else the one who prepared them knew."""

    tokens: TokenizedDataset
    numbers: np.ndarray
    """The line or row of every preference that was read."""
    facts: Mapping[str, Any]


class TokenStore:
    """The directory of one fingerprint, in the directory of all."""

    def __init__(self, root: Path, key: str, *, limit: int, log: Log) -> None:
        """`limit` is in bytes, of all that the store holds."""
        self._root, self._path, self._limit, self._log = root, root / key, limit, log
        self._chunks = root / f"{key}{CHUNKS}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else prepares these tokens meanwhile; waits where somebody does.

        Raises:
          WriteError: when nothing can be written there.
          EnvironmentFailure: when the file system has no locks, or can't rename directories.
        """
        require_writable(self._root, _WHAT, note=_NOTE)
        with writing(_WHAT, self._root, note=_NOTE):
            lock = self._path.with_name(self._path.name + LOCK).open("a+")
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._log(f"another process prepares the same tokens in {self._path}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise without_locks(self._root, error) or error from error
            yield

    def open(self) -> Stored | None:
        """What is there, verified; None where nothing is, or where it is damaged, which is said."""
        if not self._path.is_dir():
            return None
        problems = damaged_files(self._path) or unlisted_files(self._path)
        if problems:
            self._log(f"{_WHAT} in {self._path} are damaged ({'; '.join(problems)}): they are made anew")
            shutil.rmtree(self._path)
            return None
        os.utime(self._path)
        facts = json.loads((self._path / FACTS).read_text(encoding="utf-8"))
        arrays = {name: _map(self._path / f"{name}.npy") for name in [*facts["arrays"], ORIGIN, NUMBERS]}
        numbers = arrays.pop(NUMBERS)
        return Stored(TokenizedDataset(**arrays, **facts["tokens"]), numbers, facts)

    def finished(self) -> dict[int, Chunk]:
        """Chunks of an interrupted preparation, by their number; damaged ones are said, and removed."""
        found = {}
        for path in self._chunks.glob(f"*{WRITING}"):
            path.unlink()
        for path in sorted(self._chunks.glob("*.safetensors")):
            number, _, checksum = path.stem.partition("-")
            if _checksum(path) == checksum:
                found[int(number)] = open_chunk(path)
            else:
                self._log(f"{path} is damaged: it is made anew")
                path.unlink()
        return found

    def forget(self) -> None:
        """Remove the chunks of a preparation that cannot be finished: the same rows would fail again."""
        shutil.rmtree(self._chunks, ignore_errors=True)

    def keep(self, number: int, chunk: Chunk) -> Chunk:
        """Write a chunk, for this preparation or for one that goes on with it."""
        beside = self.beside(number)
        with writing(_WHAT, self._chunks, note=_NOTE):
            write_chunk(beside, chunk)
        return self.adopt(number, beside)

    def beside(self, number: int) -> Path:
        """Where a chunk is written before it is adopted; another start has other places."""
        with writing(_WHAT, self._chunks, note=_NOTE):
            self._chunks.mkdir(exist_ok=True)
        return self._chunks / f"{number:07}-{os.getpid()}{WRITING}"

    def adopt(self, number: int, beside: Path) -> Chunk:
        """Give a chunk that was written whole its name."""
        with writing(_WHAT, self._chunks, note=_NOTE):
            path = self._chunks / f"{number:07}-{_checksum(beside)}.safetensors"
            beside.rename(path)
        return open_chunk(path)

    def finish(self, parts: Sequence[TokenizedPart], numbers: np.ndarray, facts: Mapping[str, Any]) -> Stored:
        """Join all chunks into what is opened from now on.

        Raises:
          ValueError: as `join_parts` does.
        """
        notes, names = join_notes(parts), array_names(parts)
        with writing(_WHAT, self._path, note=_NOTE), new_directory(_WHAT, self._path) as beside:
            fingerprint = Fingerprint(parts[0].settings)
            for name in names:
                _write_pieces(
                    beside / f"{name}.npy", lambda name=name: pieces(parts, name), name, fingerprint
                )
            _write_pieces(beside / f"{ORIGIN}.npy", lambda: pieces(parts, ORIGIN), ORIGIN, None)
            np.save(beside / f"{NUMBERS}.npy", numbers)
            tokens = {"fingerprint": fingerprint.hexdigest(), **notes.as_fields()}
            text = json.dumps({**facts, "arrays": names, "tokens": tokens})
            (beside / FACTS).write_text(text, encoding="utf-8")
        self.forget()
        self._make_room()
        stored = self.open()
        assert stored is not None, "what was just written is whole"
        return stored

    def _make_room(self) -> None:
        """Remove what was not opened for the longest time, other than this, until the limit holds."""
        others = [path for path in self._root.iterdir() if path.is_dir() and path != self._path]
        left = _size(self._path)
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
            left += _size(path)
            if left > self._limit and not _is_held(path.with_name(path.name.partition(".")[0] + LOCK)):
                self._log(f"{path} is removed: the store of {_WHAT} is above data.token_store_limit")
                left -= _size(path)
                shutil.rmtree(path, ignore_errors=True)


def _write_pieces(
    path: Path, pieces_of: Callable[[], Iterator[np.ndarray]], name: str, fingerprint: Fingerprint | None
) -> None:
    """An array as a .npy file, piece by piece, and into the fingerprint."""
    length, dtype = 0, np.dtype(np.int64)
    for piece in pieces_of():
        length, dtype = length + len(piece), piece.dtype
    if fingerprint is not None:
        fingerprint.begin(name, dtype, length)
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces_of():
            file.write(np.ascontiguousarray(piece).data)
            if fingerprint is not None:
                fingerprint.add(piece)


def _map(path: Path) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="r").view(np.ndarray)  # which refuses pickled objects


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())


def _is_held(lock: Path) -> bool:
    if not lock.is_file():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
