"""Which rows of tokenised data have the same prompt."""

from __future__ import annotations

import hashlib

import numpy as np

from dpo.data.tokenized import TokenizedDataset


def prompt_digests(dataset: TokenizedDataset) -> list[bytes]:
    """A digest of each row's prompt; equal token ids have equal digests."""
    return [
        hashlib.blake2b(np.ascontiguousarray(dataset.prompt(row)).data, digest_size=16).digest()
        for row in range(len(dataset))
    ]
