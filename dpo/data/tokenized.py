"""Token ids of prompts and responses as flat arrays: a whole data set, or the parts that make it up."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dpo.outcomes import UserError


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Token ids of n prompts and their m responses in all, end to end, and what was left out."""

    prompt_tokens: Int[np.ndarray, " A"]
    prompt_offsets: Int[np.ndarray, " _"]
    """Prompt i is `prompt_tokens[prompt_offsets[i]:prompt_offsets[i + 1]]`."""
    response_tokens: Int[np.ndarray, " B"]
    response_offsets: Int[np.ndarray, " _"]
    """Response j is `response_tokens[response_offsets[j]:response_offsets[j + 1]]`."""
    row_offsets: Int[np.ndarray, " _"]
    """Responses of prompt i, best first, are row_offsets[i] … row_offsets[i + 1] − 1."""
    ranks: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    """Given scores; NaN where the data has none."""
    origin: Int[np.ndarray, " n"]
    """Index of each row in the list of preferences that was tokenised."""
    fingerprint: str
    """SHA-256 over token ids, order, ranks, scores, template text and policies."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Preferences left out, by reason."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Where the first preference of each reason stands, and what was found."""
    num_truncated: int = 0
    """Preferences that lost tokens to the truncation policy."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What else is to be known of the tokens, and of how many preferences it holds."""
    first_remarks: dict[str, str] = field(default_factory=dict)
    """Where the first preference of each remark stands."""
    scored: Bool[np.ndarray, " B"] | None = None
    """Which response tokens are scored; the others are read only. All where None."""

    def __len__(self) -> int:
        return len(self.origin)

    @property
    def num_responses(self) -> Int[np.ndarray, " n"]:
        """K of every prompt."""
        return np.diff(self.row_offsets)

    @property
    def max_responses(self) -> int:
        """The K that a batch of these rows has."""
        return int(self.num_responses.max())

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of every prompt."""
        return np.diff(self.prompt_offsets)

    @property
    def response_lengths(self) -> Int[np.ndarray, "n K"]:
        """Tokens of every response, read or scored; 0 where absent."""
        return self._by_row(np.diff(self.response_offsets))

    @property
    def scored_lengths(self) -> Int[np.ndarray, "n K"]:
        """Scored tokens of every response; 0 where absent."""
        return self._by_row(self.scored_counts)

    @property
    def scored_counts(self) -> Int[np.ndarray, " m"]:
        """Scored tokens of every response, one after the other."""
        if self.scored is None:
            return np.diff(self.response_offsets)
        return np.diff(np.concatenate([[0], np.cumsum(self.scored)])[self.response_offsets])

    def _by_row(self, values: Int[np.ndarray, " m"]) -> Int[np.ndarray, "n K"]:
        counts = self.num_responses
        table = np.zeros((len(self), self.max_responses), dtype=np.int64)
        table[np.arange(self.max_responses) < counts[:, None]] = values
        return table

    def prompt(self, row: int | np.integer) -> Int[np.ndarray, " _"]:
        """Token ids of one prompt."""
        return self.prompt_tokens[self.prompt_offsets[row] : self.prompt_offsets[row + 1]]

    def responses(self, row: int | np.integer) -> list[Int[np.ndarray, " _"]]:
        """Token ids of one prompt's responses, best first."""
        offsets = self.response_offsets[self.row_offsets[row] : self.row_offsets[row + 1] + 1]
        return [self.response_tokens[a:b] for a, b in pairwise(offsets)]

    def scored_of(self, row: int | np.integer) -> list[Bool[np.ndarray, " _"]]:
        """Which tokens of one prompt's responses are scored."""
        offsets = self.response_offsets[self.row_offsets[row] : self.row_offsets[row + 1] + 1]
        if self.scored is None:
            return [np.ones(b - a, dtype=bool) for a, b in pairwise(offsets)]
        return [self.scored[a:b] for a, b in pairwise(offsets)]


class TokenizedPart(NamedTuple):
    """Token ids of preferences that are one after the other in the data, some of all."""

    arrays: dict[str, Any]
    """As in a `TokenizedDataset`; offsets count from the part's start, and so does origin."""
    origin: Int[np.ndarray, " n"]
    num_preferences: int
    """How many were tokenised, the dropped ones included."""
    dropped: dict[str, int]
    first_dropped: dict[str, str]
    num_truncated: int
    too_long: list[str]
    """Where preferences longer than `max_length` stand, and their length."""
    settings: dict[str, Any]
    """Template text and policies, the same in all parts."""
    remarks: dict[str, int] = {}  # noqa: RUF012 (nobody changes it)
    first_remarks: dict[str, str] = {}  # noqa: RUF012

    @property
    def num_response_tokens(self) -> int:
        """Tokens of all responses."""
        return len(self.arrays["response_tokens"])


def join_parts(parts: Sequence[TokenizedPart]) -> TokenizedDataset:
    """The data set of all parts, the same to the bit however many there are.

    Raises:
      ValueError: when a preference is too long and may be neither cut nor dropped, or when none is left.
    """
    settings = parts[0].settings
    too_long = [line for part in parts for line in part.too_long]
    if too_long and settings["truncation"] == "error":
        raise UserError(_too_long_message(too_long, settings["max_length"]))
    notes = Notes()
    for part in parts:
        notes.add(part)
    arrays = {}
    parts = _with_scored(parts)
    for name in parts[0].arrays:
        join = _join_offsets if name.endswith("_offsets") else np.concatenate
        arrays[name] = join([part.arrays[name] for part in parts])
    starts = np.cumsum([0, *(part.num_preferences for part in parts[:-1])])
    counts = [len(part.origin) for part in parts]
    origin = np.concatenate([part.origin for part in parts]) + np.repeat(starts, counts)
    if not len(origin):
        raise UserError(f"no preference is left after tokenisation: {notes.describe()}")
    return TokenizedDataset(
        **arrays,
        origin=origin,
        fingerprint=_fingerprint(arrays, settings),
        dropped=dict(notes.counts),
        first_dropped=notes.first,
        num_truncated=notes.num_truncated,
        remarks=dict(notes.remarks),
        first_remarks=notes.first_remarks,
    )


def _with_scored(parts: Sequence[TokenizedPart]) -> list[TokenizedPart]:
    """The parts with flags of what is scored in all of them, where one has any."""
    if not any("scored" in part.arrays for part in parts):
        return list(parts)
    return [
        part._replace(
            arrays={
                **part.arrays,
                "scored": part.arrays.get("scored", np.ones(part.num_response_tokens, bool)),
            }
        )
        for part in parts
    ]


def make_dataset(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    ranks: Sequence[Sequence[int]] | None = None,
    scores: Sequence[Sequence[float] | None] | None = None,
    scored: Sequence[Sequence[Sequence[bool]] | None] | None = None,
    settings: Mapping[str, object] | None = None,
) -> TokenizedDataset:
    """A data set from token ids: of each prompt, and of its responses, best first.

    Without `ranks` there are no ties, without `scored` all tokens of responses are scored.
    `settings` is what made the ids, for the fingerprint.
    """
    arrays = flat_arrays(
        prompts,
        responses,
        ranks=ranks or [range(len(mine)) for mine in responses],
        scores=scores or [None] * len(responses),
        scored=scored or [None] * len(responses),
    )
    return TokenizedDataset(
        **arrays,
        origin=np.arange(len(prompts), dtype=np.int64),
        fingerprint=_fingerprint(arrays, settings or {}),
    )


def flat_arrays(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    ranks: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float] | None],
    scored: Sequence[Sequence[Sequence[bool]] | None],
) -> dict[str, Any]:
    """What a `TokenizedDataset` holds of prompts and responses; "scored" only where not all tokens are."""
    prompt_tokens, prompt_offsets = _join(prompts)
    response_tokens, response_offsets = _join([response for mine in responses for response in mine])
    nothing = float("nan")
    filled = [s or [nothing] * len(mine) for s, mine in zip(scores, responses, strict=True)]
    flags = {} if not any(scored) else {"scored": _flags(responses, scored)}
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_offsets": prompt_offsets,
        "response_tokens": response_tokens,
        "response_offsets": response_offsets,
        "row_offsets": np.cumsum([0, *map(len, responses)], dtype=np.int64),
        "ranks": np.asarray([rank for mine in ranks for rank in mine], dtype=np.int32),
        "scores": np.asarray([score for mine in filled for score in mine], dtype=np.float32),
        **flags,
    }


def _flags(
    responses: Sequence[Sequence[Sequence[int]]], scored: Sequence[Sequence[Sequence[bool]] | None]
) -> Bool[np.ndarray, " B"]:
    pieces = [
        np.asarray(mine[k], bool) if mine else np.ones(len(response), bool)
        for row, mine in zip(responses, scored, strict=True)
        for k, response in enumerate(row)
    ]
    return np.concatenate(pieces)


class Notes:
    """What was left out or cut: how often, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.num_truncated = 0
        self.remarks: Counter[str] = Counter()
        self.first_remarks: dict[str, str] = {}

    def drop(self, reason: str, detail: str, location: str) -> None:
        """One more that is left out."""
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{location}: {detail}")

    def remark(self, remarks: Iterable[str], location: str) -> None:
        """Things to say of one that is kept."""
        for remark in dict.fromkeys(remarks):
            self.remarks[remark] += 1
            self.first_remarks.setdefault(remark, location)

    def add(self, part: TokenizedPart) -> None:
        """Those of a part that comes after what was counted."""
        self.counts.update(part.dropped)
        self.first |= {**part.first_dropped, **self.first}
        self.num_truncated += part.num_truncated
        self.remarks.update(part.remarks)
        self.first_remarks |= {**part.first_remarks, **self.first_remarks}

    def describe(self) -> str:
        """Every reason, how often it was, and where first."""
        parts = [f"{count} x {reason} (first: {self.first[reason]})" for reason, count in self.counts.items()]
        return "; ".join(parts) or "there were none"


def _too_long_message(too_long: list[str], max_length: int) -> str:
    shown = "\n  ".join(too_long[:20])
    more = f"\n  and {len(too_long) - 20} more" if len(too_long) > 20 else ""
    return (
        f"{len(too_long)} preferences are longer than max_length {max_length}:\n  {shown}{more}\n"
        "Raise max_length, or choose truncation drop, truncate_prompt_left or truncate_response_right."
    )


def _join(pieces: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " _"]]:
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return np.fromiter((token for piece in pieces for token in piece), np.int32, int(offsets[-1])), offsets


def _join_offsets(parts: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " _"]:
    """Offsets of parts that stand end to end, each part's beginning with 0."""
    starts = np.cumsum([0, *(part[-1] for part in parts[:-1])])
    shifted = [part[1:] + start for part, start in zip(parts, starts, strict=True)]
    return np.concatenate([parts[0][:1], *shifted])


def _fingerprint(arrays: dict[str, np.ndarray], settings: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
