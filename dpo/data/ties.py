"""Rows in which no response is better than another: they have no pair, and no order to learn."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Bool

from dpo.data.tokenized import RowsOf, TokenizedDataset


def has_order(dataset: TokenizedDataset) -> Bool[np.ndarray, " n"]:
    """Which rows have two responses of different rank."""
    starts = dataset.row_offsets[:-1]
    return np.minimum.reduceat(dataset.ranks, starts) < np.maximum.reduceat(dataset.ranks, starts)


def without_ties(dataset: TokenizedDataset) -> TokenizedDataset:
    """The rows that have an order; the others are counted as dropped, for "no_pair"."""
    kept = has_order(dataset)
    if kept.all():
        return dataset
    return dataclasses.replace(
        dataset,
        **RowsOf(dataset, kept),
        origin=dataset.origin[kept],
        fingerprint=hashlib.sha256(f"without ties {dataset.fingerprint}".encode()).hexdigest(),
        dropped=dataset.dropped | {"no_pair": int((~kept).sum())},
    )
