"""Tokens of preferences tokenised in parts become one data set, the same to the bit in any parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from dpo.data.tokenized import Fingerprint, TokenizedDataset
from dpo.outcomes import UserError


class TokenizedPart(NamedTuple):
    """Token ids of preferences that are one after the other in the data, some of all."""

    arrays: Mapping[str, Any]
    """As in a `TokenizedDataset`; offsets count from the part's start, and so does origin."""
    origin: Int[np.ndarray, " n"]
    num_preferences: int
    """How many were tokenised, the dropped ones included."""
    dropped: dict[str, int]
    first_dropped: dict[str, str]
    num_truncated: int
    too_long: list[str]
    """Where preferences longer than `max_length` stand, and their length, where that is an error."""
    settings: dict[str, Any]
    """Template text and policies, the same in all parts."""
    remarks: dict[str, int] = {}  # noqa: RUF012 (nobody changes it)
    first_remarks: dict[str, str] = {}  # noqa: RUF012

    @property
    def num_response_tokens(self) -> int:
        """Tokens of all responses."""
        return int(self.arrays["response_offsets"][-1])


def join_parts(parts: Sequence[TokenizedPart]) -> TokenizedDataset:
    """The data set of all parts, the same to the bit however many there are.

    Raises:
      ValueError: when a preference is too long and may be neither cut nor dropped, or when none is left.
    """
    notes = join_notes(parts)
    fingerprint = Fingerprint(parts[0].settings)
    arrays = {}
    for name in array_names(parts):
        arrays[name] = np.concatenate(list(pieces(parts, name)))
        fingerprint.begin(name, arrays[name].dtype, len(arrays[name]))
        fingerprint.add(arrays[name])
    origin = np.concatenate(list(pieces(parts, ORIGIN)))
    return TokenizedDataset(**arrays, origin=origin, fingerprint=fingerprint.hexdigest(), **notes.as_fields())


def join_notes(parts: Sequence[TokenizedPart]) -> Notes:
    """What was left out or cut in all parts.

    Raises:
      ValueError: as `join_parts` does.
    """
    settings = parts[0].settings
    too_long = [line for part in parts for line in part.too_long]
    if too_long:
        raise UserError(_too_long_message(too_long, settings["max_length"]))
    notes = Notes()
    for part in parts:
        notes.add(part)
    if not any(len(part.origin) for part in parts):
        raise UserError(f"no preference is left after tokenisation: {notes.describe()}")
    return notes


ORIGIN, SCORED = "origin", "scored"


def array_names(parts: Sequence[TokenizedPart]) -> list[str]:
    """Names of the arrays that the data set of all parts has besides origin, in their order."""
    names = [name for name in parts[0].arrays if name != SCORED]
    return names + [SCORED] * any(SCORED in part.arrays for part in parts)


def pieces(parts: Sequence[TokenizedPart], name: str) -> Iterator[Shaped[np.ndarray, " _"]]:
    """One array of the data set of all parts, a piece from each: end to end they are the array."""
    start = 0
    for i, part in enumerate(parts):
        if name == ORIGIN:
            yield part.origin + start
            start += part.num_preferences
        elif name == SCORED and name not in part.arrays:
            yield np.ones(part.num_response_tokens, bool)
        elif name.endswith("_offsets"):
            offsets = part.arrays[name]
            yield offsets if i == 0 else offsets[1:] + start
            start += int(offsets[-1])
        else:
            yield part.arrays[name]


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

    def as_fields(self) -> dict[str, Any]:
        """As a `TokenizedDataset` has them."""
        return {
            "dropped": dict(self.counts),
            "first_dropped": self.first,
            "num_truncated": self.num_truncated,
            "remarks": dict(self.remarks),
            "first_remarks": self.first_remarks,
        }

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
