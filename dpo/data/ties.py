"""Rows in which no response is better than another: they have no pair, and no order to learn."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Bool, Int

from dpo.data.tokenized import TokenizedDataset


def has_order(dataset: TokenizedDataset) -> Bool[np.ndarray, " n"]:
    """Which rows have two responses of different rank."""
    starts = dataset.row_offsets[:-1]
    return np.minimum.reduceat(dataset.ranks, starts) < np.maximum.reduceat(dataset.ranks, starts)


def without_ties(dataset: TokenizedDataset) -> TokenizedDataset:
    """The rows that have an order; the others are counted as dropped, for "no_pair"."""
    kept = has_order(dataset)
    if kept.all():
        return dataset
    responses = np.repeat(kept, dataset.num_responses)
    lengths = np.diff(dataset.response_offsets)
    return dataclasses.replace(
        dataset,
        prompt_tokens=dataset.prompt_tokens[np.repeat(kept, dataset.prompt_lengths)],
        prompt_offsets=_offsets(dataset.prompt_lengths[kept]),
        response_tokens=dataset.response_tokens[np.repeat(responses, lengths)],
        response_offsets=_offsets(lengths[responses]),
        row_offsets=_offsets(dataset.num_responses[kept]),
        ranks=dataset.ranks[responses],
        scores=dataset.scores[responses],
        scored=None if dataset.scored is None else dataset.scored[np.repeat(responses, lengths)],
        origin=dataset.origin[kept],
        fingerprint=hashlib.sha256(f"without ties {dataset.fingerprint}".encode()).hexdigest(),
        dropped=dataset.dropped | {"no_pair": int((~kept).sum())},
    )


def _offsets(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " _"]:
    return np.cumsum([0, *lengths.tolist()], dtype=np.int64)
