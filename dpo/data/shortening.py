"""A prompt with less at its beginning: whole turns first, then the beginning of the last one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from dpo.data.messages import Turns, message_text


class Shortened(NamedTuple):
    """What is left of a prompt."""

    prompt: Turns
    num_left_out: int
    """Messages, the oldest, that are not there any more."""
    is_cut: bool
    """Whether the first message after the system text lost its beginning."""


def shorten_prompt(prompt: Turns, fits: Callable[[Turns], bool]) -> Shortened | None:
    """The longest prompt that fits; None where not even the last word of the last turn does.

    System texts at the beginning stay. A turn is what the user says and all that follows until the user
    speaks again. Where the last turn alone is too long its first message keeps its last words.
    """
    start = next((i for i, turn in enumerate(prompt) if turn["role"] not in _SYSTEM), len(prompt))
    system, rest = prompt[:start], prompt[start:]
    borders = [i for i, turn in enumerate(rest) if i and turn["role"] == "user"]
    for border in borders:
        shorter = (*system, *rest[border:])
        if fits(shorter):
            return Shortened(shorter, border, is_cut=False)
    last = rest[borders[-1] if borders else 0 :]
    if not last:
        return None
    words = [found.start() for found in re.finditer(r"\S+", message_text(last[0]))][1:]
    low, high, best = 0, len(words) - 1, None
    while low <= high:
        middle = (low + high) // 2
        first = {**last[0], "content": message_text(last[0])[words[middle] :]}
        shorter = (*system, first, *last[1:])
        if fits(shorter):
            best, high = shorter, middle - 1
        else:
            low = middle + 1
    return None if best is None else Shortened(best, len(rest) - len(last), is_cut=True)


_SYSTEM = ("system", "developer")
