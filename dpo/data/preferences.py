"""From a file or a Hugging Face data set to `Preference`s, and what was left out on the way and why.

What one row says is read by `dpo.data.rows`. Here are whole sources, and parts of them: malformed rows are
listed with file, line, field and reason, rankings are kept or become pairs, and rows of one response that
belong together (HelpSteer2's) are joined.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo.data.choices import OTHER_NUMBERS
from dpo.data.columns import BY_COLUMNS, RowReading
from dpo.data.conversations import same_prompt
from dpo.data.expansion import Expand, expand_ranking
from dpo.data.layouts import LAYOUTS
from dpo.data.malformed import MalformedRowError
from dpo.data.rows import Preference, digest, join_responses, parse_row, read_row, require_few
from dpo.data.settling import settle
from dpo.data.sources import Part, read_rows
from dpo.outcomes import UserError

__all__ = [
    "MAX_PROBLEMS",
    "DataError",
    "OnError",
    "Preference",
    "Problem",
    "ReadPreferences",
    "ReadSummary",
    "check_read",
    "digest",
    "each_preference",
    "fingerprint",
    "has_groups",
    "join_summaries",
    "parse_row",
    "read_located",
    "read_part",
    "read_preferences",
]

MAX_PROBLEMS = 20


def fingerprint(digests: Iterable[bytes]) -> str:
    """Of rows in their order, by their digests, singly or joined."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


class Problem(NamedTuple):
    """What is wrong with one row."""

    location: str
    field: str
    reason: str
    """Short and countable, such as "empty"."""
    detail: str
    """What was found and what is allowed."""

    def __str__(self) -> str:
        return f"{self.location}: field '{self.field}': {self.detail} [{self.reason}]"


class ReadSummary(NamedTuple):
    """What became of the rows of a source."""

    num_rows: int
    """Rows looked at, the skipped ones included."""
    skipped: dict[str, int]
    """Rows (or tied pairs of an expanded ranking) left out, by reason."""
    problems: list[Problem]
    """The first malformed rows, at most MAX_PROBLEMS, and the first that may not be skipped."""
    layouts: dict[str, int]
    """How many rows were read in each layout."""
    unused: dict[str, int]
    """Columns that no layout read, and in how many rows they said something."""

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> ReadSummary:
        """A summary that was written as JSON."""
        rows, skipped, problems, *rest = values
        return cls(rows, skipped, [Problem(*one) for one in problems], *rest)


def join_summaries(summaries: Iterable[ReadSummary]) -> ReadSummary:
    """Of rows that were read in parts, one after the other."""
    num_rows = 0
    skipped, layouts, unused = Counter[str](), Counter[str](), Counter[str]()
    problems: list[Problem] = []
    for summary in summaries:
        num_rows += summary.num_rows
        skipped.update(summary.skipped)
        layouts.update(summary.layouts)
        unused.update(summary.unused)
        for problem in summary.problems:
            _note(problems, problem)
    return ReadSummary(num_rows, dict(sorted(skipped.items())), problems, dict(layouts), dict(unused))


def _note(problems: list[Problem], problem: Problem) -> None:
    """Add it to the first ones, and to more of them if it is the first that may not be skipped."""
    if len(problems) < MAX_PROBLEMS or (
        problem.reason == OTHER_NUMBERS and all(one.reason != OTHER_NUMBERS for one in problems)
    ):
        problems.append(problem)


class ReadPreferences(NamedTuple):
    """The rows of a source that were read, and what was left out."""

    preferences: list[Preference]
    num_rows: int
    """Rows looked at, the skipped ones included."""
    skipped: dict[str, int]
    """Rows (or tied pairs of an expanded ranking) left out, by reason."""
    problems: list[Problem]
    """The first malformed rows, at most MAX_PROBLEMS, and the first that may not be skipped."""
    layouts: dict[str, int] = {}  # noqa: RUF012 (nobody changes it)
    """How many rows were read in each layout."""
    unused: dict[str, int] = {}  # noqa: RUF012
    """Columns that no layout read, and in how many rows they said something."""

    @property
    def summary(self) -> ReadSummary:
        """All but the preferences."""
        return ReadSummary(*self[1:])


_REMEDY = "Correct them, or set data.on_error to skip, which leaves malformed rows out and counts them."


class DataError(UserError):
    """Rows of the data do not have an accepted format. `problems` holds the first of them."""

    def __init__(
        self,
        source: str,
        problems: Sequence[Problem],
        num_malformed: int,
        num_rows: int,
        remedy: str = _REMEDY,
    ) -> None:
        self.problems = list(problems)
        lines = [f"{source}: {num_malformed} of {num_rows} rows are malformed"]
        lines += _list_problems(problems)
        if num_malformed > len(problems):
            lines.append(f"  and {num_malformed - len(problems)} more")
        lines.append(remedy)
        super().__init__("\n".join(lines))


def _list_problems(problems: Sequence[Problem]) -> list[str]:
    """A line for each, shortened where the one before has the same field and says the same."""
    lines: list[str] = []
    for before, problem in zip([None, *problems], problems, strict=False):
        same = before is not None and before[1:] == problem[1:] and len(problem.detail) > _SHORT
        lines.append(f"  {problem.location}: the same" if same else f"  {problem}")
    return lines


_SHORT = 80
"""Characters of a detail that may stand there on each line."""

OnError = Literal["stop", "skip"]
TIED_PAIR = "tied_pair"
"""The reason by which pairs of equal rank are counted; all others are of malformed rows."""


def read_preferences(
    source: str | Path,
    *,
    split: str = "train",
    on_error: OnError = "stop",
    limit: int | None = None,
    expand: Expand = "ranking",
    reading: RowReading = BY_COLUMNS,
) -> ReadPreferences:
    """Read every row of a JSONL, JSON, Parquet, CSV or Arrow file, a directory, or a hub data set.

    A hub data set may name a configuration or data directory after a colon: `Anthropic/hh-rlhf:helpful-base`.
    `split` is for directories and hub data sets; `limit` takes the first rows only. Raises `DataError` with
    the malformed rows, up to MAX_PROBLEMS, unless `on_error` is "skip".
    """
    name = str(source)
    read = read_part(name, split, Part(rows=limit), expand, settle(name, split, reading))
    check_read(name, read.summary, len(read.preferences), on_error)
    return read


def read_part(
    source: str, split: str, part: Part, expand: Expand, reading: RowReading = BY_COLUMNS
) -> ReadPreferences:
    """The preferences of some rows of a source; malformed rows are counted only."""
    return read_located(read_rows(source, split, part), source, expand, reading)


def read_located(
    rows: Iterable[tuple[str, Any]], source: str, expand: Expand, reading: RowReading = BY_COLUMNS
) -> ReadPreferences:
    """The same of rows of a source that come with where they stand, as `read_rows` gives them."""
    preferences: list[Preference] = []
    notes = _RowNotes()
    for preference in _grouped(_each_row(rows, source, reading, notes), notes):
        if expand == "ranking":
            preferences.append(preference)
            continue
        expanded, num_tied = expand_ranking(preference, expand)
        preferences += expanded
        if num_tied:
            notes.skipped[TIED_PAIR] += num_tied
    return ReadPreferences(
        preferences,
        notes.num_rows,
        dict(sorted(notes.skipped.items())),
        notes.problems,
        dict(notes.layouts),
        dict(notes.unused),
    )


def each_preference(
    source: str, split: str, part: Part, expand: Expand, reading: RowReading = BY_COLUMNS
) -> Iterator[Preference]:
    """The preferences of some rows, one by one; what cannot be read is left out."""
    notes, settled = _RowNotes(), settle(source, split, reading)
    for preference in _grouped(_each_row(read_rows(source, split, part), source, settled, notes), notes):
        yield from expand_ranking(preference, expand)[0]


def has_groups(source: str, split: str, limit: int | None, reading: RowReading) -> bool:
    """Whether the first row that can be read is one that its neighbours may belong to."""
    notes = _RowNotes()
    found = _each_row(read_rows(source, split, Part(rows=limit)), source, reading, notes)
    return any(is_part for _, is_part in islice(found, 1))


class _RowNotes:
    """What is counted while rows are read."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.skipped: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.layouts: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()

    def leave_out(self, location: str, error: MalformedRowError) -> None:
        """One more malformed row."""
        self.skipped[error.reason] += 1
        _note(self.problems, Problem(location, error.field, error.reason, error.detail))


def _each_row(
    rows: Iterable[tuple[str, Any]], source: str, reading: RowReading, notes: _RowNotes
) -> Iterator[tuple[Preference, bool]]:
    """Rows that can be read, and whether each is one of a group."""
    default_source = Path(source).name if Path(source).exists() else source
    layouts, last, is_part = notes.layouts, "", False
    for location, row in rows:
        notes.num_rows += 1
        try:
            preference, layout, unused = read_row(
                row, location=location, source=default_source, reading=reading
            )
        except MalformedRowError as error:
            notes.leave_out(location, error)
            continue
        layouts[layout] += 1
        if layout != last:
            last, is_part = layout, LAYOUTS[layout].groups
        for column in unused:
            notes.unused[column] += 1
        yield preference, is_part


def _grouped(rows: Iterator[tuple[Preference, bool]], notes: _RowNotes) -> Iterator[Preference]:
    """Preferences, of which those that are parts of a group are joined with their neighbours' responses."""
    members: list[Preference] = []
    for preference, is_part in rows:
        if is_part and members and same_prompt(members[-1].prompt, preference.prompt):
            members.append(preference)
            continue
        if members:
            yield from _joined(members, notes)
            members = []
        if is_part:
            members.append(preference)
        else:
            yield preference
    if members:
        yield from _joined(members, notes)


def _joined(members: Sequence[Preference], notes: _RowNotes) -> Iterator[Preference]:
    """A group as one preference; a response that is alone in its group says nothing."""
    try:
        require_few(len(members))
    except MalformedRowError as error:
        notes.leave_out(members[0].location, error)
        return
    if len(members) > 1:
        yield join_responses(members)
    else:
        detail = "no neighbouring row has the same prompt; allowed are two or more in a row"
        notes.leave_out(members[0].location, MalformedRowError("prompt", "lone_response", detail))


def check_read(source: str, read: ReadSummary, num_preferences: int, on_error: OnError) -> None:
    """Refuse malformed rows that are not to be skipped, or may not be, and data of which nothing is left."""
    if read.problems and on_error == "stop":
        num_malformed = sum(count for reason, count in read.skipped.items() if reason != TIED_PAIR)
        raise DataError(source, read.problems, num_malformed, read.num_rows)
    if OTHER_NUMBERS in read.skipped:
        problems = [problem for problem in read.problems if problem.reason == OTHER_NUMBERS]
        remedy = (
            "They cannot be skipped: numbers that do not fit say that those of other rows may mean something "
            "else too. Say it in words, or take these rows out."
        )
        raise DataError(source, problems, read.skipped[OTHER_NUMBERS], read.num_rows, remedy)
    if not num_preferences:
        left_out = ", ".join(f"{count} x {reason}" for reason, count in read.skipped.items())
        found = f"no usable row among {read.num_rows}: left out {left_out}" if left_out else "it has no rows"
        raise UserError(f"{source}: {found}")
