"""Another prompt's response beside each prompt's own: what measures KTO's baseline."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from dpo.data.tokenized import TokenizedDataset
from dpo.losses.scores import MISMATCHED
from dpo.outcomes import UserError


def add_mismatched(dataset: TokenizedDataset) -> TokenizedDataset:
    """Give every row one more response, of rank `MISMATCHED`: the first of the next row whose tokens fit.

    "Fit" is within the longest prompt plus response that the data has anyway, so that rows do not grow. The
    pairing is a function of the data alone: its reference log-probs are stored like any other.

    Raises:
      ValueError: for fewer than two rows, or a row that no other row's response fits.
    """
    num_rows = len(dataset)
    if num_rows < 2:
        raise UserError(f"the objective needs other prompts' responses, but the data has {num_rows} row")
    longest = int((dataset.prompt_lengths + dataset.response_lengths.max(1)).max())
    tokens, lengths = [], []
    ranks, scores = [], []
    for row in range(num_rows):
        own = dataset.responses(row)
        other = _next_that_fits(dataset, row, longest - int(dataset.prompt_lengths[row]))
        tokens += [*own, other]
        lengths += [len(response) for response in (*own, other)]
        mine = slice(dataset.row_offsets[row], dataset.row_offsets[row + 1])
        ranks += [*dataset.ranks[mine], MISMATCHED]
        scores += [*dataset.scores[mine], np.nan]
    return dataclasses.replace(
        dataset,
        response_tokens=np.concatenate(tokens),
        response_offsets=np.cumsum([0, *lengths]),
        row_offsets=dataset.row_offsets + np.arange(num_rows + 1),
        ranks=np.asarray(ranks, dataset.ranks.dtype),
        scores=np.asarray(scores, dataset.scores.dtype),
        fingerprint=hashlib.sha256(f"mismatched {dataset.fingerprint}".encode()).hexdigest(),
    )


def _next_that_fits(dataset: TokenizedDataset, row: int, room: int) -> np.ndarray:
    for step in range(1, len(dataset)):
        response = dataset.responses((row + step) % len(dataset))[0]
        if len(response) <= room:
            return response
    raise UserError(
        f"row {row}: no other row's response fits its prompt of {dataset.prompt_lengths[row]} tokens"
    )
