"""Where a prompt ends and its responses begin, said by the row or found as what all responses share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.malformed import MalformedRowError
from dpo.data.messages import (
    Prompt,
    Response,
    Turns,
    as_response,
    as_turns,
    is_scored,
    message_text,
    read_prompt,
    read_turns,
    show_turn,
)
from dpo.data.transcripts import is_human_assistant
from dpo.data.values import is_plain_text


def split_prompt(
    prompt: Prompt | None,
    given: Mapping[str, Any],
    *,
    strip: bool = False,
    setting: str = "data.columns",
) -> tuple[Prompt, list[Response]]:
    """The prompt and what follows it in every given field, whether the field repeats the prompt or not.

    Without a prompt it is what all fields share. `strip` takes white space off the ends of responses that
    are text, as the style of HH has it; `setting` is where the user can name the prompt.
    """
    fields: dict[str, Response] = {
        field: value if is_plain_text(value) else read_turns(value, field) for field, value in given.items()
    }
    if prompt is not None and strip:
        fields = {f: value.strip() if isinstance(value, str) else value for f, value in fields.items()}
    conversations = {field: value for field, value in fields.items() if not isinstance(value, str)}
    whole = len(conversations) == len(fields) and all(
        t[0]["role"] != "assistant" for t in conversations.values()
    )
    if prompt is not None and whole and not _all_begin_with(conversations, as_turns(prompt)):
        return _split_around(prompt, conversations)
    if isinstance(prompt, str) and whole and _share_a_prompt(conversations):
        return _split_conversations(conversations)
    if prompt is not None:
        return _split_explicit(prompt, fields)
    if len(conversations) == len(fields):
        return _split_conversations(conversations)
    texts = [value for value in fields.values() if isinstance(value, str)]
    if len(texts) == len(fields) > 1:
        return _split_strings(texts, list(fields), setting)
    raise MalformedRowError("prompt", "missing_field", "no prompt, and the responses have none in common")


def read_prompt_column(value: Any, field: str) -> tuple[Prompt, bool]:
    """A prompt, and whether responses beside it have white space of the style of HH around them."""
    return read_prompt(value, field), is_human_assistant(value)


def _all_begin_with(conversations: Mapping[str, Turns], turns: Turns) -> bool:
    return all(len(v) > len(turns) and v[: len(turns)] == turns for v in conversations.values())


def _share_a_prompt(conversations: Mapping[str, Turns]) -> bool:
    """Whether the messages that all share end where the assistant is to speak.

    A text as a prompt beside them is then how they begin: they may have several turns in common.
    """
    first, shared = _shared(conversations)
    return shared > 0 and first[shared - 1]["role"] != "assistant"


def _shared(conversations: Mapping[str, Turns]) -> tuple[Turns, int]:
    """The first conversation, and how many of its messages all begin with; each has one more."""
    shortest = min(len(turns) for turns in conversations.values())
    first, *others = conversations.values()
    shared = 0
    while shared < shortest - 1 and all(turns[shared] == first[shared] for turns in others):
        shared += 1
    return first, shared


def _split_around(prompt: Prompt, conversations: dict[str, Turns]) -> tuple[Prompt, list[Response]]:
    """Whole conversations beside a prompt that is a part of what they share, such as its last message."""
    shared, responses = _split_conversations(conversations)
    turns = as_turns(shared)
    if isinstance(prompt, str):
        is_part = any(prompt.strip() in message_text(turn) for turn in turns)
        is_part = is_part or all(message_text(turn).strip() in prompt for turn in turns)
    else:
        is_part = turns[len(turns) - len(prompt) :] == prompt
    if not is_part:
        detail = "is not among the messages that all responses share; allowed is the same prompt in both"
        raise MalformedRowError("prompt", "prompt_differs", detail)
    return shared, responses


def _split_explicit(prompt: Prompt, fields: Mapping[str, Response]) -> tuple[Prompt, list[Response]]:
    turns = as_turns(prompt)
    if turns[-1]["role"] == "assistant":
        detail = "ends with an assistant message; allowed last are user, system and tool"
        raise MalformedRowError("prompt", "roles", detail)
    responses: list[Response] = []
    for field, value in fields.items():
        if isinstance(value, str):
            responses.append(value)
            continue
        if len(value) > len(turns) and value[: len(turns)] == turns:
            value = value[len(turns) :]
        responses.append(_check_response(value, field))
    return prompt, responses


def _split_conversations(fields: Mapping[str, Turns]) -> tuple[Prompt, list[Response]]:
    """The prompt is the messages that all share; what each adds to it ends with the assistant."""
    first, shared = _shared(fields)
    if shared == 0:
        begins = " and ".join(dict.fromkeys(show_turn(turns[0]) for turns in fields.values()))
        detail = f"no prompt, and the conversations share no first message: {begins}; allowed is the same one"
        raise MalformedRowError("prompt", "no_common_prompt", detail)
    if all(turns[shared]["role"] not in _SPEAK for turns in fields.values()):
        while shared > 1 and first[shared - 1]["role"] == "assistant":
            shared -= 1  # a tool answers a call of the response otherwise
    if first[shared - 1]["role"] == "assistant":
        raise MalformedRowError(
            "prompt", "roles", "the shared messages end with the assistant; allowed last is the user"
        )
    return first[:shared], [_check_response(turns[shared:], field) for field, turns in fields.items()]


_SPEAK = frozenset({"system", "developer", "user", "assistant"})


def _split_strings(texts: list[str], fields: list[str], setting: str) -> tuple[Prompt, list[Response]]:
    """The prompt is the common prefix, cut back to a border between words when it ends inside one."""
    low, high = min(texts), max(texts)
    end = next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    while end and not (low[end - 1].isspace() or all(end < len(t) and t[end].isspace() for t in texts)):
        end -= 1
    prompt = low[:end].rstrip(" ")
    if not prompt.strip():
        raise MalformedRowError(
            "prompt",
            "no_common_prompt",
            "no prompt, and the strings share no first words; allowed is a prompt, by "
            f"{setting} under another name",
        )
    responses: list[Response] = [text[len(prompt) :] for text in texts]
    for field, response in zip(fields, responses, strict=True):
        if isinstance(response, str) and not response.strip():
            raise MalformedRowError(field, "empty", "nothing is left after the words shared by all strings")
    return prompt, responses


def repeats_prompt(prompt: Prompt, responses: Sequence[Response]) -> bool | None:
    """Whether responses that are text all begin with a prompt that is one text; None where they are not.

    White space at the end of the prompt does not matter.
    """
    text = _lone_text(prompt)
    texts = [response for response in responses if isinstance(response, str)]
    if text is None or len(texts) < len(responses):
        return None
    return all(response.startswith(text) for response in texts)


def cut_repeated(
    prompt: Prompt, responses: list[Response], fields: Sequence[str]
) -> tuple[list[Response], bool]:
    """Responses without the prompt that they begin with, and whether they did.

    Raises:
      MalformedRowError: where some begin with it and others do not, or nothing follows it.
    """
    repeats = repeats_prompt(prompt, responses)
    text = _lone_text(prompt)
    if repeats is None or text is None:
        return responses, False
    for field, response in zip(fields, responses, strict=True):
        if not repeats and not str(response).startswith(text):
            detail = "does not begin with the prompt, as the responses of most rows do; allowed is one way"
            raise MalformedRowError(field, "prompt_not_repeated", detail)
    whole = prompt if isinstance(prompt, str) else message_text(prompt[0])
    cut = [str(r)[len(whole if str(r).startswith(whole) else text) :] for r in responses]
    for field, response in zip(fields, cut, strict=True):
        if not response.strip():
            raise MalformedRowError(field, "empty", "nothing is left after the prompt that it begins with")
    return list(cut), True


def _lone_text(prompt: Prompt) -> str | None:
    """The text of a prompt of one message, as far as a response may repeat it."""
    turns = as_turns(prompt)
    return message_text(turns[0]).rstrip() or None if len(turns) == 1 else None


def _check_response(turns: Turns, field: str) -> Response:
    """One or several messages of which the assistant says the first and the last."""
    if len(turns) == 1 and turns[0]["role"] == "assistant" and len(turns[0]) == 2:
        return as_response(turns)
    roles = [turn["role"] for turn in turns]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        detail = f"adds the roles {_shorten(roles)} to the prompt; allowed first and last is the assistant"
        raise MalformedRowError(field, "roles", detail)
    if not any(map(is_scored, turns)):
        detail = "no assistant message has a weight other than 0; allowed is at least one"
        raise MalformedRowError(field, "nothing_scored", detail)
    return as_response(turns)


def _shorten(roles: Sequence[str]) -> str:
    return f"[{', '.join(roles[:6])}{', …' if len(roles) > 6 else ''}]"


def with_system(prompt: Prompt, text: str, field: str) -> Turns:
    """The prompt after a system text that stands in a column of its own."""
    turns = as_turns(prompt)
    if turns[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": text}, *turns)
    if message_text(turns[0]).strip() != text.strip():
        detail = "differs from the system message of the prompt; allowed is one system text"
        raise MalformedRowError(field, "two_systems", detail)
    return turns


def mentions(prompt: Prompt, text: str) -> bool:
    """Whether a text stands in the prompt already."""
    return any(text.strip() in message_text(turn) for turn in as_turns(prompt))


def same_prompt(left: Prompt, right: Prompt) -> bool:
    """Whether two prompts say the same."""
    return as_turns(left) == as_turns(right)
