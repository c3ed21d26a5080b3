"""What the rows of a source say together of how each of them is read, found out before any is learned.

    counts_from    verdicts in numbers on `response_a` and `response_b`: a 0 says that they count from 0, a 2
                   that they count from 1; rows of 1 alone say neither, and are refused
    repeats        text responses that begin with the text of their prompt, in most of the first rows: whole
                   texts beside a prompt, which is not to be learned twice

A number that does not fit is refused where its row is read (`OTHER_NUMBERS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from dpo.data.answers import find_sides
from dpo.data.choices import count_of, counts_by_name
from dpo.data.columns import Columns, RowReading
from dpo.data.conversations import repeats_prompt
from dpo.data.malformed import MalformedRowError
from dpo.data.rows import read_row
from dpo.data.sources import Part, read_rows

FIRST_ROWS = 64
"""Rows that say whether responses repeat their prompts."""


def settle(source: str, split: str, reading: RowReading) -> RowReading:
    """How the rows of a source are read, with what they say of it together.

    Raises:
      ValueError: when there is no such source, or it cannot be read.
    """
    return settle_rows(lambda: (row for _, row in read_rows(source, split, Part())), reading)


def settle_rows(rows: Callable[[], Iterable[Any]], reading: RowReading) -> RowReading:
    """The same of rows that a function gives, each time from the first on."""
    first = list(islice(rows(), FIRST_ROWS))
    if any(_sides(row, reading) for row in first):
        reading = reading._replace(counts_from=_find_count(rows(), reading))
    found = [one for row in first if (one := _repeats(row, reading)) is not None]
    return reading._replace(repeats=2 * sum(found) > len(found))


def _find_count(rows: Iterable[Any], reading: RowReading) -> int | None:
    """What the first verdict that is no tie and no 1 says; None where it is a word, or there is none."""
    for row in rows:
        if (found := _sides(row, reading)) is not None:
            columns, names, verdict = found
            count = count_of(columns[verdict], names)
            if count is not None:
                return count if isinstance(count, int) else None
    return None


def _sides(row: Any, reading: RowReading) -> tuple[Columns, tuple[str, str], str] | None:
    """A row of two sides whose names do not say how numbers count: the row, both names, the verdict's."""
    if not isinstance(row, Mapping):
        return None
    try:
        columns = Columns(row, reading)
        names, verdict = find_sides(columns)
    except MalformedRowError:
        return None
    return None if counts_by_name(names) else (columns, names, verdict)


def _repeats(row: Any, reading: RowReading) -> bool | None:
    try:
        preference = read_row(row, location="", source="", reading=reading).preference
    except MalformedRowError:
        return None
    return repeats_prompt(preference.prompt, preference.responses)
