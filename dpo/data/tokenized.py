"""Token ids of prompts and responses as flat arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


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
    """Preferences that lost tokens to the truncation policy; of a mixture also those that it leaves."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What else is to be known of the tokens, and of how many preferences it holds, as above."""
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


class RowsOf(Mapping[str, Any]):
    """The arrays of some rows of a data set but for origin, each made when it is asked for."""

    def __init__(self, dataset: TokenizedDataset, kept: Bool[np.ndarray, " n"]) -> None:
        self._responses = np.repeat(kept, dataset.num_responses)
        self._lengths = np.diff(dataset.response_offsets)
        self._arrays: dict[str, Callable[[], np.ndarray]] = {
            "prompt_tokens": lambda: dataset.prompt_tokens[np.repeat(kept, dataset.prompt_lengths)],
            "prompt_offsets": lambda: _offsets(dataset.prompt_lengths[kept]),
            "response_tokens": lambda: dataset.response_tokens[self._tokens()],
            "response_offsets": lambda: _offsets(self._lengths[self._responses]),
            "row_offsets": lambda: _offsets(dataset.num_responses[kept]),
            "ranks": lambda: dataset.ranks[self._responses],
            "scores": lambda: dataset.scores[self._responses],
        }
        if (scored := dataset.scored) is not None:
            self._arrays["scored"] = lambda: scored[self._tokens()]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def _tokens(self) -> Bool[np.ndarray, " B"]:
        return np.repeat(self._responses, self._lengths)


def _offsets(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " _"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


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


def _join(pieces: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " _"]]:
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(pieces), np.int32, int(offsets[-1])), offsets


class Fingerprint:
    """SHA-256 over settings and named arrays, of which each may come in pieces."""

    def __init__(self, settings: Mapping[str, object]) -> None:
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())

    def begin(self, name: str, dtype: np.dtype, length: int) -> None:
        """An array whose pieces come next."""
        self._digest.update(f"{name} {dtype.str} {(length,)}".encode())

    def add(self, piece: Shaped[np.ndarray, " _"]) -> None:
        """The next piece."""
        self._digest.update(np.ascontiguousarray(piece).data)

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()


def _fingerprint(arrays: dict[str, np.ndarray], settings: Mapping[str, object]) -> str:
    fingerprint = Fingerprint(settings)
    for name, array in arrays.items():
        fingerprint.begin(name, array.dtype, len(array))
        fingerprint.add(array)
    return fingerprint.hexdigest()
