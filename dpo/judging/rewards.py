"""Reward functions: (prompt, response) → a number, higher is better. A judge compares two of them.

Any function of this type serves as a reward; the ones here are the rewards that the shipped data are
scored by, so that a win-rate on them measures the very thing that the preferences stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

Prompt = str | tuple[Mapping[str, str], ...]
"""Plain text, or the messages of a conversation (as in `dpo.data.Preference`)."""
Reward = Callable[[Prompt, str], float]
"""Higher is better; a pure function, so that equal inputs always tie."""


def vader(prompt: Prompt, response: str) -> float:
    """Sentiment of the response in [−1, 1]: VADER's compound score (Hutto & Gilbert 2014).

    A lexicon with rules for negation, emphasis and punctuation; it never sees the prompt. 0 is neutral
    or empty.
    """
    del prompt
    return _analyzer().polarity_scores(response)["compound"]


REWARDS: dict[str, Reward] = {"vader": vader}
"""By the name that the command line gives."""


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
