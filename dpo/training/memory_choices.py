"""Settings that are traded for memory, in the order of their expected speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from dpo.config import Config

LEAST_CHUNK = 32
"""Least value of `model.log_prob_chunk` that is tried: smaller chunks of scored tokens save nothing."""


Remat = Literal["none", "dots", "full"]


_REMATS: tuple[Remat, ...] = ("none", "dots", "full")
"""Values of `model.remat`, the quickest first."""


class Choice(NamedTuple):
    """Settings that are traded for memory."""

    remat: Remat
    micro_batches: int
    log_prob_chunk: int

    @property
    def text(self) -> str:
        """The choice in words, for a line of the log."""
        parts = "1 micro-batch" if self.micro_batches == 1 else f"{self.micro_batches} micro-batches"
        return f"remat {self.remat}, {parts}, {self.log_prob_chunk} scored tokens at a time"

    def apply(self, config: Config) -> Config:
        """A run's settings with this choice in place of theirs."""
        return replace(
            config,
            model=replace(config.model, remat=self.remat, log_prob_chunk=self.log_prob_chunk),
            training=replace(config.training, micro_batches=self.micro_batches),
        )


def candidates(config: Config, scored: Callable[[int], int]) -> Iterator[Choice]:
    """Choices in the order of their expected speed: what is asked for, remat, micro-batches, chunks.

    Micro-batches grow by divisors of the batch, each at least twice the one before. `scored` gives the
    scored tokens of a device and micro-batch by their number: larger chunks than that are no larger.
    """
    model, training = config.model, config.training
    count, chunk = training.micro_batches, model.log_prob_chunk
    for remat in _REMATS[_REMATS.index(model.remat) :]:
        yield Choice(remat, count, chunk)
    for more in range(2 * count, training.batch_size + 1):
        if training.batch_size % more == 0 and more >= 2 * count:
            count = more
            yield Choice("full", count, chunk)
    chunk = _smaller_power_of_two(min(chunk, scored(count)))
    while chunk >= LEAST_CHUNK:
        yield Choice("full", count, chunk)
        chunk //= 2


def _smaller_power_of_two(value: int) -> int:
    """The largest one below `value`."""
    return 2 ** ((value - 1).bit_length() - 1) if value > 1 else 0
