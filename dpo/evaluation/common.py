"""What several policies scored alike: the same responses in the same places, and the pairs that all order.

Held-out preferences of the same prompts may be whole rankings in one run and pairs of them in another
(`data.expand`). What they have in common is compared: of every prompt the responses that all have scored, and
of these the pairs that all of them order, in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from dpo.data.preferences import Preference
from dpo.evaluation.accuracy import outcomes
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.rows import Pairs, Rows, as_pairs, make_pairs
from dpo.evaluation.statistics import cluster_bootstrap
from dpo.intervals import Interval

REFERENCE_ITSELF = ""
"""What a single labelled response is compared with (`as_pairs`), in the place of a response's text."""


class Common(NamedTuple):
    """The same prompts and responses as each policy scored them."""

    rows: tuple[Rows, ...]
    pairs: Pairs
    prompts: list[str]
    """Of each row what tells its prompt from others."""
    is_ranking: Bool[np.ndarray, " n"]
    """Rows of three responses or more of which the whole ranking is known."""

    def rankings(self) -> tuple[Rows, ...] | None:
        """The whole rankings among the rows; None where there is none."""
        return tuple(rows.take(self.is_ranking) for rows in self.rows) if self.is_ranking.any() else None

    def difference(self, policy: int, other: int, *, seed: int = 0) -> Interval:
        """Accuracy of one policy minus another's, paired: much tighter than two intervals."""
        ours, theirs = (outcomes(self.pairs.resolved_gap(self.rows[one])) for one in (policy, other))
        clusters = self.rows[0].prompts[self.pairs.row]
        return cluster_bootstrap(ours - theirs, clusters, weights=self.pairs.weight, seed=seed)

    def take(self, kept: Bool[np.ndarray, " n"]) -> Common:
        """Some of the rows, with their pairs."""
        pairs = Pairs(*(array[kept[self.pairs.row]] for array in self.pairs))
        return Common(
            tuple(rows.take(kept) for rows in self.rows),
            pairs._replace(row=(np.cumsum(kept) - 1)[pairs.row]),
            [prompt for prompt, keep in zip(self.prompts, kept, strict=True) if keep],
            self.is_ranking[kept],
        )


def find_common(policies: Sequence[Heldout]) -> Common | None:
    """What all policies have scored; None where they order no pair of the same responses alike.

    Where all have the same preferences, rows stay what they are; else there is a row for each prompt.
    """
    if have_same_preferences(policies):
        rows = tuple(as_pairs(one.rows) for one in policies)
        prompts = [repr(preference.prompt) for preference in policies[0].preferences]
        return Common(rows, make_pairs(rows[0]), prompts, policies[0].rows.present.sum(1) > 2)
    scored = [_by_prompt(one) for one in policies]
    everywhere = [asked for asked in scored[0] if all(asked in one for one in scored)]
    shared = {asked: _shared([one[asked] for one in scored]) for asked in everywhere}
    shared = {asked: what for asked, what in shared.items() if what.better}
    return _align(policies, scored, shared) if shared else None


def have_same_preferences(policies: Sequence[Heldout]) -> bool:
    """Whether all were asked about the same rows: texts, order and ranks."""
    first, *rest = ([_identity(preference) for preference in one.preferences] for one in policies)
    return all(other == first for other in rest)


_Asked = tuple[str, str]
"""A prompt, and what its template gets besides messages."""


class _Scored(NamedTuple):
    """What one policy, or all of them, scored of one prompt; responses are named by their texts."""

    places: dict[str, tuple[int, int]]
    """Row and place of each response."""
    better: dict[tuple[str, str], None]
    """Pairs, the better response first, in the order of the data."""
    rankings: list[dict[str, int]]
    """The rank of each response in rows that have three or more."""


def _identity(preference: Preference) -> tuple[object, ...]:
    return preference.prompt, preference.responses, preference.ranks


def _by_prompt(policy: Heldout) -> dict[_Asked, _Scored]:
    rows = as_pairs(policy.rows)
    names = [_names(one, is_single=rows is not policy.rows) for one in policy.preferences]
    asked = [(repr(one.prompt), repr(one.context)) for one in policy.preferences]
    found: dict[_Asked, _Scored] = {}
    for row, (prompt, texts) in enumerate(zip(asked, names, strict=True)):
        scored = found.setdefault(prompt, _Scored({}, {}, []))
        for place, name in enumerate(texts):
            scored.places.setdefault(name, (row, place))
        if len(texts) > 2:
            scored.rankings.append(dict(zip(texts, rows.ranks[row].tolist(), strict=False)))
    pairs = make_pairs(rows)
    for row, better, worse in zip(pairs.row, pairs.better, pairs.worse, strict=True):
        found[asked[row]].better[names[row][better], names[row][worse]] = None
    return found


def _names(preference: Preference, *, is_single: bool) -> list[str]:
    """The responses by their texts, in the places of `as_pairs`."""
    names = [repr(response) for response in preference.responses]
    if not is_single:
        return names
    return [*names, REFERENCE_ITSELF] if preference.ranks[0] == 0 else [REFERENCE_ITSELF, *names]


def _shared(policies: Sequence[_Scored]) -> _Scored:
    """What all of them have of a prompt, in the order of the first; its ranking where one knows it whole."""
    first, *rest = policies
    better = {pair: None for pair in first.better if all(pair in other.better for other in rest)}
    places = {
        name: place for name, place in first.places.items() if all(name in other.places for other in rest)
    }
    whole = [ranking for one in policies for ranking in one.rankings if places.keys() <= ranking.keys()]
    ordered = [_without_gaps({name: ranking[name] for name in places}) for ranking in whole[:1]]
    return _Scored(places, better, ordered if len(places) > 2 else [])


def _without_gaps(ranks: dict[str, int]) -> dict[str, int]:
    """The same order; 0 is the best of those that are left."""
    left = sorted(set(ranks.values()))
    return {name: left.index(rank) for name, rank in ranks.items()}


def _align(
    policies: Sequence[Heldout], scored: Sequence[dict[_Asked, _Scored]], shared: dict[_Asked, _Scored]
) -> Common:
    """The shared responses of every prompt in the same places for all policies."""
    names = [list(what.places) for what in shared.values()]
    num_places = max(map(len, names))
    ranks = np.zeros((len(names), num_places), np.int64)
    pairs: list[tuple[int, int, int, float]] = []
    for row, what in enumerate(shared.values()):
        place = {name: index for index, name in enumerate(what.places)}
        above = [sum(worse == name for _, worse in what.better) for name in place]
        ranks[row, : len(place)] = list(what.rankings[0].values()) if what.rankings else above
        pairs += [(row, place[b], place[w], 1 / len(what.better)) for b, w in what.better]
    prompts = [prompt for prompt, _ in shared]
    layout = Rows(
        *(np.zeros(ranks.shape) for _ in range(2)),
        lengths=np.zeros_like(ranks),
        present=np.arange(num_places) < np.array([[len(texts)] for texts in names]),
        ranks=ranks,
        prompts=np.unique(prompts, return_inverse=True)[1],
        sources=np.array([""] * len(names)),
    )
    return Common(
        tuple(
            _filled(layout, as_pairs(policy.rows), [one[asked] for asked in shared], names)
            for policy, one in zip(policies, scored, strict=True)
        ),
        Pairs(*(np.array(column) for column in zip(*pairs, strict=True))),
        prompts,
        np.array([bool(what.rankings) for what in shared.values()]),
    )


def _filled(layout: Rows, rows: Rows, scored: Sequence[_Scored], names: Sequence[Sequence[str]]) -> Rows:
    """A policy's numbers of these responses in the rows and places of the layout."""
    at = np.zeros((*layout.ranks.shape, 2), np.int64)
    for row, (one, texts) in enumerate(zip(scored, names, strict=True)):
        at[row, : len(texts)] = [one.places[text] for text in texts]
    where = at[..., 0], at[..., 1]
    return layout._replace(
        policy=rows.policy[where],
        reference=rows.reference[where],
        lengths=rows.lengths[where],
        sources=rows.sources[at[:, 0, 0]],
    )
