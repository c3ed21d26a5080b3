"""The tokenizer in a GGUF file's metadata, as transformers' fast tokenizer; what is wrong there is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from dpo.huggingface.end_tokens import END_TEXTS, gguf_end_tokens
from dpo.huggingface.pre_tokenizers import PreTokenizerKind, find_pre_tokenizer, make_pre_tokenizer
from dpo.outcomes import UserError, told_by


def make_tokenizer(
    path: Path, fields: Mapping[str, Any], *, architecture: str, max_length: Callable[[], int]
) -> PreTrainedTokenizerBase:
    """The fast tokenizer with its chat template, which makes the tokens that llama.cpp makes.

    `max_length` is asked for when there is a tokenizer that it is of.

    Raises:
      ValueError: when the metadata `fields` of the file at `path` have none, or none that can be built.
    """
    metadata = GgufVocabulary(path, fields)
    build = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _by_lines}
    if metadata.model not in build:
        raise UserError(
            f"{path}: tokenizer.ggml.model is {metadata.model!r}; allowed: {', '.join(sorted(build))}"
        )
    adds_bos = metadata.model in ("llama", "gemma4") or _pre_tokenizer(metadata, architecture).adds_bos
    try:
        backend = build[metadata.model](metadata, architecture)
        _add_tokens(backend, metadata, architecture)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path}: no tokenizer can be built from its metadata: {told_by(error)}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.value("chat_template", str),
        add_bos_token=metadata.value("ggml.add_bos_token", bool, default=adds_bos),
        add_eos_token=metadata.value("ggml.add_eos_token", bool, default=False),
        model_max_length=max_length(),
        **metadata.special_tokens(),
    )


def end_tokens(path: Path, fields: Mapping[str, Any]) -> list[int]:
    """Ids of all tokens that end a response, as llama.cpp has it; raises as `make_tokenizer` does."""
    metadata = GgufVocabulary(path, fields)
    names = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    return gguf_end_tokens(metadata.tokens, {name: metadata.token_id(name) for name in names})


class GgufVocabulary:
    """Values under `tokenizer.`; `ValueError` where one is of another kind than it must be."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path, self._fields = path, fields
        if not (self.has("ggml.model") and self.has("ggml.tokens")):
            raise UserError(f"{path}: its metadata have no tokenizer (tokenizer.ggml.model and .tokens)")
        self.model: str = self.value("ggml.model", str)
        self.tokens: list[str] = self.values("ggml.tokens", str)
        self.kinds: list[int] = self.values("ggml.token_type", int) or [_NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise UserError(
                f"{path}: tokenizer.ggml.token_type has {len(self.kinds)} entries; allowed is one a token, "
                f"{len(self.tokens)}"
            )

    def has(self, key: str) -> bool:
        return f"tokenizer.{key}" in self._fields

    def value(self, key: str, kind: type, *, default: Any = None) -> Any:
        if not self.has(key):
            return default
        value = self._fields[f"tokenizer.{key}"]
        if type(value) is not kind:
            raise UserError(f"{self.path}: tokenizer.{key} is {value!r}; allowed: {kind.__name__}")
        return value

    def values(self, key: str, kind: type) -> list[Any]:
        values = self.value(key, list, default=[])
        for index, value in enumerate(values):
            if type(value) is not kind:
                raise UserError(
                    f"{self.path}: tokenizer.{key}[{index}] is {value!r}; allowed: {kind.__name__}"
                )
        return values

    def token_id(self, name: str) -> int | None:
        """The id under tokenizer.ggml.NAME_token_id; None where the file does not say."""
        key = f"ggml.{name}_token_id"
        found = self.value(key, int)
        if found is not None and not 0 <= found < len(self.tokens):
            raise UserError(
                f"{self.path}: tokenizer.{key} is {found}; allowed is 0 to {len(self.tokens) - 1}"
            )
        return found

    def special_tokens(self) -> dict[str, str]:
        """bos_token and so on, as far as the metadata number them."""
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{name}_token": self.token_id(key) for name, key in names.items()}
        return {name: self.tokens[token] for name, token in ids.items() if token is not None}


def _byte_level(metadata: GgufVocabulary, architecture: str) -> Tokenizer:
    """GPT-2's kind: merges of bytes that are spelled as characters, within words."""
    kind = _pre_tokenizer(metadata, architecture)
    vocabulary = _numbered(metadata.tokens, metadata.path)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=_pairs(metadata), ignore_merges=kind.ignores_merges))
    tokenizer.pre_tokenizer = make_pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(metadata: GgufVocabulary, architecture: str) -> PreTokenizerKind:
    """The cut that the file names; GPT-2 and Falcon have but one, and early files of them name none."""
    only = {"gpt2": "gpt-2", "falcon": "falcon"}.get(architecture)
    name = metadata.value("ggml.pre", str, default=only)
    if name is None:
        raise UserError(
            f"{metadata.path} has no tokenizer.ggml.pre, so how its text is cut is not known; "
            "convert the model again with a newer llama.cpp, or give it as a directory with tokenizer.json"
        )
    try:
        return find_pre_tokenizer(name)
    except ValueError as error:
        raise UserError(f"{metadata.path}: tokenizer.ggml.pre {error}") from None


def _pairs(metadata: GgufVocabulary) -> list[tuple[str, str]]:
    """The two tokens of each merge; the first may begin with a space."""
    pairs = []
    for index, merge in enumerate(metadata.values("ggml.merges", str)):
        middle = merge.find(" ", 1)
        if middle < 0:
            raise UserError(
                f"{metadata.path}: tokenizer.ggml.merges[{index}] is {merge!r}; allowed: two tokens with a "
                "space between them"
            )
        pairs.append((merge[:middle], merge[middle + 1 :]))
    return pairs


def _sentencepiece(metadata: GgufVocabulary, architecture: str) -> Tokenizer:
    """SentencePiece's kind: merges over the whole text, spaces as ▁, what is unknown as its bytes.

    Whether a text, and what follows a special token, begins with a ▁ is the file's `add_space_prefix`.
    """
    is_gemma = architecture.startswith("gemma")
    tokens = [_gemma_spelling(token) if is_gemma else token for token in metadata.tokens]
    prefix = metadata.value("ggml.add_space_prefix", bool, default=not is_gemma)
    vocabulary = _numbered(tokens, metadata.path)
    if metadata.has("ggml.merges"):
        merges = _pairs(metadata)
    else:
        merges = generate_merges(vocabulary, _priorities(metadata, tokens, is_gemma=is_gemma))
    return _of_characters(vocabulary, merges, prefix=prefix)


def _by_lines(metadata: GgufVocabulary, architecture: str) -> Tokenizer:
    """Gemma 4's kind: SentencePiece's with merges of its own, none across the border of line ends."""
    tokenizer = _of_characters(_numbered(metadata.tokens, metadata.path), _pairs(metadata), prefix=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    return tokenizer


def _of_characters(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], *, prefix: bool
) -> Tokenizer:
    """Merges of characters, spaces as ▁, what is unknown as its bytes."""
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[*merges], fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer


def _priorities(metadata: GgufVocabulary, tokens: Sequence[str], *, is_gemma: bool) -> dict[str, float]:
    """Which merges come first: the better scored tokens; Gemma's scores are no order, its numbers are."""
    if is_gemma:
        return {token: -float(index) for index, token in enumerate(tokens)}
    scores = metadata.values("ggml.scores", float)
    if len(scores) != len(tokens):
        raise UserError(
            f"{metadata.path}: tokenizer.ggml.scores has {len(scores)} entries; allowed is one a token, "
            f"{len(tokens)}"
        )
    return dict(zip(tokens, scores, strict=True))


def _gemma_spelling(token: str) -> str:
    """Gemma's tokens of two and more spaces stand in files as spaces."""
    return "▁" * len(token) if re.fullmatch(" +", token) else token


def _numbered(tokens: Sequence[str], path: Path) -> dict[str, int]:
    numbered = {token: index for index, token in enumerate(tokens)}
    if len(numbered) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if numbered[token] != index)
        raise UserError(f"{path}: tokenizer.ggml.tokens has {twice!r} twice; allowed is once")
    return numbered


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""llama.cpp's kinds of tokens, as far as they matter here."""


def _add_tokens(tokenizer: Tokenizer, metadata: GgufVocabulary, architecture: str) -> None:
    """Tokens that are found in a text whole, before it is cut.

    What ends a response is one of them, whatever its kind. Those of Phi-3 take the white space behind them
    with them; its files do not say so.
    """
    is_phi3 = architecture == "phi3" and metadata.model == "llama"
    added = [
        AddedToken(
            token,
            normalized=False,
            special=kind != _USER_DEFINED,
            rstrip=is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(metadata.tokens, metadata.kinds, strict=True)
        if (kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in END_TEXTS)
        and tokenizer.token_to_id(token) is not None
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
