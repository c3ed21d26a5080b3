"""Choosing one of several policies on held-out data, and what the chosen one is worth on the rest of it.

The best of several looks better where it was chosen than it is (the winner's curse). So the held-out prompts
are halved: one half chooses, and the figure that is stated is the chosen policy's on the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dpo.evaluation.accuracy import accuracy
from dpo.evaluation.common import Common, find_common
from dpo.evaluation.heldout import Heldout
from dpo.intervals import Interval
from dpo.outcomes import UserError


class Judged(NamedTuple):
    """One policy's accuracy on both halves."""

    name: str
    choosing: Interval
    """On the half that chooses."""
    stated: Interval
    """On the half that has no part in the choice."""
    behind: Interval | None
    """The chosen policy's accuracy minus this one's, paired, where it was chosen; None for the chosen."""


class Choice(NamedTuple):
    """Policies from the best to the worst on the half that chooses."""

    judged: tuple[Judged, ...]
    prompts: tuple[int, int]
    """Prompts of the half that chooses and of the other."""

    @property
    def chosen(self) -> Judged:
        """The first of them."""
        return self.judged[0]

    @property
    def not_told_apart(self) -> list[str]:
        """Policies that the half which chooses doesn't tell from the chosen one: their interval holds 0."""
        return [one.name for one in self.judged if one.behind is not None and one.behind.low <= 0]

    def in_words(self, show: Callable[[Interval], str] = str) -> list[str]:
        """What may be said of the chosen one; `show` writes an interval."""
        best, (by, stated), apart = self.chosen, self.prompts, self.not_told_apart
        said = (
            f"chosen: {best.name}, by {by} of the held-out prompts. The other {stated} had no part in the "
            f"choice: {show(best.stated)} there is the figure to state, because the best of several looks "
            "better than it is where it was chosen"
        )
        return [said, *([f"not told apart from it by these prompts: {'; '.join(apart)}"] if apart else [])]


def choose(policies: Mapping[str, Heldout], *, seed: int = 0) -> Choice:
    """Order policies by accuracy on one half of the held-out prompts, on pairs that all of them order.

    Which half a prompt is in depends on its text alone. Of equal accuracies the first policy given is the
    better one.

    Raises:
      UserError: when fewer than four prompts are common to all, or a half has no pair.
    """
    names, found = list(policies), find_common(list(policies.values()))
    choosing = _is_in_first_half([] if found is None else found.prompts)
    assert found is not None, "so few prompts would have been refused"
    halves = found.take(choosing), found.take(~choosing)
    if not all(len(half.pairs.row) for half in halves):
        raise UserError("half of the held-out prompts has no pair of different rank; give more of them")

    def accuracy_of(half: Common, policy: int) -> Interval:
        rows = half.rows[policy]
        return accuracy(rows, half.pairs, half.pairs.resolved_gap(rows), seed=seed)

    figures = [accuracy_of(halves[0], policy) for policy in range(len(names))]
    order = sorted(range(len(names)), key=lambda policy: -figures[policy].estimate)
    judged = [
        Judged(
            names[policy],
            figures[policy],
            accuracy_of(halves[1], policy),
            halves[0].difference(order[0], policy, seed=seed) if place else None,
        )
        for place, policy in enumerate(order)
    ]
    return Choice(tuple(judged), (len(set(halves[0].prompts)), len(set(halves[1].prompts))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _is_in_first_half(prompts: list[str]) -> Bool[np.ndarray, " n"]:
    """Whether each is of the half that chooses: all rows of a prompt are in one half."""
    digests = list(map(_digest, prompts))
    found = sorted(set(digests))
    if len(found) < _FEWEST:
        raise UserError(
            f"{len(found)} held-out prompts are common to all runs; allowed to choose by are {_FEWEST} at "
            "least, and hundreds are needed to tell runs apart"
        )
    return np.isin(digests, found[: len(found) // 2])


_FEWEST = 4
