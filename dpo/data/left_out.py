"""What a row gives a chat template that the template does not read: the text is the same without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.chat_template import PROBE, REASONING, ChatInput, ChatTemplate
from dpo.data.messages import Message, Turns, is_reasoning, message_text, reasoning_text
from dpo.data.templates import Marked, Refusal
from dpo.data.values import is_empty

MUST_SHOW = frozenset({"tool_calls", "function_call", "function_calls", "tools", "functions", "documents"})
"""What a response is, or answers to: without it another thing would be learned."""
_READ_ELSEWHERE = frozenset({"role", "content", "weight"})
ARGUMENTS = "chat_template_kwargs"


class Field(NamedTuple):
    """Something of a row besides roles and contents."""

    name: str
    place: str
    """prompt, response or row."""

    def __str__(self) -> str:
        return self.name if self.place == "row" else f"{self.name} (of the {self.place})"


class Conversations(NamedTuple):
    """A prompt with its responses as they were written."""

    prompt: Turns
    answers: Sequence[Turns]
    context: Mapping[str, Any] | None
    opened: str
    """Of the prompt, to where the assistant is to speak."""
    texts: Sequence[str]
    """Of the prompt with each response."""


def has_fields(prompt: Turns, answers: Sequence[Turns], context: Mapping[str, Any] | None) -> bool:
    """Whether there is anything that a template could leave out."""
    return context is not None or any(
        turn.keys() - _READ_ELSEWHERE or reasoning_text(turn)
        for turns in (prompt, *answers)
        for turn in turns
    )


def is_as_it_stands(one: Conversations) -> bool:
    """Whether every message's content is in the texts, as nearly all are."""
    pairs = zip(one.answers, one.texts, strict=True)
    return not any(_missed((*one.prompt, *turns), text) for turns, text in pairs)


def find_rewritten(one: Conversations) -> list[str]:
    """Where the assistant says what is not written as it stands, such as reasoning in its content."""
    pairs = zip(one.answers, one.texts, strict=True)
    places = {
        "the content of a response": any("assistant" in _missed(turns, text) for turns, text in pairs),
        "what the assistant says in the prompt": "assistant" in _missed(one.prompt, one.texts[0]),
    }
    return [place for place, is_there in places.items() if is_there]


def find_left_out(conversations: Sequence[Conversations], template: ChatTemplate) -> list[list[Field]]:
    """Of each preference, the fields without which the template writes the same."""
    return _change_nothing(conversations, template, _without_each)


def find_unwritten(conversations: Sequence[Conversations], template: ChatTemplate) -> list[list[Field]]:
    """Of each preference, whose messages (the tool's, the system's, …) have contents that are not written.

    Another text in their place then changes nothing. A template may write a content otherwise than it stands
    (as JSON, say), so that to miss it is no more than a reason to try.
    """
    return _change_nothing(conversations, template, _with_others)


def _change_nothing(
    conversations: Sequence[Conversations],
    template: ChatTemplate,
    change: Callable[[Conversations], Iterable[tuple[Field, list[ChatInput]]]],
) -> list[list[Field]]:
    """Of each preference, the changed fields with which the template writes the same; it is asked once."""
    asked = [
        (number, field, inputs) for number, one in enumerate(conversations) for field, inputs in change(one)
    ]
    written = iter(template.write([given for _, _, inputs in asked for given in inputs]))
    found: list[list[Field]] = [[] for _ in conversations]
    for number, field, inputs in asked:
        one, texts = conversations[number], [next(written) for _ in inputs]
        if _same(texts, [one.opened, *one.texts] if inputs[0].open_turn else one.texts):
            found[number].append(field)
    return found


def _with_others(one: Conversations) -> Iterator[tuple[Field, list[ChatInput]]]:
    """Whose contents are missed, and all conversations with other ones in their place."""
    for role in dict.fromkeys(_missed(one.prompt, one.texts[0])):
        prompt = _replace(one.prompt, role, one.texts[0])
        yield Field(f"the content of {role} messages", "prompt"), _all(prompt, one, one.context)
    pairs = list(zip(one.answers, one.texts, strict=True))
    for role in dict.fromkeys(role for turns, text in pairs for role in _missed(turns, text)):
        answers = [_replace(turns, role, text) for turns, text in pairs]
        inputs = [ChatInput((*one.prompt, *turns), one.context) for turns in answers]
        yield Field(f"the content of {role} messages", "response"), inputs


def _missed(turns: Turns, text: str) -> list[str]:
    return [turn["role"] for turn in turns if not _is_written(turn, text)]


def _is_written(turn: Message, text: str) -> bool:
    """Whether a text has the content of a message as it stands."""
    return message_text(turn).strip() in text


def _replace(turns: Turns, role: str, text: str) -> Turns:
    """The messages with another content where a role's is missed."""
    return tuple(
        {**turn, "content": PROBE} if turn["role"] == role and not _is_written(turn, text) else turn
        for turn in turns
    )


def _same(written: Sequence[Marked | Refusal], texts: Sequence[str]) -> bool:
    return all(
        isinstance(other, Marked) and other.text == text for other, text in zip(written, texts, strict=True)
    )


def _without_each(one: Conversations) -> Iterator[tuple[Field, list[ChatInput]]]:
    """Every field, and all conversations without it."""
    for name in _names(one.prompt):
        yield Field(name, "prompt"), _all(_without(one.prompt, name), one, one.context)
    for name in dict.fromkeys(name for turns in one.answers for name in _names(turns)):
        inputs = [ChatInput((*one.prompt, *_without(turns, name)), one.context) for turns in one.answers]
        yield Field(name, "response"), inputs
    for name, context in _without_context(one.context or {}):
        yield Field(name, "row"), _all(one.prompt, one, context)


def _all(prompt: Sequence[Message], one: Conversations, context: Mapping[str, Any] | None) -> list[ChatInput]:
    """A prompt in the place of the conversations' own, alone and with each response."""
    wholes = [ChatInput((*prompt, *turns), context) for turns in one.answers]
    return [ChatInput(prompt, context, open_turn=True), *wholes]


def _names(turns: Turns) -> list[str]:
    """What messages have that says something, besides roles and contents but with parts of reasoning."""
    there = (
        name for turn in turns for name in turn if name not in _READ_ELSEWHERE and not is_empty(turn[name])
    )
    parts = [_PARTS] * any(map(reasoning_text, turns))
    return list(dict.fromkeys([*there, *parts]))


_PARTS = "parts of reasoning"


def _without(turns: Turns, name: str) -> list[Message]:
    return [_without_field(turn, name) for turn in turns]


def _without_field(turn: Message, name: str) -> Message:
    """Reasoning goes by all names by which it says the same."""
    if name == _PARTS:
        content = turn.get("content")
        parts = content if isinstance(content, list) else []
        return {**turn, "content": [p for p in parts if not is_reasoning(p)]} if parts else turn
    names = REASONING if name in REASONING else (name,)
    return {key: value for key, value in turn.items() if key not in names or value != turn.get(name)}


def _without_context(context: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in context:
        if name != ARGUMENTS:
            yield name, {key: value for key, value in context.items() if key != name}
    arguments = context.get(ARGUMENTS, {})
    for name in (name for name in arguments if not is_empty(arguments[name])):
        rest = {key: value for key, value in arguments.items() if key != name}
        yield f"{ARGUMENTS}.{name}", {**context, ARGUMENTS: rest}
