"""The verdict in what a judge that reads text has written."""

from __future__ import annotations

import re

from dpo.judging.judges import LETTERS, Choice


def read_answer(answer: str, *, is_cut: bool = False) -> Choice | None:
    """The verdict in a text: [[A]], [[B]] or [[C]], or the bare letter as the whole answer.

    What a model says while it reasons (a block of `<think>`, or of another maker's marks) is no verdict. The
    last line counts, so that a verdict which is quoted above it does not; where the last line has none, all
    that there are must agree. None where there is no verdict, or several that differ. An answer that was cut
    off has no last line: its verdict is what it begins with, where no other follows.
    """
    said = _without_reasoning(answer).strip()
    found = set(_VERDICT.findall(said))
    if is_cut and re.match(rf"\W*?{_VERDICT.pattern}", said) is None:
        found = set()
    elif not is_cut:
        found = set(_VERDICT.findall(said.splitlines()[-1] if said else "")) or found
    if _VERDICT.search(said) is None:
        found = set(re.findall(r"^\W*([ABC])\W*$", said))
    return LETTERS[found.pop()] if len(found) == 1 else None


_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_REASONING = r"(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
_OPENS = re.compile(
    rf"<(?:\w+:)?{_REASONING}>|\[THINK\]|◁think▷|<\|(?:start|begin)(?:_of)?_{_REASONING}\|>"
    r"|<\|channel\|?>(?!\s*final)",
    re.IGNORECASE,
)
_CLOSES = re.compile(
    rf"</(?:\w+:)?{_REASONING}>|\[/THINK\]|◁/think▷|<\|end(?:_of)?_{_REASONING}\|>"
    r"|<\|channel\|>\s*final(?:<\|message\|>)?|<channel\|>",
    re.IGNORECASE,
)
"""Marks of DeepSeek's and Qwen's descendants and of prompts; of Mistral, Kimi, Cohere and OpenThinker; of
gpt-oss and Gemma 4, whose answer is another channel."""


def _without_reasoning(answer: str) -> str:
    """What is said after the last block of reasoning; nothing where such a block does not end.

    The opening tag may be missing: some templates put it into the question.
    """
    return _OPENS.split(_CLOSES.split(answer)[-1], maxsplit=1)[0]
