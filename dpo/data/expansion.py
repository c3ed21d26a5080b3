"""A ranking as it is, or as pairs of its responses."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Literal

from dpo.data.rows import Preference
from dpo.outcomes import UserError

Expand = Literal["ranking", "best_worst", "adjacent", "all_pairs"]


def expand_ranking(preference: Preference, expand: Expand) -> tuple[list[Preference], int]:
    """A ranking as it is, or as its best-worst, adjacent or all pairs; and how many pairs were tied.

    Pairs of equal rank state no preference and are left out. A response that stands alone stays as it is.
    """
    count = len(preference.responses)
    if expand == "ranking" or count == 1:
        return [preference], 0
    places: dict[str, Iterable[tuple[int, int]]] = {
        "best_worst": [(0, count - 1)],
        "adjacent": pairwise(range(count)),
        "all_pairs": combinations(range(count), 2),
    }
    if expand not in places:
        raise UserError(f"expand is {expand!r}; allowed are ranking, {', '.join(places)}")
    pairs = list(places[expand])
    untied = [(i, j) for i, j in pairs if preference.ranks[i] != preference.ranks[j]]
    return [_pair_of(preference, i, j) for i, j in untied], len(pairs) - len(untied)


def _pair_of(preference: Preference, i: int, j: int) -> Preference:
    scores = preference.scores
    return preference._replace(
        responses=(preference.responses[i], preference.responses[j]),
        ranks=(0, 1),
        scores=None if scores is None else (scores[i], scores[j]),
    )
