"""The few static shapes of a run, chosen from lengths alone before the first step is compiled.

T and N are the same for the whole run; only R differs between steps, in at most a few sizes. They are
chosen to make the work smallest, counted in tokens through the layers:

    work of a step = R T (1 + T / ATTENTION_TOKENS) + PROJECTION_WEIGHT R N

Where attention skips what no token may see, a long row costs no more than short ones with the same groups.
Then every micro-batch is one row (`long_rows`), R is the same for the whole run, and T differs between steps
in at most a few sizes: less padding, since a step's tokens are rounded up once and not in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpo.data.packing import Layout, Shape, lay_out
from dpo.outcomes import UserError

ATTENTION_TOKENS = 1024
"""Row length at which attention costs as much time as all matrix products of a token (135M model, CPU)."""
PROJECTION_WEIGHT = 0.25
"""Cost of a scored token's output projection, in tokens through the layers (a quarter of a small model)."""
STEPS_PER_COMPILATION = 4.0
"""Another shape must save as much work as this many steps cost, since it is compiled once more: on a CPU."""
LONG_STEPS_PER_COMPILATION = 1.0
"""The same for long rows: a step takes longer there, and compiles sooner."""
_SAMPLE = 128
"""Steps that are laid out to compare row lengths."""


class Step(NamedTuple):
    """Lengths of one step's prompts and of their present responses."""

    prompts: list[int]
    responses: list[list[int]]
    scored: list[list[int]] | None = None
    """Scored tokens of each response; all of them where None."""


class Plan(NamedTuple):
    """Shapes of a run, and which step has which."""

    shapes: tuple[Shape, ...]
    """Smallest first."""
    shape_of_step: Int[np.ndarray, " S"]
    tokens: Int[np.ndarray, " S"]
    """Tokens laid out in each step; a prompt counts as often as it is repeated."""
    rows: Int[np.ndarray, " S"]
    """Rows that each step needs."""


def plan_shapes(
    steps: Sequence[Step],
    *,
    layout: Layout,
    row_length: int | None = None,
    micro_batches: int = 1,
    rows_multiple: int = 1,
    max_shapes: int = 8,
    long_rows: bool = False,
    steps_per_compilation: float | None = None,
) -> Plan:
    """At most `max_shapes` shapes that hold every step with the least work.

    R is a multiple of `micro_batches` times `rows_multiple` (the devices that rows are split over). Another
    shape must save as much work as `steps_per_compilation` steps cost; a CPU's number when not given.
    `long_rows` is followed unless rows are padded, split over devices, or have a given length.
    """
    lengths = _Lengths.of(steps)
    if long_rows and row_length is None and layout != "padded" and rows_multiple == 1:
        cost = steps_per_compilation or LONG_STEPS_PER_COMPILATION
        return _plan_long_rows(steps, lengths, layout, micro_batches, max_shapes, cost)
    cost = steps_per_compilation or STEPS_PER_COMPILATION
    if row_length is not None and row_length < lengths.sequence:
        raise UserError(
            f"data.row_length is {row_length}; allowed is at least {lengths.sequence}, the longest prompt "
            "and response of the data"
        )
    row_lengths = [row_length] if row_length is not None else _row_lengths(lengths, layout)
    candidates = [(T, N) for T in row_lengths for N in _scored_lengths(lengths, T, layout)]
    sample = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, _SAMPLE).astype(int))]
    parts = micro_batches, rows_multiple

    def work(candidate: tuple[int, int]) -> float:
        rows = np.asarray([rows for rows, _ in _measure(sample, *candidate, layout, *parts)])
        sizes = _choose(rows, max_shapes, cost * len(sample) / len(steps))
        return float(np.asarray(sizes)[np.searchsorted(sizes, rows)].sum()) * _row_work(*candidate)

    T, N = min(candidates, key=work) if len(candidates) > 1 else candidates[0]
    rows, tokens = (np.asarray(column) for column in zip(*_measure(steps, T, N, layout, *parts), strict=True))
    sizes = _choose(rows, max_shapes, cost)
    shapes = tuple(Shape(size, T, N) for size in sizes)
    return Plan(shapes, np.searchsorted(sizes, rows), tokens, rows)


def _plan_long_rows(
    steps: Sequence[Step],
    lengths: _Lengths,
    layout: Layout,
    micro_batches: int,
    max_shapes: int,
    steps_per_compilation: float,
) -> Plan:
    """One row a micro-batch, as long as the step needs; N is what the steps of each length need."""
    needs = [_measure_one_row(step, layout, micro_batches) for step in steps]
    tokens, length, scored = (np.asarray(column) for column in zip(*needs, strict=True))
    length = np.maximum(length, lengths.sequence)
    length = -(-length // 128) * 128
    sizes = _choose(length, max_shapes, steps_per_compilation)
    shape_of_step = np.searchsorted(sizes, length)
    shapes = tuple(
        Shape(micro_batches, size, _round_up(int(scored[shape_of_step == i].max()), 64))
        for i, size in enumerate(sizes)
    )
    return Plan(shapes, shape_of_step, tokens, np.full(len(steps), micro_batches))


def _measure_one_row(step: Step, layout: Layout, micro_batches: int) -> tuple[int, int, int]:
    """Tokens of a step, and the most tokens and scored tokens of a micro-batch."""
    whole = sum(step.prompts) * max(1, *map(len, step.responses)) + sum(map(sum, step.responses))
    parts = lay_out(
        step.prompts,
        step.responses,
        row_length=whole,
        scored=whole,
        layout=layout,
        micro_batches=micro_batches,
        scored_lengths=step.scored,
    )
    pieces = [[piece for row in part for piece in row] for part in parts]
    lengths = [sum(piece.length for piece in part) for part in pieces]
    return sum(lengths), max(lengths), max(sum(piece.scored for piece in part) for part in pieces)


def _choose(needed: Int[np.ndarray, " S"], max_shapes: int, steps_per_compilation: float) -> list[int]:
    cost_of_one = steps_per_compilation * float(needed.mean())
    return choose_sizes(needed, max_sizes=max_shapes, cost_of_one=cost_of_one)


def choose_sizes(needed: Int[np.ndarray, " S"], *, max_sizes: int, cost_of_one: float) -> list[int]:
    """Sizes, smallest first, that minimise Σ (smallest size ≥ needed) + cost_of_one x number of sizes.

    Exact, by dynamic programming over the distinct values: best[j] is the cheapest cover of the first j.
    """
    values, counts = np.unique(needed, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(float("inf"), [])] * len(values)
    answer: tuple[float, list[int]] = (float("inf"), [])
    for _ in range(max_sizes):
        best = [
            min(
                (
                    (cost + float(before[j] - before[i]) * int(values[j - 1]) + cost_of_one, [*sizes, j - 1])
                    for i, (cost, sizes) in enumerate(best[:j])
                ),
                default=(float("inf"), []),
            )
            for j in range(len(values) + 1)
        ]
        answer = min(answer, best[-1])
    return [int(values[j]) for j in answer[1]]


class _Lengths(NamedTuple):
    """The longest of everything."""

    sequence: int
    """Prompt and one response."""
    group: int
    """Prompt and all its responses."""
    response: int
    """Scored tokens of one response."""
    responses: int
    """Scored tokens of all responses of one prompt."""

    @staticmethod
    def of(steps: Sequence[Step]) -> _Lengths:
        pairs = [
            (p, mine) for step in steps for p, mine in zip(step.prompts, step.responses, strict=True) if mine
        ]
        scored = [mine for step in steps for mine in step.scored or step.responses if mine]
        if not pairs:
            raise UserError("there is no step, or no response in any step")
        return _Lengths(
            sequence=max(p + max(mine) for p, mine in pairs),
            group=max(p + sum(mine) for p, mine in pairs),
            response=max(map(max, scored)),
            responses=max(map(sum, scored)),
        )


def _row_lengths(lengths: _Lengths, layout: Layout) -> list[int]:
    """Multiples of 128 worth trying: from the longest sequence to twice the longest group, at most 8."""
    low = _round_up(lengths.sequence, 128)
    if layout == "padded":
        return [low]
    high = 2 * _round_up(lengths.group if layout == "shared" else lengths.sequence, 128)
    return sorted({_round_up(int(value), 128) for value in np.linspace(low, high, 8)})


def _scored_lengths(lengths: _Lengths, row_length: int, layout: Layout) -> list[int]:
    """Numbers of scored tokens worth trying: from the longest response to a whole row, at most 6."""
    step = 64 if row_length >= 128 else 8
    low = min(_round_up(lengths.response, step), row_length)
    if layout == "padded":
        return [low]
    return sorted({min(_round_up(int(value), step), row_length) for value in np.linspace(low, row_length, 6)})


def _measure(
    steps: Sequence[Step],
    row_length: int,
    scored: int,
    layout: Layout,
    micro_batches: int,
    rows_multiple: int,
) -> list[tuple[int, int]]:
    """Rows (a multiple of what is asked) and tokens that each step needs."""
    needs = []
    for step in steps:
        parts = lay_out(
            step.prompts,
            step.responses,
            row_length=row_length,
            scored=scored,
            layout=layout,
            micro_batches=micro_batches,
            scored_lengths=step.scored,
        )
        rows = micro_batches * _round_up(max(1, *map(len, parts)), rows_multiple)
        needs.append((rows, sum(piece.length for part in parts for row in part for piece in row)))
    return needs


def _row_work(row_length: int, scored: int) -> float:
    return row_length * (1 + row_length / ATTENTION_TOKENS) + PROJECTION_WEIGHT * scored


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
