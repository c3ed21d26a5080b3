"""Verdicts in both orders become outcomes; faulty judges are exposed; what is invalid is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo.evaluation.statistics import cluster_bootstrap, num_needed, sign_test
from dpo.intervals import wilson
from dpo.judging.judges import CONTROLS, Question
from dpo.judging.winrate import (
    Judged,
    describe_pairs,
    figures_as_text,
    read_votes,
    usage_as_text,
    warnings_of,
)

# (verdict with the policy first, verdict with the opponent first): what the pair counts, whether it flips
ORDERS = [
    ("first", "second", 1.0, False),
    ("second", "first", 0.0, False),
    ("tie", "tie", 0.5, False),
    ("first", "first", 0.5, True),
    ("second", "second", 0.5, True),
    ("first", "tie", 0.5, True),
    ("tie", "first", 0.5, True),
    (None, "second", np.nan, False),
    ("first", None, np.nan, False),
    (None, None, np.nan, False),
]


def pair(policy_first, opponent_first, *, prompt: str = "p", policy: str = "abc", opponent: str = "ab"):
    return Judged(prompt, policy, opponent, policy_first, opponent_first)


def judged_by(control: str, responses: list[tuple[str, str]]) -> list[Judged]:
    """What a control says of every pair in both orders."""
    judge = CONTROLS[control]
    return [
        Judged(str(i), ours, theirs, judge(Question("", ours, theirs)), judge(Question("", theirs, ours)))
        for i, (ours, theirs) in enumerate(responses)
    ]


def some_responses(n: int = 300, *, gap: float = 0.0, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.normal([120 + gap, 120], 40, (n, 2)), 1).astype(int)
    return [("x" * ours, "y" * theirs) for ours, theirs in lengths]


@pytest.mark.parametrize(("ours", "theirs", "outcome", "flips"), ORDERS)
def test_what_a_pair_counts(ours, theirs, outcome: float, flips: bool) -> None:
    votes = read_votes([pair(ours, theirs)])
    np.testing.assert_array_equal(votes.outcome, [outcome])
    assert votes.flipped.tolist() == [flips]


def test_swapping_the_players_mirrors_every_outcome() -> None:
    """The policy's verdicts read from the opponent's side: 1 becomes 0, a tie stays, invalid stays."""
    ours = read_votes([pair(a, b) for a, b, _, _ in ORDERS]).outcome
    theirs = read_votes([pair(b, a) for a, b, _, _ in ORDERS]).outcome
    np.testing.assert_array_equal(theirs, 1 - ours)


def test_every_pair_is_accounted_for() -> None:
    pairs = [pair(a, b, prompt=str(i)) for i, (a, b, _, _) in enumerate(ORDERS)]
    pairs.append(Judged("same", "abc", "abc", "tie", "tie", is_identical=True))
    figures = describe_pairs(pairs)
    assert figures["wins"] + figures["ties"] + figures["losses"] + figures["invalid"] == len(pairs)
    assert (figures["wins"], figures["losses"], figures["invalid"]) == (1, 1, 3)
    assert (figures["ties_flipped"], figures["ties_identical"]) == (4, 1)
    assert figures["win_rate"][0] == 0.5
    assert figures["win_rate_if_invalid"] == pytest.approx([4 / 11, 7 / 11])
    assert "3 of 11 pairs lack a valid verdict" in figures_as_text(figures)


def test_the_figures_are_those_of_the_statistics() -> None:
    pairs = [pair("first", "second", prompt=str(i)) for i in range(30)]
    pairs += [pair("second", "first", prompt=str(i)) for i in range(30, 40)]
    figures = describe_pairs(pairs)
    assert figures["win_rate"][0] == 0.75
    assert figures.get("win_rate_wilson") == list(wilson(30, 40))
    assert figures["sign_test"] == sign_test(30, 10)
    assert figures["prompts_needed"] == num_needed(0.75)
    assert figures["length_controlled"] is None, "all differences are one character: nothing to tell apart"


def test_samples_of_one_prompt_are_one_cluster() -> None:
    """Ten copies of every pair: the interval and the sign test stay as they are; Wilson's is not given."""
    once = [pair(*ORDERS[i % 3][:2], prompt=str(i)) for i in range(40)]
    copied = [one for one in once for _ in range(10)]
    few, many = describe_pairs(once), describe_pairs(copied)
    assert many["win_rate"] == pytest.approx(few["win_rate"])
    assert many["sign_test"] == few["sign_test"]
    assert "win_rate_wilson" in few
    assert "win_rate_wilson" not in many


def test_the_interval_covers_19_of_20_under_a_noisy_judge() -> None:
    """Each order is decided by a coin of its own with chance q: P(win) = q², P(loss) = (1−q)², else a tie."""
    rng = np.random.default_rng(0)
    truth, covered = 0.7, np.zeros(1500)  # q² + (1 − q² − (1−q)²)/2 = q
    for trial in range(len(covered)):
        wins = rng.random((150, 2)) < truth
        pairs = [
            pair("first" if a else "second", "second" if b else "first", prompt=str(i))
            for i, (a, b) in enumerate(wins)
        ]
        outcome = read_votes(pairs).outcome
        interval = cluster_bootstrap(outcome, np.arange(150), seed=trial, resamples=400)
        covered[trial] = interval.low <= truth <= interval.high
    assert covered.mean() == pytest.approx(0.95, abs=0.015)


# ---- controls ----


def test_a_judge_that_always_says_first_is_exposed() -> None:
    figures = describe_pairs(judged_by("first", some_responses()))
    rate, low, high = figures["win_rate"]
    assert (rate, low + high) == (0.5, pytest.approx(1.0))
    assert low < rate < high, "that all came out alike says nothing of the next prompt"
    assert figures["ties_flipped"] == figures["ties"] == 300
    assert figures["judge"] == {"says_first": 1.0, "flips": 1.0, "agrees_with_longer": None}
    assert any("it decides by position" in text for text in warnings_of(figures))


def test_a_judge_that_flips_either_way_is_not_said_to_decide_by_position() -> None:
    pairs = [pair("first", "first", prompt=str(i)) for i in range(20)]
    pairs += [pair("second", "second", prompt=str(i)) for i in range(20, 40)]
    alike, warning = warnings_of(describe_pairs(pairs))
    assert "all prompts came out alike" in alike
    assert "it says 'first' in 50% of its decisions): it is not sure of its verdicts" in warning


def test_answers_without_a_count_of_tokens_are_not_free() -> None:
    usage: Any = {"answers": 3, "from_cache": 0, "prompt_tokens": 10, "completion_tokens": 2, "cost": 0.1}
    assert "!" not in usage_as_text(usage | {"unreported": 0})
    assert "! 2 answers came without a count" in usage_as_text(usage | {"unreported": 2})


def test_one_prompt_has_no_interval_and_says_so() -> None:
    figures = describe_pairs([pair("first", "second", prompt="p")])
    assert "! 1 prompt: nothing can be drawn" in figures_as_text(figures)


def test_a_judge_that_prefers_the_longer_is_exposed_by_the_length_controlled_figure() -> None:
    figures = describe_pairs(judged_by("longer", some_responses(gap=45)))
    assert figures["win_rate"][1] > 0.7
    controlled, flips = figures["length_controlled"], figures["judge"]["flips"]
    assert controlled is not None
    assert flips is not None
    assert controlled["win_rate"][1] < 0.5 + 0.15
    assert abs(controlled["win_rate"][0] - 0.5) < 0.2
    assert controlled["length"] > 10
    assert figures["judge"]["agrees_with_longer"] == 1.0
    assert flips < 0.05
    assert any("read the length-controlled figure" in text for text in warnings_of(figures))


def test_a_fair_judge_of_a_model_against_itself_gives_one_half_without_warnings() -> None:
    rng = np.random.default_rng(1)
    responses = some_responses(seed=2)
    better = rng.random(300) < 0.5
    pairs = [
        Judged(str(i), a, b, "first" if ours else "second", "second" if ours else "first")
        for i, ((a, b), ours) in enumerate(zip(responses, better, strict=True))
    ]
    figures = describe_pairs(pairs)
    assert figures["win_rate"][1] < 0.5 < figures["win_rate"][2]
    assert figures["sign_test"] > 0.05
    assert figures["judge"]["says_first"] == 0.5
    assert warnings_of(figures) == []


def test_a_policy_that_always_wins_has_wilsons_interval_in_place_of_the_bootstraps() -> None:
    pairs = [pair("first", "second", prompt=str(i // 2), policy="abc" * i) for i in range(40)]
    text = figures_as_text(describe_pairs(pairs))
    assert "win-rate              1.000  95% 0.839 to 1.000  (Wilson over prompts)" in text
    assert "! all prompts came out alike, so that a bootstrap has no spread" in text
    assert "1.000 to 1.000" not in text


def test_nothing_valid_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 2 pairs has a valid verdict"):
        describe_pairs([pair(None, "first"), pair("tie", None)])
