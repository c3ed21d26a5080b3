"""Data that several processes read together: each reads and tokenises a part, and all get all token ids.

What comes out is the same to the bit as where one process does it alone: rows, order, counts, messages and
fingerprint. Texts stay where they were read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from dpo.data.columns import BY_COLUMNS, RowReading
from dpo.data.preferences import (
    MAX_PROBLEMS,
    Expand,
    OnError,
    Problem,
    ReadPreferences,
    check_read,
    has_groups,
    read_part,
)
from dpo.data.sources import Part, cut
from dpo.data.tokenized import TokenizedDataset, TokenizedPart, join_parts


class Peers(NamedTuple):
    """The processes that read together, as one of them sees them."""

    index: int
    count: int
    on_main: Callable[[Callable[[], Any]], Any]
    """What a function gives in the first process, which alone calls it, in all; plain JSON."""
    from_all: Callable[[Callable[[], bytes]], list[bytes]]
    """What a function gives in each process, in their order, in all.

    An error of one is to be raised in all of them, here as well as in `on_main`.
    """


ALONE = Peers(0, 1, lambda function: function(), lambda function: [function()])


def read_together(
    source: str,
    *,
    split: str,
    on_error: OnError,
    limit: int | None,
    expand: Expand,
    peers: Peers,
    reading: RowReading = BY_COLUMNS,
) -> tuple[ReadPreferences, list[str]]:
    """This process's part of the preferences with the counts and problems of all, and where all stand.

    Raises:
      ValueError: in every process, as `read_preferences` does.
    """
    parts = peers.on_main(lambda: _cut(source, split, peers.count, limit, reading))
    own: list[ReadPreferences] = []

    def read() -> bytes:
        own.append(read_part(source, split, Part(*parts[peers.index]), expand, reading))
        locations = [preference.location for preference in own[0].preferences]
        return json.dumps([*own[0][1:], locations]).encode()

    skipped: Counter[str] = Counter()
    problems: list[Problem] = []
    locations: list[str] = []
    layouts: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    num_rows = 0
    for rows, reasons, found, kinds, columns, where in map(json.loads, peers.from_all(read)):
        num_rows += rows
        skipped.update(reasons)
        layouts.update(kinds)
        unused.update(columns)
        problems += [Problem(*problem) for problem in found]
        locations += where
    together = ReadPreferences(
        own[0].preferences,
        num_rows,
        dict(sorted(skipped.items())),
        problems[:MAX_PROBLEMS],
        dict(layouts),
        dict(unused),
    )
    check_read(source, together, len(locations), on_error)
    return together, locations


def _cut(source: str, split: str, count: int, limit: int | None, reading: RowReading) -> list[Part]:
    """A part for each process; where neighbouring rows may be one, all rows for the first."""
    if not has_groups(source, split, limit, reading):
        return cut(source, split, count=count, limit=limit)
    (whole,) = cut(source, split, count=1, limit=limit)
    return [whole, *[whole._replace(rows=0)] * (count - 1)]


def tokenize_together(tokenize_own: Callable[[], TokenizedPart], peers: Peers) -> TokenizedDataset:
    """The whole data set, of which this process tokenises its part.

    Raises:
      ValueError: in every process, as `tokenize` does.
    """
    return join_parts([_decode(part) for part in peers.from_all(lambda: _encode(tokenize_own()))])


def _encode(part: TokenizedPart) -> bytes:
    """Arrays as safetensors, which sorts them; their order and what else there is as JSON in one more."""
    facts = np.frombuffer(json.dumps([list(part.arrays), *part[2:]]).encode(), np.uint8)
    arrays = {**part.arrays, "origin": part.origin, "facts": facts}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _decode(data: bytes) -> TokenizedPart:
    arrays = load(data)
    names, *facts = json.loads(arrays["facts"].tobytes())
    return TokenizedPart({name: arrays[name] for name in names}, arrays["origin"], *facts)
