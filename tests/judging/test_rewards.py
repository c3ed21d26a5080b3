"""Laws of the example reward: a pure function of the response, signed, bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.judging.rewards import REWARDS, vader


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("The room was lovely.", "The room was awful."),
        ("The room was lovely.", "The room had a door."),
        ("The room had a door.", "The room was awful."),
        ("The food was good.", "The food was not good."),
        ("The food was good!!!", "The food was good."),
    ],
)
def test_kinder_words_score_higher(better, worse):
    assert vader("Describe it.", better) > vader("Describe it.", worse)


@given(st.text(max_size=40), st.text(max_size=40))
def test_only_the_response_counts_and_scores_stay_in_range(prompt, response):
    score = vader(prompt, response)
    assert -1 <= score <= 1
    assert score == vader(({"role": "user", "content": prompt},), response)


def test_no_word_is_neutral():
    assert vader("Describe it.", "") == 0.0


def test_every_named_reward_takes_a_prompt_and_a_response():
    assert all(isinstance(reward("Describe it.", "A good day."), float) for reward in REWARDS.values())
