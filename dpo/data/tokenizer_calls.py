"""Texts to ids and back: the only place that calls a tokenizer, by rules of a stranger, on rows and answers.

Whatever they raise for a text, a panic of Rust among it, is said with the tokenizer's place. Many texts go in
several calls, so that what the library keeps beside the ids does not fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo.data.separators import find_separators
from dpo.outcomes import raising_user_errors

CHARACTERS = 1 << 23
"""Of texts in one call."""
_ALONE: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without what the tokenizer would put around it.

    Raises:
      UserError: for a text that the tokenizer fails at.
    """
    separators = find_separators(tokenizer, texts)
    if not separators:
        return [ids for group in _groups(texts) for ids in _call(tokenizer, group, **_ALONE)["input_ids"]]
    cuts = re.compile(f"({'|'.join(map(re.escape, separators))})")
    pieces = [cuts.split(text) for text in texts]
    found: dict[str, list[int]] = {"": []} | {name: [number] for name, number in separators.items()}
    different = [piece for piece in dict.fromkeys(chain.from_iterable(pieces)) if piece not in found]
    for group in _groups(different):
        found |= zip(group, _encode_fast(tokenizer, group), strict=True)
    return [list(chain.from_iterable(map(found.__getitem__, mine))) for mine in pieces]


def token_places(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Of each text, the characters of each of its tokens; for a tokenizer of the Rust library.

    Raises:
      UserError: for a text that the tokenizer fails at.
    """
    how = _ALONE | {"return_offsets_mapping": True}
    return [places for group in _groups(texts) for places in _call(tokenizer, group, **how)["offset_mapping"]]


def encode_with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of one text with what the tokenizer puts around it."""
    return _call(tokenizer, [text], add_special_tokens=True)["input_ids"][0]


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Any, **how: Any) -> str:
    """The text of some ids; `how` is transformers' `skip_special_tokens` and `clean_up_tokenization_spaces`.

    Raises:
      UserError: for ids that the tokenizer fails at.
    """
    with raising_user_errors(f"{_name(tokenizer)}: its tokenizer makes no text of {len(ids)} tokens"):
        return str(tokenizer.decode(ids, **how))


def _encode_fast(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """The same as `_call` for a tokenizer of the Rust library, which need not say where each token stands."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    with _naming(tokenizer):
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str], **how: Any) -> Any:
    with _naming(tokenizer):
        return tokenizer(texts, **how)


def _naming(tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[None]:
    return raising_user_errors(f"{_name(tokenizer)}: its tokenizer makes no tokens of a text")


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > CHARACTERS:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group
