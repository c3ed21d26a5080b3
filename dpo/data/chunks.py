"""A few thousand rows of a source as tokens: made in one go, in whichever process, and kept in one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from dpo.data.columns import RowReading
from dpo.data.expansion import Expand
from dpo.data.joining import ORIGIN, TokenizedPart
from dpo.data.preferences import Preference, ReadPreferences, ReadSummary, digest, read_located
from dpo.data.sources import Part, read_rows
from dpo.data.tokenization import tokenize_part

CHUNK_ROWS = 2048
"""Rows of a chunk: two or three seconds of work, which is what an interruption costs each process."""


Notice = Callable[[Preference], None]
"""What is called with every preference that is read in this process."""


class TokenJob(NamedTuple):
    """What is to be made into tokens, and how: all that a chunk depends on besides its place."""

    source: str
    split: str
    expand: Expand
    reading: RowReading
    tokenizer: PreTrainedTokenizerBase
    policies: Mapping[str, Any]
    """What `tokenize_part` takes by name."""


class Chunk(NamedTuple):
    """Rows that follow each other, read and tokenised."""

    summary: ReadSummary
    part: TokenizedPart
    digests: Int[np.ndarray, " _"]
    """The digest of every preference, end to end, as bytes."""
    name: str
    """What stands before the number in the location of every row."""
    numbers: Int[np.ndarray, " n"]
    """The line or row that each preference stands in."""


class Untokenized(NamedTuple):
    """Rows that follow each other, read only, because they or others cannot be trained on."""

    summary: ReadSummary
    num_preferences: int
    error: BaseException | None
    """What tokenising them raised; None where it was not tried."""


class ChunkReader:
    """Makes chunks of a source one after the other, and opens it once for all of them."""

    def __init__(self, job: TokenJob, notice: Notice | None = None) -> None:
        self._job, self._notice = job, notice
        self._rows: Iterator[tuple[str, Any]] = iter(())
        self._next = -1

    def tokenize(self, part: Part) -> Chunk | Untokenized:
        """A part of the source as a chunk."""
        read = self._read(part)
        try:
            tokens = tokenize_part(read.preferences, self._job.tokenizer, **self._job.policies)
        except Exception as error:
            return Untokenized(read.summary, len(read.preferences), error)
        places = [preference.location.rpartition(":") for preference in read.preferences]
        digests = b"".join(map(digest, read.preferences))
        return Chunk(
            read.summary,
            tokens,
            np.frombuffer(digests, np.uint8),
            places[0][0] if places else self._job.source,
            np.asarray([int(number) for _, _, number in places], np.int64),
        )

    def check(self, part: Part) -> Untokenized:
        """What is wrong with a part's rows, without making tokens of them."""
        read = self._read(part)
        return Untokenized(read.summary, len(read.preferences), None)

    def _read(self, part: Part) -> ReadPreferences:
        """The part's preferences: read on where it follows the last one, else from a newly opened source."""
        if part.offset != self._next:
            self._rows = read_rows(self._job.source, self._job.split, part._replace(rows=None))
        rows = islice(self._rows, part.rows)
        read = read_located(rows, self._job.source, self._job.expand, self._job.reading)
        self._next = part.end
        if self._notice is not None:
            for preference in read.preferences:
                self._notice(preference)
        return read


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Keep a chunk as a file."""
    facts = [chunk.summary, list(chunk.part.arrays), list(chunk.part[2:]), chunk.name]
    arrays = {
        **chunk.part.arrays,
        ORIGIN: chunk.part.origin,
        "digests": chunk.digests,
        "numbers": chunk.numbers,
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, path, metadata={"facts": json.dumps(facts)})


def open_chunk(path: Path) -> Chunk:
    """A chunk that was kept; its token arrays are read from the file whenever one is asked for."""
    with safe_open(path, framework="np") as file:
        summary, names, rest, name = json.loads(file.metadata()["facts"])
    arrays = _ArraysOfFile(path, names)
    return Chunk(
        ReadSummary.from_json(summary),
        TokenizedPart(arrays, arrays[ORIGIN], *rest),
        arrays["digests"],
        name,
        arrays["numbers"],
    )


class _ArraysOfFile(Mapping[str, Any]):
    """Some arrays of a safetensors file by name, none of them held."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self._path, self._names = path, names

    def __getitem__(self, name: str) -> np.ndarray:
        with safe_open(self._path, framework="np") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
