"""Layers of several kinds as runs of a repeating pattern, each of which is one scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """`pattern`, `repeats` times, from layer `start` on."""

    start: int
    pattern: tuple[str, ...]
    repeats: int

    @property
    def end(self) -> int:
        """The first layer behind it."""
        return self.start + len(self.pattern) * self.repeats


def find_runs(kinds: Sequence[str]) -> list[Run]:
    """All layers in order, from the left what covers most of them by repetition.

    C C A C C A C A C A C   is   (C C A) twice, (C A) twice, C once: so many blocks are compiled.
    """
    runs: list[Run] = []
    while (start := runs[-1].end if runs else 0) < len(kinds):
        longest = (len(kinds) - start) // 2
        found = [_run(kinds, start, length) for length in range(1, max(longest, 1) + 1)]
        runs.append(max(found, key=lambda run: (run.end if run.repeats > 1 else 0, -len(run.pattern))))
    return runs


def _run(kinds: Sequence[str], start: int, length: int) -> Run:
    pattern = tuple(kinds[start : start + length])
    repeats = 1
    while tuple(kinds[start + repeats * length : start + (repeats + 1) * length]) == pattern:
        repeats += 1
    return Run(start, pattern, repeats)
