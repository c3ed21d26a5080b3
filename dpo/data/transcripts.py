"""Conversations that a row holds as one text, with the speakers' names or marks between the turns.

Two ways are known: "\\n\\nHuman: …\\n\\nAssistant: …" of Anthropic's HH, and, in prompts, NeMo's marks, as
HelpSteer2 has them: "…\\n<extra_id_1>Assistant\\n…\\n<extra_id_1>User\\n…".
"""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from dpo.data.values import read_text

Turn = dict[str, str]
"""A role and a content."""
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_NEMO_MARK = "<extra_id_1>"
_NEMO_TURN = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)\n")
_SAYS = {"Human": "user", "User": "user", "Assistant": "assistant"}


def is_human_assistant(value: Any) -> bool:
    """Whether a text is a conversation in the style of HH."""
    return isinstance(value, str) and _HH_TURN.match(value) is not None


def has_marked_turns(value: Any) -> TypeGuard[str]:
    """Whether a text has turns between NeMo's marks."""
    return isinstance(value, str) and _NEMO_MARK in value and _NEMO_TURN.search(value) is not None


def parse_human_assistant(text: str, field: str, *, may_be_open: bool) -> tuple[Turn, ...]:
    """Its turns; where `may_be_open`, an empty one of the assistant at the end is where it is to speak."""
    pieces = _HH_TURN.split(text)[1:]
    pairs = list(zip(pieces[0::2], pieces[1::2], strict=True))
    if may_be_open and len(pairs) > 1 and pairs[-1][0] == "Assistant" and not pairs[-1][1].strip():
        pairs.pop()
    return tuple(
        {"role": _SAYS[role], "content": read_text(content.strip(), f"{field}[{i}].content")}
        for i, (role, content) in enumerate(pairs)
    )


def parse_marked(text: str, field: str) -> tuple[Turn, ...]:
    """Turns between NeMo's marks; what stands before the first one is what the user says."""
    first, *rest = _NEMO_TURN.split(read_text(text, field))
    said = [("User", first)] * bool(first.strip()) + list(zip(rest[0::2], rest[1::2], strict=True))
    if len(said) > 1 and said[-1][0] == "Assistant" and not said[-1][1].strip():
        said.pop()
    return tuple(
        {"role": _SAYS[speaker], "content": read_text(content.strip("\n"), f"{field}[{i}].content")}
        for i, (speaker, content) in enumerate(said)
    )
