"""The tokenizer in a GGUF file's metadata, as transformers' fast tokenizer; what is wrong there is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def make_tokenizer(
    path: Path, fields: Mapping[str, Any], *, architecture: str, max_length: Callable[[], int]
) -> PreTrainedTokenizerBase:
    """The fast tokenizer with its chat template. (`AutoTokenizer` with a GGUF file needs torch.)

    `max_length` is asked for when there is a tokenizer that it is of.

    Raises:
      ValueError: when the metadata `fields` of the file at `path` have none, or none that can be built.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_TYPES,
        convert_gguf_tokenizer,
    )

    metadata = _Metadata(path, fields)
    given = _describe(metadata)
    if given["tokenizer_type"] not in GGUF_TOKENIZER_TYPES:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {given['tokenizer_type']!r}; allowed: "
            + ", ".join(sorted(GGUF_TOKENIZER_TYPES))
        )
    try:
        backend, _ = convert_gguf_tokenizer(architecture, given)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(
            f"{path}: no tokenizer can be built from its metadata: {type(error).__name__}: {error}"
        ) from error
    adds_bos = given["tokenizer_type"] == "llama"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.value("chat_template", str),
        add_bos_token=metadata.value("ggml.add_bos_token", bool, default=adds_bos),
        add_eos_token=metadata.value("ggml.add_eos_token", bool, default=False),
        model_max_length=max_length(),
        **_special_tokens(metadata, given["tokens"]),
    )


class _Metadata:
    """Values under `tokenizer.`; `ValueError` where one is of another kind than it must be."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path, self._fields = path, fields

    def has(self, key: str) -> bool:
        return f"tokenizer.{key}" in self._fields

    def value(self, key: str, kind: type, *, default: Any = None) -> Any:
        if not self.has(key):
            return default
        value = self._fields[f"tokenizer.{key}"]
        if type(value) is not kind:
            raise ValueError(f"{self.path}: tokenizer.{key} is {value!r}; allowed: {kind.__name__}")
        return value

    def values(self, key: str, kind: type) -> list[Any]:
        values = self.value(key, list)
        for index, value in enumerate(values):
            if type(value) is not kind:
                raise ValueError(
                    f"{self.path}: tokenizer.{key}[{index}] is {value!r}; allowed: {kind.__name__}"
                )
        return values


def _describe(metadata: _Metadata) -> dict[str, Any]:
    """What the tokenizer is built from, under transformers' names."""
    if not (metadata.has("ggml.model") and metadata.has("ggml.tokens")):
        raise ValueError(
            f"{metadata.path}: its metadata have no tokenizer (tokenizer.ggml.model and .tokens)"
        )
    given: dict[str, Any] = {
        "tokenizer_type": metadata.value("ggml.model", str),
        "tokens": metadata.values("ggml.tokens", str),
    }
    if metadata.has("ggml.pre"):
        given["pre_tokenizer_type"] = metadata.value("ggml.pre", str)
    for name, kind in (("scores", float), ("token_type", int), ("merges", str)):
        if metadata.has(f"ggml.{name}"):
            given[name] = metadata.values(f"ggml.{name}", kind)
    return given


def _special_tokens(metadata: _Metadata, tokens: list[str]) -> dict[str, str]:
    """bos_token and so on, as far as the metadata number them."""
    found: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        key = f"ggml.{key}_token_id"
        if not metadata.has(key):
            continue
        token_id = metadata.value(key, int)
        if not 0 <= token_id < len(tokens):
            raise ValueError(
                f"{metadata.path}: tokenizer.{key} is {token_id}; allowed is 0 to {len(tokens) - 1}"
            )
        found[f"{name}_token"] = tokens[token_id]
    return found
