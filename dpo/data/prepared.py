"""The tokens of a source, opened where they are stored and made where they are not.

Rows are read and tokenised in chunks (`chunks`). With a store every chunk goes to disk as soon as it is made
(`token_store`), and where they are many several processes make them (`token_processes`): texts are never held
but for a chunk. Tokens, order, fingerprints and errors are those of `read_preferences` and `tokenize` on the
whole source.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.data.chunks import CHUNK_ROWS, Chunk, ChunkReader, Notice, TokenJob, Untokenized
from dpo.data.joining import join_parts
from dpo.data.preferences import (
    OnError,
    ReadSummary,
    check_read,
    fingerprint,
    has_groups,
    join_summaries,
)
from dpo.data.settling import settle
from dpo.data.sources import FOR_NEIGHBOURS, Part, cut, cut_every, cut_whole, fingerprint_rows, is_read_whole
from dpo.data.token_processes import Numbered, count_processes, make_chunks
from dpo.data.token_store import Stored, TokenStore
from dpo.data.tokenized import TokenizedDataset
from dpo.data.tokenizer_rules import is_plain, rules_of
from dpo.outcomes import UserError

PROGRESS_SECONDS = 15.0
"""Between two lines that say how far the preparation has come."""
_FORMAT = 1
_PACKAGES = ("tokenizers", "transformers", "jinja2", "numpy", "safetensors", "datasets", "pyarrow")

Log = Callable[[str], None]


class Locations(Sequence[str]):
    """Where preferences stand: names of sources, each with the lines or rows that its own stand in."""

    def __init__(self, pieces: Sequence[tuple[str, np.ndarray]]) -> None:
        self.pieces = [(name, numbers) for name, numbers in pieces]
        self._ends = np.cumsum([len(numbers) for _, numbers in pieces])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"preference {index} of {len(self)}")
        piece = int(np.searchsorted(self._ends, place, side="right"))
        name, numbers = self.pieces[piece]
        return f"{name}:{numbers[place - int(self._ends[piece])]}"


def join_locations(given: Sequence[Sequence[str]]) -> Sequence[str]:
    """The locations of several sources, end to end."""
    if all(isinstance(one, Locations) for one in given):
        return Locations([piece for one in given if isinstance(one, Locations) for piece in one.pieces])
    return [location for one in given for location in one]


class Prepared(NamedTuple):
    """The preferences of a source without their texts."""

    summary: ReadSummary
    tokens: TokenizedDataset
    locations: Locations
    """Where every preference stands that was read."""
    content: str
    """SHA-256 of what the preferences say, as `fingerprint` has it."""


class Store(NamedTuple):
    """Where tokens are kept from start to start."""

    directory: Path
    limit: int
    """Bytes."""


def prepare(
    job: TokenJob,
    *,
    on_error: OnError,
    limit: int | None,
    store: Store | None,
    log: Log,
    notice: Notice | None = None,
) -> Prepared:
    """The tokens of the first `limit` rows of a source.

    `notice` is called with each preference that is read here for them, in order: with none whose tokens are
    kept or made in another process.

    Without a store, or where the tokenizer is none of which the rules can be written down (a slow one, which
    is said), they are made at every call.

    Raises:
      ValueError: as `read_preferences` and `tokenize` do.
      EnvironmentFailure: when the store cannot be written to.
    """
    work = _Work(job, on_error, limit, log, notice)
    rules = rules_of(job.tokenizer)
    if store is None or rules is None:
        if store is not None:
            log(
                f"{type(job.tokenizer).__name__} is no tokenizer with a tokenizer.json: it is slow, and its "
                "tokens are made anew at every start; allowed: a model directory with a tokenizer.json"
            )
        return work.settled().in_memory()
    key = _fingerprint(job, on_error, limit, rules)
    kept = TokenStore(store.directory, key, limit=store.limit, log=log)
    with kept.held():
        found = kept.open()
        return _as_prepared(work.settled().into(kept, rules) if found is None else found)


class _Work(NamedTuple):
    """A preparation: what is to be done, and how."""

    job: TokenJob
    on_error: OnError
    limit: int | None
    log: Log
    notice: Notice | None

    def settled(self) -> _Work:
        """The same, with what the rows say together of how each is read, which follows from them."""
        job = self.job
        return self._replace(job=job._replace(reading=settle(job.source, job.split, job.reading)))

    def in_memory(self) -> Prepared:
        """All of it, kept nowhere."""
        results = _Results(self._cut(), {}, self)
        self._make_here(results, results.missing(), lambda _, chunk: chunk)
        chunks, summary = self._check(results.in_order())
        tokens = join_parts([chunk.part for chunk in chunks])
        name, numbers, content = _whole(chunks)
        return Prepared(summary, tokens, Locations([(name, numbers)]), content)

    def into(self, store: TokenStore, rules: list[Any]) -> Stored:
        """What the store lacks of it."""
        try:
            results = _Results(self._cut(), store.finished(), self)
            self._make_missing(results, store, rules)
            chunks, summary = self._check(results.in_order())
            name, numbers, content = _whole(chunks)
            facts = {"summary": summary, "name": name, "content": content}
            return store.finish([chunk.part for chunk in chunks], numbers, facts)
        except UserError:
            store.forget()
            raise

    def _make_missing(self, results: _Results, store: TokenStore, rules: list[Any]) -> None:
        """All that is missing, in several processes where it is much and the source can be read in parts."""
        missing = results.missing()
        count = count_processes(len(missing))
        if count == 1 or not is_plain(self.job.tokenizer) or is_read_whole(self.job.source):
            self._make_here(results, missing, store.keep)
            return
        made = make_chunks(
            self.job,
            rules,
            missing,
            count=count,
            path_of=store.beside,
            is_read_only=results.is_read_only,
        )
        with closing(made):
            for number, result in made:
                if result is None:
                    self._make_here(results, [(number, results.parts[number])], store.keep)
                else:
                    results.add(number, store.adopt(number, result) if isinstance(result, Path) else result)

    def _make_here(
        self, results: _Results, parts: Sequence[Numbered], keep: Callable[[int, Chunk], Chunk]
    ) -> None:
        reader = ChunkReader(self.job, self.notice)
        for number, part in parts:
            result = reader.check(part) if results.is_read_only(number) else reader.tokenize(part)
            results.add(number, keep(number, result) if isinstance(result, Chunk) else result)

    def _cut(self) -> list[Part]:
        """Parts of `CHUNK_ROWS`; one part where neighbouring rows may belong together."""
        source, split, limit = self.job.source, self.job.split, self.limit
        if has_groups(source, split, limit, self.job.reading):
            return [cut_whole(source, split, limit=limit, helps=FOR_NEIGHBOURS)]
        return cut_every(source, split, rows=CHUNK_ROWS, limit=limit) or cut(
            source, split, count=1, limit=limit
        )

    def _check(self, results: Sequence[Chunk | Untokenized]) -> tuple[list[Chunk], ReadSummary]:
        """All chunks in order.

        Raises:
          ValueError: first about rows that cannot be read, then about those that cannot be tokenised.
        """
        summary = join_summaries(result.summary for result in results)
        count = sum(
            result.part.num_preferences if isinstance(result, Chunk) else result.num_preferences
            for result in results
        )
        check_read(self.job.source, summary, count, self.on_error)
        for result in results:
            if isinstance(result, Untokenized) and result.error is not None:
                raise result.error
        return [result for result in results if isinstance(result, Chunk)], summary


class _Results:
    """What became of each part, and what of the others is still worth to be made."""

    def __init__(self, parts: Sequence[Part], finished: Mapping[int, Chunk], work: _Work) -> None:
        self.parts = parts
        self._made: dict[int, Chunk | Untokenized] = {
            i: chunk for i, chunk in finished.items() if i < len(parts)
        }
        self._progress = _Progress(parts, self._made, work.log)
        self._stops = work.on_error == "stop"
        self._refused_from = len(parts)

    def missing(self) -> list[Numbered]:
        """Parts that nothing became of yet."""
        return [(number, part) for number, part in enumerate(self.parts) if number not in self._made]

    def is_read_only(self, number: int) -> bool:
        """Whether the data are known to be refused, and this part can only add problems of its rows."""
        return number > self._refused_from

    def add(self, number: int, result: Chunk | Untokenized) -> None:
        """One more is done."""
        self._made[number] = result
        self._progress.say(number)
        if result.summary.problems and self._stops:
            self._refused_from = -1
        elif isinstance(result, Untokenized) and result.error is not None:
            self._refused_from = min(self._refused_from, number)

    def in_order(self) -> list[Chunk | Untokenized]:
        """All of them."""
        return [self._made[number] for number in range(len(self.parts))]


class _Progress:
    """Says every so often how many rows are done, and how long the others should take."""

    def __init__(self, parts: Sequence[Part], finished: Mapping[int, Any], log: Log) -> None:
        self._rows, self._log = [part.rows or 0 for part in parts], log
        self._done = self._before = sum(self._rows[number] for number in finished)
        self._began = self._said = time.monotonic()
        if self._before:
            log(f"preparing tokens: going on after {self._before} of {sum(self._rows)} rows")

    def say(self, number: int) -> None:
        """One more part is done."""
        self._done += self._rows[number]
        now = time.monotonic()
        if now - self._said < PROGRESS_SECONDS or self._done == self._before:
            return
        whole, self._said = sum(self._rows), now
        left = round((now - self._began) / (self._done - self._before) * (whole - self._done))
        shown = f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"
        self._log(f"preparing tokens: {self._done} of {whole} rows, {shown} left")


def _whole(chunks: Sequence[Chunk]) -> tuple[str, np.ndarray, str]:
    """Name and numbers of all locations, and the fingerprint of all that the preferences say."""
    name = next((chunk.name for chunk in chunks if len(chunk.numbers)), "")
    content = fingerprint(chunk.digests.tobytes() for chunk in chunks)
    return name, np.concatenate([chunk.numbers for chunk in chunks]), content


def _as_prepared(stored: Stored) -> Prepared:
    facts = stored.facts
    summary = ReadSummary.from_json(facts["summary"])
    return Prepared(summary, stored.tokens, Locations([(facts["name"], stored.numbers)]), facts["content"])


# ---- what determines tokens ----


def _fingerprint(job: TokenJob, on_error: OnError, limit: int | None, rules: Any) -> str:
    """Of the rows, the tokenizer, all settings, and the code that makes tokens of them."""
    facts = {
        "format": [_FORMAT, CHUNK_ROWS],
        "code": _fingerprint_code(),
        "versions": [platform.python_version(), *map(version, _PACKAGES)],
        "rows": fingerprint_rows(job.source, job.split),
        "source": [job.source, str(Path(job.source).resolve()), job.split, limit, job.expand, on_error],
        "reading": [job.reading.layout, job.reading.columns, sorted(job.reading.ignored)],
        "tokenizer": rules,
        "policies": dict(job.policies),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _fingerprint_code() -> str:
    """Of every module that has a part in it: other code may make other tokens, whatever its version says."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
