"""Messages of a conversation, whole: what a row says of them is what a chat template will see.

A message is an object with a role, a content (text, a list of parts of text, or nothing beside a tool call or
reasoning) and whatever else its row gives: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`,
`weight`, … ShareGPT's `from` and `value` become `role` and `content`. Text may stand for messages: as JSON,
and as a transcript (transcripts.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.json_text import DECODER
from dpo.data.malformed import MalformedRowError
from dpo.data.transcripts import (
    has_marked_turns,
    is_human_assistant,
    parse_human_assistant,
    parse_marked,
)
from dpo.data.values import (
    is_empty,
    is_plain_text,
    name_type,
    parse_json,
    read_any_text,
    read_json,
    read_text,
    show,
    show_names,
)

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ..., ...}`."""
Turns = tuple[Message, ...]
Prompt = str | Turns
"""Plain text, or the messages of a conversation."""
Response = str | Turns
"""Content of the assistant's message, or messages: a tool call, reasoning apart, several turns."""

ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "ipython",
    "environment",
    "function",
    "observation",
)
"""The last four are names for what a tool says, each some templates' own."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_ROLES = {role: role for role in ROLES} | {
    speaker: _SHAREGPT_ROLES[speaker] for speaker in ("human", "gpt", "chatgpt", "bot", "model")
}
"""What may stand in `role`, in any case; ShareGPT's names of people and models are known there too."""
_ALL_ROLES = frozenset(ROLES)
_MAY_BE_EMPTY = _ALL_ROLES - {"user", "assistant"}
_SAYS_NOTHING = frozenset({"role", "content", "weight", "name", "id"})
"""Keys of a message that do not stand in for a content."""
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_REASONING_PARTS = frozenset({"thinking", "reasoning"})
_PARTS = _TEXT_PARTS | _REASONING_PARTS
_JSON_OBJECTS = re.compile(r"""\s*(\[\s*)?\{\s*\"""")
_BODIES = frozenset({"content", "tool_calls"})
_JSON_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:""")


def read_prompt(value: Any, field: str) -> Prompt:
    """Text or a conversation; one in the HH style may end where the assistant is to speak."""
    if has_marked_turns(value):
        return parse_marked(value, field)
    return _text_or_turns(value, field, may_be_open=True)


def read_turns(value: Any, field: str) -> Response:
    """Text or a conversation."""
    return _text_or_turns(value, field, may_be_open=False)


def as_turns(prompt: Prompt) -> Turns:
    """A prompt as messages: text is what the user says."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def answer_turns(response: Response) -> Turns:
    """A response as messages: text is what the assistant says."""
    return ({"role": "assistant", "content": response},) if isinstance(response, str) else response


def as_response(turns: Turns) -> Response:
    """The text where messages are one text of the assistant and nothing else, else the messages."""
    lone = len(turns) == 1 and turns[0].keys() == {"role", "content"}
    return turns[0]["content"] if lone and isinstance(turns[0]["content"], str) else turns


def message_text(message: Message) -> str:
    """The text of a message's content, of all its parts one after the other."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or () if not is_reasoning(part))


def reasoning_text(message: Message) -> str:
    """The text of the parts of reasoning among a message's content; empty where there are none."""
    content = message.get("content")
    return "" if content is None or isinstance(content, str) else "".join(map(_reasoning, content))


def is_reasoning(part: Mapping[str, Any]) -> bool:
    """Whether a part of a content is of reasoning, which is no part of what is said."""
    return part.get("type") in _REASONING_PARTS


def _reasoning(part: Mapping[str, Any]) -> str:
    """Of a part by whichever key it has its text, which Mistral's have in parts once more."""
    if not is_reasoning(part):
        return ""
    said = next((part[key] for key in ("thinking", "reasoning", "text") if key in part), "")
    if isinstance(said, str):
        return said
    pieces = said if isinstance(said, Sequence) else ()
    texts = (piece.get("text") for piece in pieces if isinstance(piece, Mapping))
    return "".join(text for text in texts if isinstance(text, str))


def turn_of(role: str, content: Any, field: str) -> Message:
    """A user's or an assistant's message whose content stands alone in a row, where `field` says.

    Raises:
      MalformedRowError: naming that field for what is neither text nor parts of text.
    """
    return {"role": role, "content": _text_or_parts(content, field, may_be_empty=False)}


def response_text(response: Response) -> str:
    """A response for people to read: the text, and of messages also what is not text."""
    if isinstance(response, str):
        return response
    return "\n".join(_describe(turn, alone=len(response) == 1) for turn in response)


def show_turn(message: Message) -> str:
    """Who says it and how it begins, for errors."""
    return f"{message['role']} {show(message_text(message))}"


def is_scored(message: Message) -> bool:
    """Whether a message of a response is learned: the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _describe(turn: Message, *, alone: bool) -> str:
    more = [f"[{key}: {value}]" for key, value in turn.items() if key not in _SAYS_NOTHING]
    text = " ".join([piece for piece in (message_text(turn), *more) if piece])
    return text if alone else f"{turn['role']}: {text}"


def _text_or_turns(value: Any, field: str, *, may_be_open: bool) -> Prompt:
    if is_plain_text(value):
        return value
    if isinstance(value, str):
        text = read_text(value, field)
        if is_human_assistant(text):
            return parse_human_assistant(text, field, may_be_open=may_be_open)
        given = _messages_of_json(text, field)
        if given is None:
            return text
        value = given
    if type(value) is not list and isinstance(value, Mapping) and _is_message(value):
        return (_plain(value) or _message(value, field),)
    if type(value) is not list and (not isinstance(value, Sequence) or isinstance(value, bytes)):
        found = f"an object with {show_names(value)}" if isinstance(value, Mapping) else name_type(value)
        detail = f"found {found}; allowed is a string or a list of messages"
        raise MalformedRowError(field, "wrong_type", detail)
    if not value:
        raise MalformedRowError(field, "empty", "found no message; allowed is one or more")
    if isinstance(value[0], str) and all(isinstance(turn, str) for turn in value):
        detail = (
            f"found a list of {len(value)} strings; allowed is a string or a list of messages (several "
            "responses to one prompt are a ranking: responses, with ranks or scores)"
        )
        raise MalformedRowError(field, "wrong_type", detail)
    return tuple([_plain(turn) or _message(turn, f"{field}[{i}]") for i, turn in enumerate(value)])


def _messages_of_json(text: str, field: str) -> Any:
    """The message or messages that a JSON text says; None for any other text."""
    if _JSON_MESSAGES.match(text):
        return parse_json(text, field)
    if not _JSON_OBJECTS.match(text):
        return None
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    value = value.get("messages", value) if isinstance(value, Mapping) else value
    turns = [value] if isinstance(value, Mapping) else value
    return value if turns and all(map(_says_message, turns)) else None


def _says_message(value: Any) -> bool:
    """Whether an object can be nothing but a message."""
    if not isinstance(value, Mapping):
        return False
    role = value.get("role")
    is_ours = isinstance(role, str) and role.lower() in _ROLES and not _BODIES.isdisjoint(value)
    return is_ours or (
        isinstance(value.get("from"), str) and value["from"] in _SHAREGPT_ROLES and "value" in value
    )


def _is_message(value: Mapping[str, Any]) -> bool:
    return "role" in value or ("from" in value and "value" in value)


def _plain(turn: Any) -> Message | None:
    """A message of a role and a text, as nearly all are; None for one that has to be looked at closely."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role"), turn.get("content")
    if type(role) is not str or role not in _ALL_ROLES or not is_plain_text(content):
        return None
    return {"role": role, "content": content}


def _message(turn: Any, field: str) -> Message:
    body = "content"
    if isinstance(turn, Mapping) and "role" not in turn and "from" in turn and "value" in turn:
        turn, body = _from_sharegpt(turn, field), "value"
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise _no_message(field)
    role = _ROLES.get(turn["role"].lower()) if isinstance(turn["role"], str) else None
    if role is None:
        raise MalformedRowError(
            f"{field}.role", "roles", f"found {show(turn['role'])}; allowed are {', '.join(_ROLES)}"
        )
    turn = _with_calls(turn, field)
    rest = {key: value for key, value in turn.items() if value is not None and key not in ("role", "content")}
    if rest:
        read_json(rest, field)
        if role == "assistant" and rest.get("weight", 1) not in (0, 1):
            detail = f"found {show(rest['weight'])}; allowed are 1, and 0 for what is read and not learned"
            raise MalformedRowError(f"{field}.weight", "unknown_weight", detail)
    turn = turn if turn["role"] == role else {**turn, "role": role}
    content = _content(turn, rest, field, body)
    if not rest:
        return {"role": role, "content": content}
    kept = {key: content if key == "content" else value for key, value in turn.items()}
    return {key: value for key, value in kept.items() if value is not None or key == "content"} | {
        "content": content
    }


def _with_calls(turn: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """A message whose tool calls, which may be JSON text, are a list; without them where there are none."""
    if "tool_calls" not in turn:
        return turn
    calls = turn["tool_calls"]
    if isinstance(calls, str) and not is_empty(calls):
        calls = parse_json(calls, f"{field}.tool_calls")
    if is_empty(calls):
        return {key: value for key, value in turn.items() if key != "tool_calls"}
    return turn if calls is turn["tool_calls"] else {**turn, "tool_calls": calls}


def _no_message(field: str) -> MalformedRowError:
    detail = "allowed is an object with the strings 'role' and 'content' (or ShareGPT's 'from' and 'value')"
    return MalformedRowError(field, "wrong_type", detail)


def _content(turn: Mapping[str, Any], rest: Mapping[str, Any], field: str, body: str) -> Any:
    """Text, parts, or null where something else of the message stands in for it."""
    content = turn.get("content")
    stands_in = bool(rest.keys() - _SAYS_NOTHING)
    if content is None and stands_in:
        return None
    if content is None and "content" not in turn:
        raise _no_message(field)
    return _text_or_parts(content, f"{field}.{body}", stands_in or turn["role"] in _MAY_BE_EMPTY)


def _text_or_parts(content: Any, field: str, may_be_empty: bool) -> Any:
    if not isinstance(content, (str, bytes)) and isinstance(content, Sequence):
        parts = [_part(part, f"{field}[{i}]") for i, part in enumerate(content)]
        if not may_be_empty:
            read_text("".join(part.get("text", "") for part in parts), field)
        return parts
    return (read_any_text if may_be_empty else read_text)(content, field)


def _part(part: Any, field: str) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": read_any_text(part, field)}
    if not isinstance(part, Mapping):
        detail = f"found {name_type(part)}; allowed is an object with 'type' and 'text'"
        raise MalformedRowError(field, "wrong_type", detail)
    kind = part.get("type", "text")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise MalformedRowError(
            field,
            "not_text",
            f"found a part of type {show(kind)}; allowed is text: models here read no other",
        )
    if kind in _TEXT_PARTS:
        read_any_text(part.get("text"), f"{field}.text")
        part = {**part, "type": "text"} if "type" in part else part
    return read_json({key: value for key, value in part.items() if value is not None}, field)


def _from_sharegpt(turn: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    speaker = turn["from"].lower() if isinstance(turn["from"], str) else None
    if speaker not in _SHAREGPT_ROLES:
        allowed = ", ".join(_SHAREGPT_ROLES)
        raise MalformedRowError(
            f"{field}.from", "roles", f"found {show(turn['from'])}; allowed are {allowed}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role = _SHAREGPT_ROLES[speaker]
    if speaker != "function_call":
        return {"role": role, "content": turn["value"], **rest}
    calls = parse_json(read_text(turn["value"], f"{field}.value"), f"{field}.value")
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": role,
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
        **rest,
    }
