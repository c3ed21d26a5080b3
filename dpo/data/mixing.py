"""Several sources as one data set: of each the rows that were drawn, one source after the other.

What is drawn of a source depends on its seed, on what it says and on how many rows are wanted of it, and not
on where it stands or on the others. The loader shuffles the rows of all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dpo.data.joining import TokenizedPart, join_parts
from dpo.data.preferences import Preference, digest, fingerprint
from dpo.data.tokenized import RowsOf, TokenizedDataset
from dpo.outcomes import UserError

NOT_DRAWN = "not_drawn"
"""The reason of rows that a mixture leaves, beside those for which rows are left out."""


class Share(NamedTuple):
    """How much of a source is wanted."""

    setting: str
    """The place in the list of sources, such as data.train[1]."""
    name: str
    rows: int | None
    weight: float | None
    seed: int


class Source(NamedTuple):
    """A source that is to be mixed with others."""

    share: Share
    tokens: TokenizedDataset
    num_preferences: int
    """How many were read, those included that are not among the tokens."""
    content: str
    """SHA-256 of what they say, in hexadecimal digits."""


class Drawn(NamedTuple):
    """What a mixture has of a source."""

    name: str
    read: int
    """Preferences that were read of it."""
    kept: int
    """Those of them that it has as tokens."""
    drawn: int
    """Those of these that are in the mixture."""


def mix(sources: Sequence[Source]) -> tuple[TokenizedDataset, list[Drawn]]:
    """The rows that are drawn of each source; origin counts in the preferences of all, end to end.

    Raises:
      ValueError: where more rows are wanted than a source has.
    """
    counts = count_rows([source.share for source in sources], [len(source.tokens) for source in sources])
    settings = {"sources": [source.tokens.fingerprint for source in sources]}
    parts = [_part(source, count, settings) for source, count in zip(sources, counts, strict=True)]
    drawn = [
        Drawn(source.share.name, source.num_preferences, len(source.tokens), count)
        for source, count in zip(sources, counts, strict=True)
    ]
    return join_parts(parts), drawn


def count_rows(shares: Sequence[Share], kept: Sequence[int]) -> list[int]:
    """How many rows of each source are in the mixture.

    `rows` are so many, and a source with neither gives all. Sources with weights give in proportion to them,
    as many as can be without repeating a row.

    Raises:
      ValueError: where more rows are wanted than a source has.
    """
    unit = min(
        (count / share.weight for share, count in zip(shares, kept, strict=True) if share.weight), default=0.0
    )
    counts = []
    for share, count in zip(shares, kept, strict=True):
        if share.rows is not None and share.rows > count:
            raise UserError(
                f"{share.setting}.rows is {share.rows}, and {count} rows of {share.name} can be trained on; "
                "allowed: up to that"
            )
        given = count if share.rows is None else share.rows
        counts.append(given if share.weight is None else min(count, max(1, round(unit * share.weight))))
    return counts


def draw(source: Source, wanted: int) -> Bool[np.ndarray, " n"]:
    """Which of a source's rows are taken."""
    places = shuffled(source.share, source.content, source.num_preferences)[source.tokens.origin]
    taken = np.zeros(len(source.tokens), bool)
    taken[np.argsort(places)[:wanted]] = True
    return taken


def shuffled(share: Share, content: str, num_preferences: int) -> Int[np.ndarray, " n"]:
    """The place of each preference of a source in the order that rows are taken in.

    A row that is left out otherwise changes no other's place, so that fewer tokens (`max_length`) draw the
    same rows as far as they are there.
    """
    seeds = [share.seed, int(content[:16], 16)]
    return np.random.default_rng(seeds).permutation(num_preferences)


def take(shares: Sequence[Share], sources: Sequence[Sequence[Preference]]) -> list[list[Preference]]:
    """The same of preferences that are no tokens: those that would be drawn if none of them were left out.

    Raises:
      ValueError: where more rows are wanted than a source has.
    """
    counts = count_rows(shares, list(map(len, sources)))
    taken = []
    for share, preferences, wanted in zip(shares, sources, counts, strict=True):
        places = shuffled(share, fingerprint(map(digest, preferences)), len(preferences))
        taken.append([preferences[i] for i in np.sort(np.argsort(places)[:wanted])])
    return taken


def _part(source: Source, wanted: int, settings: dict[str, list[str]]) -> TokenizedPart:
    tokens = source.tokens
    taken = draw(source, wanted)
    left = len(taken) - int(taken.sum())
    return TokenizedPart(
        RowsOf(tokens, taken),
        tokens.origin[taken],
        source.num_preferences,
        tokens.dropped | ({NOT_DRAWN: left} if left else {}),
        tokens.first_dropped,
        tokens.num_truncated,
        [],
        settings,
        tokens.remarks,
        tokens.first_remarks,
    )
