"""Choosing one of several policies on held-out data, and what the chosen one is worth on the rest of it.

The best of several looks better where it was chosen than it is (the winner's curse). So the held-out prompts
are halved: one half chooses, and the figure that is stated is the chosen policy's on the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dpo.data.preferences import Preference
from dpo.evaluation.accuracy import accuracy, outcomes
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.rows import Rows, as_pairs, make_pairs
from dpo.evaluation.statistics import cluster_bootstrap
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


def choose(policies: Mapping[str, Heldout], *, seed: int = 0) -> Choice:
    """Order policies by accuracy on one half of the held-out prompts that all of them have.

    Which half a prompt is in depends on its text alone. Of equal accuracies the first policy given is the
    better one.

    Raises:
      UserError: when fewer than four prompts are common to all, or a half has no pair.
    """
    places = {name: {_key(p): i for i, p in enumerate(one.preferences)} for name, one in policies.items()}
    common = sorted(set.intersection(*map(set, places.values())))
    parts = {
        name: _rows_at(policies[name].rows, [place[key] for key in common]) for name, place in places.items()
    }
    name, place = next(iter(places.items()))
    choosing = _is_in_first_half([policies[name].preferences[place[key]] for key in common])
    halves = {name: (rows.take(choosing), rows.take(~choosing)) for name, rows in parts.items()}
    for half in next(iter(halves.values())):
        if not len(make_pairs(half).row):
            raise UserError("half of the held-out prompts has no pair of different rank; give more of them")

    def accuracy_of(rows: Rows) -> Interval:
        return accuracy(rows, make_pairs(rows), rows.log_ratio, seed=seed)

    figures = {name: accuracy_of(first) for name, (first, _) in halves.items()}
    order = sorted(figures, key=lambda name: -figures[name].estimate)
    best, rest = halves[order[0]]
    judged = [
        Judged(
            name,
            figures[name],
            accuracy_of(halves[name][1]),
            _difference(best, halves[name][0], seed=seed) if place else None,
        )
        for place, name in enumerate(order)
    ]
    return Choice(tuple(judged), (len(np.unique(best.prompts)), len(np.unique(rest.prompts))))


def _key(preference: Preference) -> str:
    return repr((preference.prompt, preference.responses, preference.ranks))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _rows_at(rows: Rows, places: list[int]) -> Rows:
    return as_pairs(Rows(*(array[places] for array in rows)))


def _is_in_first_half(preferences: list[Preference]) -> Bool[np.ndarray, " n"]:
    """Whether each is of the half that chooses: all rows of a prompt are in one half."""
    digests = [_digest(repr(p.prompt)) for p in preferences]
    prompts = sorted(set(digests))
    if len(prompts) < _FEWEST:
        raise UserError(
            f"{len(prompts)} held-out prompts are common to all runs; allowed to choose by are {_FEWEST} at "
            "least, and hundreds are needed to tell runs apart"
        )
    return np.isin(digests, prompts[: len(prompts) // 2])


_FEWEST = 4


def _difference(best: Rows, other: Rows, *, seed: int) -> Interval:
    pairs = make_pairs(best)
    gained = outcomes(pairs.gap(best.log_ratio)) - outcomes(pairs.gap(other.log_ratio))
    return cluster_bootstrap(gained, best.prompts[pairs.row], weights=pairs.weight, seed=seed)
