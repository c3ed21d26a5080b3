"""All that decides which tokens a text becomes, as JSON has it, and a tokenizer of such rules elsewhere."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def rules_of(tokenizer: Any) -> list[Any] | None:
    """The rules of a tokenizer; None where they cannot be written down (a slow one)."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    return [
        type(tokenizer).__qualname__,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        sorted(tokenizer.all_special_ids),
        tokenizer.split_special_tokens,
    ]


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text goes to the Rust library as it is, and its ids are what comes back."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


def make_tokenizer(rules: list[Any]) -> PreTrainedTokenizerFast | None:
    """A tokenizer of these rules, for what is done to texts here; None where they make another one."""
    _, backend, template, special, _, split = rules
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend),
        chat_template=template,
        split_special_tokens=split,
        **special,
    )
    again = rules_of(made)
    return made if again is not None and again[1:] == rules[1:] else None
