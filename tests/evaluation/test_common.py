"""What runs with other held-out preferences of the same prompts have in common: pairs, rankings, texts."""

from itertools import combinations

import numpy as np
import pytest

from dpo.data.preferences import Preference
from dpo.evaluation.accuracy import accuracy
from dpo.evaluation.common import find_common
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.ranking import kendall_tau, top_1
from dpo.evaluation.rows import Rows

Row = tuple[str, tuple[str, ...], tuple[int, ...]]
"""A prompt, its responses, their ranks."""


def heldout(rows: list[Row], log_ratio: dict[str, float]) -> Heldout:
    """Preferences that a policy with these log-ratios has scored, by the responses' texts."""
    width = max(len(responses) for _, responses, _ in rows)
    values, present, ranks = (np.zeros((len(rows), width)) for _ in range(3))
    for row, (_, responses, given) in enumerate(rows):
        present[row, : len(responses)] = 1
        values[row, : len(responses)] = [log_ratio[text] for text in responses]
        ranks[row, : len(responses)] = given
    numbers = Rows(
        policy=values - 20,
        reference=np.full(values.shape, -20.0),
        lengths=np.ones(values.shape, np.int64),
        present=present.astype(bool),
        ranks=ranks.astype(np.int64),
        prompts=np.unique([prompt for prompt, _, _ in rows], return_inverse=True)[1],
        sources=np.array(["s"] * len(rows)),
    )
    preferences = [
        Preference(prompt, responses, given, None, "s", f"f:{place}")
        for place, (prompt, responses, given) in enumerate(rows)
    ]
    return Heldout(numbers, preferences, {})


RANKINGS: list[Row] = [(f"p{i}", (f"{i}a", f"{i}b", f"{i}c", f"{i}d"), (0, 1, 2, 3)) for i in range(6)]
PAIRS: list[Row] = [
    (prompt, (responses[i], responses[j]), (0, 1))
    for prompt, responses, _ in RANKINGS
    for i, j in combinations(range(4), 2)
]
RATIOS: dict[str, float] = {
    text: value for _, responses, _ in RANKINGS for text, value in zip(responses, (3, 1, 2, 0), strict=True)
}
OTHER: dict[str, float] = {
    text: value for _, responses, _ in RANKINGS for text, value in zip(responses, (0, 3, 2, 1), strict=True)
}


@pytest.mark.parametrize("second", [RANKINGS, PAIRS, PAIRS[::-1]], ids=["rankings", "pairs", "turned"])
def test_a_ranking_and_all_its_pairs_say_the_same(second: list[Row]) -> None:
    """All pairs are common, and the ranking that one run knows whole is the other's too."""
    common = find_common([heldout(RANKINGS, RATIOS), heldout(second, OTHER)])
    assert common is not None
    assert len(common.pairs.row) == 36
    rates = [accuracy(rows, common.pairs, common.pairs.gap(rows.log_ratio)).estimate for rows in common.rows]
    assert rates == pytest.approx([5 / 6, 3 / 6])
    assert common.difference(0, 1).estimate == pytest.approx(2 / 6)
    rankings = common.rankings()
    assert rankings is not None
    assert [kendall_tau(rows).tolist() for rows in rankings] == [[pytest.approx(x)] * 6 for x in (4 / 6, 0)]
    assert [top_1(rows).tolist() for rows in rankings] == [[1.0] * 6, [0.0] * 6]


def test_of_the_best_and_the_worst_that_pair_alone_is_common() -> None:
    ends: list[Row] = [(prompt, (texts[0], texts[-1]), (0, 1)) for prompt, texts, _ in RANKINGS[:4]]
    common = find_common([heldout(RANKINGS, RATIOS), heldout(ends, OTHER)])
    assert common is not None
    assert (len(common.pairs.row), common.rankings()) == (4, None)
    assert common.rows[0].ranks.tolist() == [[0, 1]] * 4
    assert common.difference(0, 1).estimate == 1.0


def test_a_response_that_one_has_not_scored_is_left_out_of_the_ranking() -> None:
    """Of three of the four responses the best is found where the best of the three is."""
    shorter: list[Row] = [(prompt, texts[1:], (0, 1, 2)) for prompt, texts, _ in RANKINGS]
    common = find_common([heldout(RANKINGS, RATIOS), heldout(shorter, OTHER)])
    assert common is not None
    assert len(common.pairs.row) == 18
    rankings = common.rankings()
    assert rankings is not None
    assert [top_1(rows).mean() for rows in rankings] == [0.0, 1.0]


def test_a_pair_that_is_turned_round_is_not_common() -> None:
    turned: list[Row] = [(prompt, (texts[1], texts[0]), (0, 1)) for prompt, texts, _ in RANKINGS]
    straight: list[Row] = [(prompt, (texts[0], texts[1]), (0, 1)) for prompt, texts, _ in RANKINGS]
    assert find_common([heldout(straight, RATIOS), heldout(turned, RATIOS)]) is None
    assert find_common([heldout(straight, RATIOS), heldout(PAIRS, RATIOS)]) is not None


def test_single_labelled_responses_are_compared_with_the_reference_itself() -> None:
    single: list[Row] = [
        (f"p{i}", (f"{i}{side}",), (rank,)) for i in range(6) for rank, side in enumerate("ad")
    ]
    common = find_common([heldout(single, RATIOS), heldout(single[2:], OTHER)])
    assert common is not None
    rates = [accuracy(rows, common.pairs, common.pairs.gap(rows.log_ratio)).estimate for rows in common.rows]
    assert rates == pytest.approx([0.75, 0.25]), "3 > 0 and 0 = 0; 0 = 0 and 1 > 0"
