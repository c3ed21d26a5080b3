"""A chat template with all that it sees: messages, tools, documents, arguments, special tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo.data.json_text import DECODER
from dpo.data.messages import Message, message_text, reasoning_text
from dpo.data.templates import LIMITS, Marked, Refusal, SandboxedTemplate
from dpo.outcomes import UserError

SETTING = "data.template_characters (template_characters in dpo evaluate, winrate and generate)"
PROBE = "Zwölf Boxkämpfer jagen Viktor"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, the one that counts first; templates read the first two."""
_MARKS = re.compile(r"\{%[-+]?\s*generation\b")


class ChatInput(NamedTuple):
    """What a template is to write once."""

    messages: Sequence[Message]
    context: Mapping[str, Any] | None = None
    """Tools, documents and arguments of a row (`Preference.context`)."""
    open_turn: bool = False
    """Whether the text ends where the assistant is to speak."""


class ChatTemplate:
    """Writes conversations as transformers' `apply_chat_template` does, and knows a few things of itself."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        name: str,
        date: str,
        arguments: Mapping[str, Any],
        characters: int = LIMITS.characters,
        with_tools: str | None = None,
    ) -> None:
        """`with_tools` is the text of another one, which writes conversations that have tools."""
        self.text = text
        self._with_tools = None
        if with_tools is not None and with_tools != text:
            self._with_tools = ChatTemplate(
                tokenizer, with_tools, name=name, date=date, arguments=arguments, characters=characters
            )
        self.has_marks = _MARKS.search(text) is not None
        limits = LIMITS._replace(characters=characters)
        self._template = SandboxedTemplate(text, name=name, date=date, limits=limits, setting=SETTING)
        self._fixed = {**tokenizer.special_tokens_map, **arguments}

    @property
    def texts(self) -> str | list[str]:
        """The text, and that of the one for tools where there is one."""
        return self.text if self._with_tools is None else [self.text, self._with_tools.text]

    def of(self, context: Mapping[str, Any] | None) -> ChatTemplate:
        """The template that writes a row with this context."""
        has_tools = context is not None and context.get("tools") is not None
        return self._with_tools if has_tools and self._with_tools is not None else self

    def write(self, inputs: Sequence[ChatInput]) -> list[Marked | Refusal]:
        """The text of every input, or the template's error."""
        if self._with_tools is None:
            return self._template.render_marked([self._variables(given) for given in inputs])
        writers = [self.of(given.context) for given in inputs]
        found: dict[int, Marked | Refusal] = {}
        for writer in (self, self._with_tools):
            mine = [i for i, one in enumerate(writers) if one is writer]
            variables = [writer._variables(inputs[i]) for i in mine]
            found |= zip(mine, writer._template.render_marked(variables), strict=True)
        return [found[i] for i in range(len(inputs))]

    def write_one(self, messages: Sequence[Message], *, open_turn: bool = False) -> str:
        """One conversation's text.

        Raises:
          ValueError: when the template refuses it.
        """
        return self._template.render(self._variables(ChatInput(messages, None, open_turn)))

    def find_trailer(self) -> str:
        """What the template puts after the assistant's text at the end of a conversation.

        Raises:
          ValueError: when it leaves the text out.
        """
        text = self.write_one([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}])
        if PROBE not in text:
            raise UserError(
                "the chat template leaves out the assistant's message; end_token must be 'template'"
            )
        return text[text.rindex(PROBE) + len(PROBE) :]

    def _variables(self, given: ChatInput) -> dict[str, Any]:
        context = given.context or {}
        return {
            "messages": [self._message(message) for message in given.messages],
            "tools": context.get("tools"),
            "documents": context.get("documents"),
            "add_generation_prompt": given.open_turn,
            **self._fixed,
            **context.get("chat_template_kwargs", {}),
        }

    def _message(self, message: Message) -> dict[str, Any]:
        """A message in the form that this template reads: of content and arguments there are two.

        As transformers gives it: without what is null, and with reasoning by each name that templates read,
        also that of parts of a content where parts are not read.
        """
        seen = {key: value for key, value in message.items() if value is not None}
        if isinstance(seen.get("content"), list) and not self._reads_parts:
            seen["content"], reasoning = message_text(message), reasoning_text(message)
            seen = {REASONING[0]: reasoning, **seen} if reasoning and _says_none(seen) else seen
        seen = _with_reasoning(seen)
        calls = seen.get("tool_calls")
        if (
            isinstance(calls, list)
            and any(map(_has_text_arguments, calls))
            and not self._reads_text_arguments
        ):
            seen["tool_calls"] = [_with_object_arguments(call) for call in calls]
        return seen

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether a content of one part of text is written as the text alone is."""
        parts = [{"type": "text", "text": PROBE}]
        text, other = (self._probe({"role": "user", "content": content}) for content in (PROBE, parts))
        return text is not None and text == other

    @cached_property
    def _reads_text_arguments(self) -> bool:
        """Whether arguments of a tool call that are JSON text are written as that text, not quoted again."""
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": '{"x": "y"}'}}
        text = self._probe({"role": "assistant", "content": "", "tool_calls": [call]})
        return text is None or '{"x": "y"}' in text

    def _probe(self, message: Message) -> str | None:
        turns = [{"role": "user", "content": "Hello"}, message]
        variables = {"messages": turns[message["role"] == "user" :], "tools": None, "documents": None}
        (found,) = self._template.render_all([variables | {"add_generation_prompt": False} | self._fixed])
        return None if isinstance(found, Refusal) else found


def _says_none(message: Mapping[str, Any]) -> bool:
    return message.keys().isdisjoint(REASONING)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if name in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _has_text_arguments(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("arguments"), str)


def _with_object_arguments(call: Any) -> Any:
    """The call with arguments as an object, where its text says one."""
    if not _has_text_arguments(call):
        return call
    function = call.get("function", call)
    try:
        arguments = DECODER.decode(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
