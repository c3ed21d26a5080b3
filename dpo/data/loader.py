"""Which prompts a step has, and the batches one after the other: everything is a function of (seed, step)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any, TypedDict, Unpack

import grain
import numpy as np
from jaxtyping import Int

from dpo.data.batch import Batch
from dpo.data.packing import Layout, Shape, pack
from dpo.data.shapes import Step, plan_shapes
from dpo.data.tokenized import TokenizedDataset

OwnRows = Callable[[int], Collection[int]]
"""Which of so many rows of a batch are to be filled; without it all are."""


class Packing(TypedDict, total=False):
    """How prompts become rows: what `Loader` takes besides their order."""

    layout: Layout
    row_length: int | None
    micro_batches: int
    rows_multiple: int
    max_shapes: int
    long_rows: bool
    steps_per_compilation: float | None
    own_rows: OwnRows | None


class Loader:
    """Batches with the same number of prompts, in a few fixed shapes. Made by the functions below."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        order: Callable[[int], Int[np.ndarray, " P"]],
        *,
        num_steps: int,
        layout: Layout = "shared",
        row_length: int | None = None,
        micro_batches: int = 1,
        rows_multiple: int = 1,
        max_shapes: int = 8,
        long_rows: bool = False,
        steps_per_compilation: float | None = None,
        own_rows: OwnRows | None = None,
    ) -> None:
        """Plan the shapes of all steps. `order(step)` gives rows of the data set; -1 is a padding prompt."""
        self._own_rows = own_rows
        self.dataset = dataset
        self.num_steps = num_steps
        self._order = cache(order)  # asked for when shapes are planned, counted, and packed
        self._layout: Layout = layout
        self._micro_batches = micro_batches
        self._num_responses = dataset.max_responses
        self._prompt_lengths = dataset.prompt_lengths.tolist()
        self._response_lengths = [row[row > 0].tolist() for row in dataset.response_lengths]
        self._scored_lengths = (
            None if dataset.scored is None else [row[row > 0].tolist() for row in dataset.scored_lengths]
        )
        self._plan = plan_shapes(
            [self._lengths(step) for step in range(num_steps)],
            layout=layout,
            row_length=row_length,
            micro_batches=micro_batches,
            rows_multiple=rows_multiple,
            max_shapes=max_shapes,
            long_rows=long_rows,
            steps_per_compilation=steps_per_compilation,
        )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that a batch of this loader may have, smallest first."""
        return self._plan.shapes

    def indices(self, step: int) -> Int[np.ndarray, " P"]:
        """Rows of the data set in one step; -1 for a padding prompt."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step}; allowed are 0 to {self.num_steps - 1}")
        return self._order(step)

    def rows_read(self) -> Int[np.ndarray, " n"]:
        """Rows of the data set that any step has, in ascending order."""
        read = np.unique(np.concatenate([self._order(step) for step in range(self.num_steps)]))
        return read[read >= 0]

    def shape(self, step: int) -> Shape:
        """Static shape of one step's batch."""
        return self._plan.shapes[self._plan.shape_of_step[step]]

    def batch(self, step: int) -> Batch:
        """The batch of one step, as numpy arrays: the same whenever it is asked for.

        Of several processes each fills the rows that its devices hold.
        """
        return pack(
            self.dataset,
            self.indices(step),
            shape=self.shape(step),
            layout=self._layout,
            num_responses=self._num_responses,
            micro_batches=self._micro_batches,
            own_rows=self._own_rows and self._own_rows(self.shape(step).rows),
        )

    def fill(self, step: int) -> float:
        """Part of a step's positions that hold a token."""
        shape = self.shape(step)
        return int(self._plan.tokens[step]) / (shape.rows * shape.row_length)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of steps start … stop − 1 (the last step's when not given), packed ahead in a thread."""
        end = self.num_steps if stop is None else stop
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.range(start, end).map(self.batch).to_iter_dataset(ahead))

    def report(self) -> dict[str, Any]:
        """What the layout costs and saves over all steps, as plain numbers.

        fill: part of all positions that hold a token. saving_versus_padded: positions of one padded row a
        response, each step padded to its longest, over ours; saving_versus_longest: the same with all steps
        padded to the longest sequence of the data. saving_versus_unshared: tokens with the prompt repeated
        for every response over tokens laid out.
        """
        steps = [self._lengths(step) for step in range(self.num_steps)]
        sequences = [
            [p + r for p, mine in zip(step.prompts, step.responses, strict=True) for r in mine]
            for step in steps
        ]
        longest = max(max(step) for step in sequences if step)
        shapes = [self.shape(step) for step in range(self.num_steps)]
        positions = sum(shape.rows * shape.row_length for shape in shapes)
        scored = sum(r for step in steps for mine in step.scored or step.responses for r in mine)
        used = Counter(shapes)
        return {
            "layout": self._layout,
            "steps": self.num_steps,
            "shapes": [{**shape._asdict(), "steps": used[shape]} for shape in self.shapes],
            "fill": int(self._plan.tokens.sum()) / positions,
            "scored_fill": scored / sum(shape.rows * shape.scored for shape in shapes),
            "tokens": int(self._plan.tokens.sum()),
            "tokens_unshared": sum(map(sum, sequences)),
            "positions": positions,
            "saving_versus_padded": sum(len(step) * max(step, default=0) for step in sequences) / positions,
            "saving_versus_longest": sum(len(step) * longest for step in sequences) / positions,
            "saving_versus_unshared": sum(map(sum, sequences)) / int(self._plan.tokens.sum()),
        }

    def _lengths(self, step: int) -> Step:
        rows, scored = self._order(step).tolist(), self._scored_lengths
        return Step(
            [self._prompt_lengths[i] if i >= 0 else 0 for i in rows],
            [self._response_lengths[i] if i >= 0 else [] for i in rows],
            None if scored is None else [scored[i] if i >= 0 else [] for i in rows],
        )


def training_loader(
    dataset: TokenizedDataset,
    *,
    batch_size: int,
    num_steps: int,
    seed: int = 0,
    shuffle: bool = True,
    **packing: Unpack[Packing],
) -> Loader:
    """Batches of a stream of epochs, each epoch a permutation given by (seed, epoch) or the data's order.

    A batch may cross from one epoch into the next, so that every step has exactly `batch_size` prompts.
    """
    num_rows = len(dataset)

    @cache
    def rows_of_epoch(epoch: int) -> grain.MapDataset:
        rows = grain.MapDataset.range(num_rows)
        return rows.shuffle(_epoch_seed(seed, epoch)) if shuffle else rows

    def order(step: int) -> Int[np.ndarray, " P"]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return np.asarray([rows_of_epoch(place // num_rows)[place % num_rows] for place in places])

    return Loader(dataset, order, num_steps=num_steps, **packing)


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for every (seed, epoch); the first epoch's is the seed itself.

    With seed + epoch, as grain's `repeat` has it, the second epoch of one seed were the first of the next.
    """
    drawn = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0]
    return seed % 2**32 if epoch == 0 else int(drawn)


def evaluation_loader(
    dataset: TokenizedDataset,
    *,
    batch_size: int,
    rows: Int[np.ndarray, " n"] | None = None,
    **packing: Unpack[Packing],
) -> Loader:
    """Every row once, or these only; the last batch is filled up with padding prompts of index -1."""
    chosen = np.arange(len(dataset)) if rows is None else rows
    num_steps = -(-len(chosen) // batch_size)
    padded = np.full(num_steps * batch_size, -1)
    padded[: len(chosen)] = chosen
    batches = padded.reshape(num_steps, batch_size)
    return Loader(dataset, lambda step: batches[step], num_steps=num_steps, **packing)
