"""Which row holds which response, and the arrays of a batch. The picture of a row is in `dpo.data.batch`.

A *piece* is a prompt with one or more of its responses, side by side in one row. Rows have a static length T
and room for N scored tokens. The layouts differ only in what a piece is and how many share a row:

    padded   one response a piece, one piece a row
    packed   one response a piece, as many pieces a row as fit
    shared   as many responses of a prompt a piece as fit (nearly always all), as many pieces a row as fit
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo.data.batch import Batch
from dpo.data.tokenized import TokenizedDataset
from dpo.outcomes import UserError

Layout = Literal["padded", "packed", "shared"]


class Shape(NamedTuple):
    """Static shape of a batch's rows: R, T and N."""

    rows: int
    row_length: int
    scored: int


class Piece(NamedTuple):
    """Some responses of one prompt of a batch, to be laid side by side after the prompt."""

    prompt: int
    """p, the prompt's place in the batch."""
    responses: tuple[int, ...]
    """k of each response."""
    length: int
    """Tokens, the prompt's included."""
    scored: int
    """Scored tokens of the responses."""


Row = list[Piece]


def lay_out(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    *,
    row_length: int,
    scored: int,
    layout: Layout,
    micro_batches: int = 1,
    scored_lengths: Sequence[Sequence[int]] | None = None,
) -> list[list[Row]]:
    """Rows of every micro-batch. A prompt's responses are all in one micro-batch; a function of lengths only.

    `response_lengths` holds the present responses of each prompt; a prompt with none takes no room.
    `scored_lengths` are of their scored tokens alone, the same where not given. Prompts
    go to the micro-batch with the fewest tokens so far, longest first, and pieces to the fullest row that
    still has room, longest first (best-fit decreasing).
    """
    scored_lengths = scored_lengths or response_lengths
    pieces = [
        _cut_pieces(
            p, prompt_lengths[p], response_lengths[p], scored_lengths[p], (row_length, scored), layout
        )
        for p in range(len(prompt_lengths))
    ]
    parts: list[list[Piece]] = [[] for _ in range(micro_batches)]
    totals = [0] * micro_batches
    for mine in sorted(pieces, key=lambda mine: -sum(piece.length for piece in mine)):
        lightest = totals.index(min(totals))
        parts[lightest] += mine
        totals[lightest] += sum(piece.length for piece in mine)
    capacity = 1 if layout == "padded" else row_length
    return [_fill_rows(part, row_length, scored, capacity) for part in parts]


def pack(
    dataset: TokenizedDataset,
    indices: Int[np.ndarray, " P"],
    *,
    shape: Shape,
    layout: Layout,
    num_responses: int,
    micro_batches: int = 1,
    own_rows: Collection[int] | None = None,
) -> Batch:
    """The batch of the data set's rows `indices` (-1 for a padding prompt) as numpy arrays of a given shape.

    Rows are `micro_batches` equal contiguous parts, and each prompt's responses lie wholly in one part. Of
    `own_rows`, where given, tokens are written, and the others stay padding: another process fills them.
    What is known of each prompt is whole.
    """
    prompts = [dataset.prompt(i) if i >= 0 else _NOTHING for i in indices]
    responses = [dataset.responses(i) if i >= 0 else [] for i in indices]
    learned = [dataset.scored_of(i) if i >= 0 else [] for i in indices]
    parts = lay_out(
        [len(prompt) for prompt in prompts],
        [[len(response) for response in mine] for mine in responses],
        row_length=shape.row_length,
        scored=shape.scored,
        layout=layout,
        micro_batches=micro_batches,
        scored_lengths=[[int(flags.sum()) for flags in mine] for mine in learned],
    )
    rows_a_part = shape.rows // micro_batches
    if shape.rows % micro_batches or any(len(part) > rows_a_part for part in parts):
        needed = max(map(len, parts)) * micro_batches
        raise UserError(
            f"{needed} rows are needed in {micro_batches} equal parts; the shape has {shape.rows}"
        )
    batch = _empty_batch(dataset, indices, shape, num_responses)
    for part, rows in enumerate(parts):
        for offset, row in enumerate(rows):
            r = part * rows_a_part + offset
            for piece in row:
                batch.row[piece.prompt, list(piece.responses)] = r
            if own_rows is None or r in own_rows:
                _write_row(batch, r, row, prompts, responses, learned)
    first = batch.row[np.arange(len(indices)), 0]
    return batch._replace(row=np.where(batch.present, batch.row, first[:, None]))


def facts(dataset: TokenizedDataset) -> Batch:
    """What is known of all prompts' responses without a layout: a batch without rows."""
    return _empty_batch(dataset, np.arange(len(dataset)), Shape(0, 0, 0), dataset.max_responses)


_NOTHING = np.zeros(0, dtype=np.int32)


# ---- which row ----


def _cut_pieces(
    prompt: int,
    prompt_length: int,
    lengths: Sequence[int],
    scored_lengths: Sequence[int],
    room: tuple[int, int],
    layout: Layout,
) -> list[Piece]:
    """A prompt's responses in as few pieces as the layout allows, in order."""
    row_length, scored = room
    longest = max(lengths, default=0)
    if prompt_length + longest > row_length or max(scored_lengths, default=0) > scored:
        raise UserError(
            f"a prompt of {prompt_length} and a response of {longest} tokens do not fit a row of "
            f"{row_length} tokens, {scored} of them scored"
        )
    pieces: list[Piece] = []
    for k, (length, learned) in enumerate(zip(lengths, scored_lengths, strict=True)):
        last = pieces[-1] if pieces else None
        if (
            layout == "shared"
            and last is not None
            and last.length + length <= row_length
            and last.scored + learned <= scored
        ):
            joined = (*last.responses, k)
            pieces[-1] = Piece(prompt, joined, last.length + length, last.scored + learned)
        else:
            pieces.append(Piece(prompt, (k,), prompt_length + length, learned))
    return pieces


def _fill_rows(pieces: list[Piece], row_length: int, scored: int, capacity: int) -> list[Row]:
    """Best-fit decreasing with two limits, tokens and scored tokens, and at most `capacity` pieces a row."""
    rows: list[Row] = []
    free: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.length, piece.prompt, piece.responses)):
        best = None
        for r, (length, places) in enumerate(free):
            fits = piece.length <= length and piece.scored <= places and len(rows[r]) < capacity
            if fits and (best is None or length < free[best][0]):
                best = r
        if best is None:
            best = len(rows)
            rows.append([])
            free.append((row_length, scored))
        rows[best].append(piece)
        free[best] = (free[best][0] - piece.length, free[best][1] - piece.scored)
    return rows


# ---- arrays ----


def _empty_batch(
    dataset: TokenizedDataset, indices: Int[np.ndarray, " P"], shape: Shape, num_responses: int
) -> Batch:
    """Padding everywhere, and what is known of each response without a layout."""
    P, K = len(indices), num_responses
    ranks = np.full((P, K), K, dtype=np.int32)
    scores = np.full((P, K), np.nan, dtype=np.float32)
    lengths = np.zeros((P, K), dtype=np.int32)
    for p, i in enumerate(indices):
        if i >= 0:
            mine = slice(dataset.row_offsets[i], dataset.row_offsets[i + 1])
            count = mine.stop - mine.start
            ranks[p, :count] = dataset.ranks[mine]
            scores[p, :count] = dataset.scores[mine]
            lengths[p, :count] = [int(flags.sum()) for flags in dataset.scored_of(i)]
    R, T, N = shape
    tokens, positions, group, branch = (np.zeros((R, T), dtype=np.int32) for _ in range(4))
    source, target = (np.zeros((R, N), dtype=np.int32) for _ in range(2))
    return Batch(
        tokens=tokens,
        positions=positions,
        group=group,
        branch=branch,
        source=source,
        target=target,
        owner=np.full((R, N), P * K, dtype=np.int32),
        index=indices.astype(np.int32),
        row=np.zeros((P, K), dtype=np.int32),
        present=lengths > 0,
        lengths=lengths,
        ranks=ranks,
        scores=scores,
    )


def _write_row(
    batch: Batch,
    r: int,
    pieces: Row,
    prompts: list[np.ndarray],
    responses: list[list[np.ndarray]],
    learned: list[list[np.ndarray]],
) -> None:
    """Fill row r of the batch's arrays in place."""
    K = batch.present.shape[1]
    start = scored = 0
    for group, piece in enumerate(pieces, start=1):
        prompt = prompts[piece.prompt]
        at = start + len(prompt)
        batch.tokens[r, start:at] = prompt
        batch.positions[r, start:at] = np.arange(len(prompt))
        last = at - 1
        for branch, k in enumerate(piece.responses, start=1):
            response = responses[piece.prompt][k]
            flags = learned[piece.prompt][k]
            here, end = slice(at, at + len(response)), scored + int(flags.sum())
            batch.tokens[r, here] = response
            batch.positions[r, here] = len(prompt) + np.arange(len(response))
            batch.branch[r, here] = branch
            before = np.concatenate([[last], np.arange(at, at + len(response) - 1)])
            batch.source[r, scored:end] = before[flags]
            batch.target[r, scored:end] = response[flags]
            batch.owner[r, scored:end] = piece.prompt * K + k
            at, scored = here.stop, end
        batch.group[r, start:at] = group
        start = at
