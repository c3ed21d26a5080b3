"""Data that several processes read together: each reads and tokenises a part, and all get all token ids.

What comes out is the same to the bit as where one process does it alone: rows, order, counts, messages and
fingerprint. Texts stay where they were read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from dpo.data.columns import BY_COLUMNS, RowReading
from dpo.data.expansion import Expand
from dpo.data.joining import TokenizedPart, join_parts
from dpo.data.preferences import (
    OnError,
    ReadPreferences,
    ReadSummary,
    check_read,
    has_groups,
    join_summaries,
    read_part,
)
from dpo.data.settling import settle
from dpo.data.sources import FOR_NEIGHBOURS, Part, cut, cut_whole
from dpo.data.tokenized import TokenizedDataset


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
    settled = RowReading.from_json(peers.on_main(lambda: settle(source, split, reading).as_json()))
    own: list[ReadPreferences] = []

    def read() -> bytes:
        own.append(read_part(source, split, Part(*parts[peers.index]), expand, settled))
        locations = [preference.location for preference in own[0].preferences]
        return json.dumps([*own[0][1:], locations]).encode()

    summaries: list[ReadSummary] = []
    locations: list[str] = []
    for *summary, where in map(json.loads, peers.from_all(read)):
        summaries.append(ReadSummary.from_json(summary))
        locations += where
    whole = join_summaries(summaries)
    check_read(source, whole, len(locations), on_error)
    return ReadPreferences(own[0].preferences, *whole), locations


def _cut(source: str, split: str, count: int, limit: int | None, reading: RowReading) -> list[Part]:
    """A part for each process; where neighbouring rows may be one, all rows for the first."""
    if not has_groups(source, split, limit, reading):
        return cut(source, split, count=count, limit=limit)
    whole = cut_whole(source, split, limit=limit, helps=FOR_NEIGHBOURS)
    return [whole, *[whole._replace(rows=0)] * (count - 1)]


def tokenize_together(tokenize_own: Callable[[], TokenizedPart], peers: Peers) -> TokenizedDataset:
    """The whole data set, of which this process tokenises its part.

    Raises:
      ValueError: in every process, as `tokenize` does.
    """
    return join_parts([decode_part(part) for part in peers.from_all(lambda: encode_part(tokenize_own()))])


def encode_part(part: TokenizedPart) -> bytes:
    """Arrays as safetensors, which sorts them; their order and what else there is as JSON in one more."""
    facts = np.frombuffer(json.dumps([list(part.arrays), *part[2:]]).encode(), np.uint8)
    arrays = {**part.arrays, "origin": part.origin, "facts": facts}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decode_part(data: bytes) -> TokenizedPart:
    arrays = load(data)
    names, *facts = json.loads(arrays["facts"].tobytes())
    return TokenizedPart({name: arrays[name] for name in names}, arrays["origin"], *facts)
