"""Which rows of tokenised data have the same prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from dpo.data.tokenized import TokenizedDataset


def prompt_digests(dataset: TokenizedDataset, rows: Iterable[int | np.integer] | None = None) -> list[bytes]:
    """A digest of each row's prompt, all rows' where none are named; equal token ids have equal digests."""
    chosen = range(len(dataset)) if rows is None else rows
    return [
        hashlib.blake2b(np.ascontiguousarray(dataset.prompt(row)).data, digest_size=16).digest()
        for row in chosen
    ]
