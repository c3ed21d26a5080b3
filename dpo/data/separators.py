"""Special tokens at which a text may be cut, so that its pieces are tokenised apart and to the same ids.

A chat template writes `<|im_start|>` and its like between turns, and the texts of one preference share
whole turns: the prompt stands alone, with the chosen and with the rejected response. A tokenizer looks for
its added tokens first, from the left and the longest at each place, and whatever follows sees one piece
between them at a time. An added token that no added token can overlap is therefore found wherever it stands,
and what is before it and behind it see nothing of each other. What could see more (`_is_local`, `_may_cut`)
is ruled out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken
from tokenizers.models import BPE, WordLevel, WordPiece

from dpo.data.tokenizer_rules import is_plain

_LOCAL_STEPS = frozenset(
    {
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
"""Kinds of pre-tokenizers that see nothing of a piece's place in its text."""


def find_separators(tokenizer: Any, texts: Sequence[str]) -> dict[str, int]:
    """Ids of added tokens at which texts may be cut; of those that the first text has."""
    if not texts or not _is_cuttable(tokenizer):
        return {}
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    names = frozenset(token.content for token in added.values())
    if any(token.single_word for token in added.values()):
        return {}
    return {
        token.content: number
        for number, token in added.items()
        if token.content in texts[0] and _may_cut(token) and _is_alone(token.content, names)
    }


def _is_cuttable(tokenizer: Any) -> bool:
    """Whether nothing that a piece of a text goes through looks farther."""
    if not is_plain(tokenizer) or tokenizer.split_special_tokens:
        return False
    backend = tokenizer.backend_tokenizer
    model, before = backend.model, backend.pre_tokenizer
    is_fixed = isinstance(model, (WordLevel, WordPiece)) or (isinstance(model, BPE) and not model.dropout)
    return is_fixed and (before is None or _is_local(json.loads(before.__getstate__())))


def _is_local(step: Any) -> bool:
    if step["type"] == "Sequence":
        return all(map(_is_local, step["pretokenizers"]))
    if step["type"] == "Metaspace":
        return step["prepend_scheme"] in ("always", "never")
    return step["type"] in _LOCAL_STEPS


def _may_cut(token: AddedToken) -> bool:
    """Whether the text alone says where the token stands, and it takes no white space beside it."""
    is_plain = not (token.lstrip or token.rstrip or token.normalized)
    return is_plain and bool(token.content) and token.content == token.content.strip()


@lru_cache(maxsize=256)
def _is_alone(token: str, names: frozenset[str]) -> bool:
    """Whether no added token, itself among them, can stand so that it covers a part of the token and more."""
    starts, ends = _beginnings(token), _beginnings(token[::-1])
    return not any(
        (name != token and token in name) or name.endswith(starts) or name[::-1].endswith(ends)
        for name in names
    )


def _beginnings(token: str) -> tuple[str, ...]:
    """All but the whole."""
    return tuple(token[:length] for length in range(1, len(token)))
