"""Counts of what preferences say, one preference after the other: of texts only digests are held."""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TypedDict

from dpo.data.messages import Prompt, message_text, response_text
from dpo.data.preferences import Preference

_NAMED = 5
"""Places that are named of each count."""


class Overlap(TypedDict):
    """Held-out preferences and how many of their prompts are among those that are trained on."""

    heldout: int
    same_prompt: int
    same_first_message: int
    examples: list[str]
    """Places of the first few with the same prompt."""


class TextCounts:
    """Sizes, ties, copies, contradictions, and prompts to look for elsewhere."""

    def __init__(self, *, with_first_messages: bool = False) -> None:
        """`with_first_messages` is needed for `overlap`."""
        self._with_first_messages = with_first_messages
        self.count = self.with_scores = self.desirable = 0
        self.sources: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        """How many preferences have so many responses."""
        self._counts: Counter[str] = Counter()
        self._conflicts = 0
        self._prompts: set[bytes] = set()
        self._whole: set[bytes] = set()
        self._orders: dict[bytes, int] = {}
        """Of a prompt with two texts, whether the first was ahead (1), behind (2), or both (3)."""
        self.first: dict[str, list[str]] = {}
        """Where the first preferences stand that `figures` counts, under the same names."""
        self._normalised: set[bytes] = set()
        self._first_messages: set[bytes] = set()

    def add(self, preference: Preference) -> None:
        """One more preference."""
        ranks, texts = preference.ranks, tuple(map(response_text, preference.responses))
        prompt = _flatten(preference.prompt)
        marks = [_digest(prompt), *map(_digest, texts)]
        self.count += 1
        self.sources[preference.source] += 1
        self.sizes[len(ranks)] += 1
        self.with_scores += preference.scores is not None
        self.desirable += ranks[0] == 0
        self._prompts.add(marks[0])
        whole = _join(marks)
        found = {
            "duplicates": whole in self._whole,
            "tied": len(set(ranks)) < len(ranks),
            "all_tied": len(set(ranks)) == 1 < len(ranks),
            "identical_responses": len(set(texts)) < len(texts),
            "conflicting": self._contradicts(marks[0], marks[1:], ranks),
            "scores_against_ranks": _scores_against_ranks(preference),
        }
        self._whole.add(whole)
        for name in (name for name, is_so in found.items() if is_so):
            self._counts[name] += 1
            if len(self.first.setdefault(name, [])) < _NAMED:
                self.first[name].append(preference.location)
        if self._with_first_messages:
            self._normalised.add(_digest(_normalise(prompt)))
            self._first_messages.add(_digest(_normalise(_first_message(preference.prompt))))

    def _contradicts(self, prompt: bytes, texts: Sequence[bytes], ranks: Sequence[int]) -> bool:
        """Note what a preference says of two texts; whether it is the first to say the opposite of any.

        Prompt and texts are given by their digests.
        """
        new = False
        for first, second, is_ahead in _statements(texts, ranks):
            key = _join((prompt, first, second))
            before = self._orders.get(key, 0)
            self._orders[key] = before | (1 if is_ahead else 2)
            if before != 3 and self._orders[key] == 3:
                self._conflicts += 1
                new = True
        return new

    def figures(self) -> dict[str, int]:
        """Ties, copies and contradictions."""
        return {
            "distinct_prompts": len(self._prompts),
            "duplicates": self._counts["duplicates"],
            "tied": self._counts["tied"],
            "all_tied": self._counts["all_tied"],
            "identical_responses": self._counts["identical_responses"],
            "conflicting": self._conflicts,
            "scores_against_ranks": self._counts["scores_against_ranks"],
        }

    def overlap(self, heldout: Sequence[Preference]) -> Overlap:
        """Held-out preferences whose prompt is among these: whole, and by the first message alone.

        Prompts are compared in lower case, without punctuation and with single spaces; paraphrases are not
        found.
        """
        shared = [p for p in heldout if _digest(_normalise(_flatten(p.prompt))) in self._normalised]
        opened = [p for p in heldout if _digest(_normalise(_first_message(p.prompt))) in self._first_messages]
        return {
            "heldout": len(heldout),
            "same_prompt": len(shared),
            "same_first_message": len(opened),
            "examples": [preference.location for preference in shared[:_NAMED]],
        }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _join(digests: Sequence[bytes]) -> bytes:
    """One digest of several: all are as long, so that none are cut apart elsewhere."""
    return hashlib.blake2b(b"".join(digests), digest_size=16).digest()


def _statements(texts: Sequence[bytes], ranks: Sequence[int]) -> Iterator[tuple[bytes, bytes, bool]]:
    """What a preference says of two texts, in an order that is the same for both opinions."""
    if len(texts) == 1:
        yield texts[0], b"", ranks[0] == 0
    for (left, i), (right, j) in combinations(zip(texts, ranks, strict=True), 2):
        if i != j and left != right:
            yield min(left, right), max(left, right), left < right


def _scores_against_ranks(preference: Preference) -> bool:
    scores = preference.scores
    if scores is None:
        return False
    pairs = combinations(zip(preference.ranks, scores, strict=True), 2)
    return any((j - i) * (b - a) > 0 for (i, a), (j, b) in pairs)


def _flatten(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {message_text(turn)}" for turn in prompt)


def _first_message(prompt: Prompt) -> str:
    """The first thing a user says."""
    if isinstance(prompt, str):
        return prompt
    return message_text(next((turn for turn in prompt if turn["role"] == "user"), prompt[0]))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’…–—")


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
