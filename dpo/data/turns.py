"""Which characters of a written conversation are what the assistant is to learn.

A response may have several turns: those of the assistant are scored, the others are read. Where its template
marks them (`{% generation %}`) the marks say which they are. Elsewhere they are found by writing the
conversation's beginnings: a turn starts where the text of all before it, with the assistant's turn opened,
ends, and ends where the text up to it ends. A template may write those beginnings otherwise (a block that
only the last turn has, reasoning left out of old ones): then a turn is what changes when its message does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.chat_template import PROBE, ChatInput, ChatTemplate
from dpo.data.messages import Turns, is_scored
from dpo.data.templates import Marked, Refusal

Span = tuple[int, int]
OTHER_PROBE = "\N{GREEK SMALL LETTER OMEGA} quick onyx goblin"
"""Begins and ends otherwise than `PROBE`, so that of the two one differs from any text at once."""


class TurnsNotFoundError(ValueError):
    """The template does not show where a turn stands; says why."""


class Written(NamedTuple):
    """A prompt with one response, as a template writes it."""

    prompt: Turns
    answer: Turns
    context: Mapping[str, Any] | None
    opened: Marked
    """The prompt alone, with the assistant's turn opened."""
    whole: Marked
    """The prompt with the response."""

    @property
    def messages(self) -> Turns:
        """The whole conversation."""
        return (*self.prompt, *self.answer)


def scored_spans(written: Written, template: ChatTemplate) -> list[Span]:
    """Where the scored turns of a response stand in the whole text, in order.

    Raises:
      TurnsNotFoundError: when neither marks nor beginnings say.
    """
    template = template.of(written.context)
    if template.has_marks:
        return _marked(written)
    return [
        _find(written, len(written.prompt) + i, template)
        for i, turn in enumerate(written.answer)
        if is_scored(turn)
    ]


def common_start(left: str, right: str) -> int:
    """How many characters two texts share from the start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _marked(written: Written) -> list[Span]:
    """All that is marked behind the prompt's own marks: a template may mark a turn in several pieces."""
    speakers = [turn for turn in written.answer if turn["role"] == "assistant"]
    of_prompt, marks = (_not_empty(one.marks) for one in (written.opened, written.whole))
    shared = common_start(written.opened.text, written.whole.text)
    mine = [mark for mark in marks[len(of_prompt) :] if mark[1] > shared]
    if len(mine) < len(speakers):
        raise TurnsNotFoundError(
            f"the template marks {len(mine)} turns of the assistant ({{% generation %}}), and the response "
            f"has {len(speakers)}"
        )
    if all(map(is_scored, speakers)):
        return mine
    if len(mine) > len(speakers):
        raise TurnsNotFoundError(
            f"the template marks {len(mine)} pieces of the assistant's {len(speakers)} turns "
            "({% generation %}), which does not say which have the weight 0"
        )
    return [mark for mark, turn in zip(mine, speakers, strict=True) if is_scored(turn)]


def _not_empty(marks: Sequence[Span]) -> list[Span]:
    return [mark for mark in marks if mark[0] < mark[1]]


def _find(written: Written, place: int, template: ChatTemplate) -> Span:
    """The turn of one message."""
    text, messages = written.whole.text, written.messages
    before = written.opened.text
    if place > len(written.prompt):
        before = _write(messages[:place], written.context, template, open_turn=True)
    start, end = _start(before, text, messages[:place], written.context, template), len(text)
    if place + 1 < len(messages):
        upto = _write(messages[: place + 1], written.context, template)
        end = len(upto) if upto is not None and text.startswith(upto) else None
    if start is None or end is None:
        changed = _changed(written, place, template)
        start = changed[0] if start is None else start
        end = changed[1] if end is None else end
    return start, end


def _start(
    before: str | None, text: str, turns: Turns, context: Mapping[str, Any] | None, template: ChatTemplate
) -> int | None:
    """Where the assistant's turn starts: what it is opened with may go on otherwise than the turn does."""
    if before is not None and text.startswith(before):
        return len(before)
    closed = _write(turns, context, template)
    if before is None or closed is None or not text.startswith(closed):
        return None
    return common_start(before, text)


def _changed(written: Written, place: int, template: ChatTemplate) -> Span:
    """What of the text changes with the message, and what the template puts after it."""
    text = written.whole.text
    starts, ends = [], []
    for probe in (PROBE, OTHER_PROBE):
        other = list(written.messages)
        other[place] = {"role": "assistant", "content": probe}
        found = _write(other, written.context, template)
        if found is None or probe not in found:
            raise TurnsNotFoundError("the template does not write the assistant's message")
        starts.append(common_start(text, found))
        ends.append(len(text) - common_start(text[::-1], found[::-1]))
    start, end = min(starts), max(ends)
    if start >= end:
        raise TurnsNotFoundError("the template writes the same whatever the assistant says")
    trailer = template.find_trailer()
    return start, end + common_start(text[end:], trailer)


def _write(
    messages: Sequence[Any],
    context: Mapping[str, Any] | None,
    template: ChatTemplate,
    *,
    open_turn: bool = False,
) -> str | None:
    (found,) = template.write([ChatInput(messages, context, open_turn)])
    return None if isinstance(found, Refusal) else found.text
