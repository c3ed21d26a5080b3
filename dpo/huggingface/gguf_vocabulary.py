"""A fast tokenizer as a GGUF file's metadata: tokens, merges or scores, the name of its cut, its ends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dpo.huggingface.end_tokens import gguf_end_tokens
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.pre_tokenizers import PRE_TOKENIZERS, make_pre_tokenizer
from dpo.outcomes import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""llama.cpp's kinds of tokens."""

PROBES = (
    "It's we'LL they'Ve I'd 'S 's",
    "1 12 123 1234 12345678 3.14 ²³ ٣٤٥٦",
    "camelCase HTTPServer iPhone ÀÉa Straße ÇA",
    "a  b   c\t\td \n\n e\r\n  f\n   ",
    "foo(bar)!? //path/to\n a.b,c; --x== `q` $5+3 <a|b> ~^",
    "漢字かな交じり文 한국어 ไทย हिन्दी नमस्ते Привет мир",
    "e\u0301 n\u0303o \u200d 👩\u200d👩 ½ Ⅷ ʰ ǅ",
    "I've 2x4's, O'NEILL'S\n\n\n  - item1\n/x/\n",
    "(..., ...) !!!\n ???/// a/b\n %%\n",
    "，。、你好！ ۔، ،x",
)
"""Texts that any two cuts with different names for different things cut differently."""


def vocabulary_fields(
    tokenizer: PreTrainedTokenizerBase,
    architecture: str,
    generation_config: Mapping[str, Any],
    *,
    vocab_size: int,
) -> JsonObject:
    """Everything under `tokenizer.`.

    Raises:
      ValueError: for a tokenizer that is not one of bytes or of SentencePiece's kind, one whose cut has no
        name in llama.cpp, and ends of a response that a file cannot number.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if backend is None or model["type"] != "BPE":
        kind = model.get("type", type(tokenizer).__name__)
        raise UserError(f"a GGUF file takes tokenizers of kind BPE; this one is {kind}")
    tokens = _tokens(backend, vocab_size)
    is_sentencepiece = bool(model.get("byte_fallback"))
    kinds = _kinds(backend, tokens, is_sentencepiece=is_sentencepiece)
    by_lines = is_sentencepiece and architecture == "gemma4"
    if (
        is_sentencepiece and not by_lines and architecture.startswith("gemma")
    ):  # found in a text before spaces become ▁
        tokens = [
            " " * len(token) if kind == _USER_DEFINED and re.fullmatch("▁+", token) else token
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if by_lines:
        kind_fields = {"ggml.model": "gemma4", "ggml.merges": _joined(merges), "ggml.add_space_prefix": False}
    elif is_sentencepiece:
        kind_fields = _sentencepiece(backend, tokens, merges)
    else:
        kind_fields = _byte_level(backend, merges)
    found = {
        **kind_fields,
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        **_special_ids(tokenizer, tokens, generation_config),
        **_additions(tokenizer),
    }
    if isinstance(tokenizer.chat_template, str):
        found["chat_template"] = tokenizer.chat_template
    return {f"tokenizer.{key}": value for key, value in found.items()}


def find_cut(backend: Tokenizer, ignores_merges: bool) -> str:
    """The name of the cut that a tokenizer makes, found by what it does to texts that tell cuts apart.

    Raises:
      ValueError: when no known cut does the same.
    """
    found = [_pieces(backend.pre_tokenizer, text) for text in PROBES]
    for name, kind in PRE_TOKENIZERS.items():
        if kind.ignores_merges != ignores_merges:
            continue
        cut = make_pre_tokenizer(kind)
        if all(_pieces(cut, text) == pieces for text, pieces in zip(PROBES, found, strict=True)):
            return name
    raise UserError(
        "the tokenizer cuts text as no pre-tokenizer that llama.cpp has does, so its tokens would be others"
    )


def _pieces(cut: Any, text: str) -> list[str]:
    return [] if cut is None else [piece for piece, _ in cut.pre_tokenize_str(text)]


def _tokens(backend: Tokenizer, vocab_size: int) -> list[str]:
    """Every token by its number; numbers that only the model has are filled."""
    numbered = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    if max(numbered, default=0) >= vocab_size:
        raise UserError(
            f"the tokenizer has token {max(numbered)}; the model knows {vocab_size} from 0: it was "
            "not resized for it"
        )
    return [numbered.get(number, f"[PAD{number}]") for number in range(vocab_size)]


def _kinds(backend: Tokenizer, tokens: Sequence[str], *, is_sentencepiece: bool) -> list[int]:
    there = backend.get_vocab(with_added_tokens=True)
    unknown = getattr(backend.model, "unk_token", None)
    added = backend.get_added_tokens_decoder()

    def kind(number: int, token: str) -> int:
        if token not in there:
            return _UNUSED
        if is_sentencepiece and token == unknown:
            return _UNKNOWN
        if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return _BYTE
        if number in added:
            return _CONTROL if added[number].special else _USER_DEFINED
        return _NORMAL

    return [kind(number, token) for number, token in enumerate(tokens)]


def _byte_level(backend: Tokenizer, merges: Sequence[Sequence[str]]) -> JsonObject:
    if not merges:
        raise UserError(
            "the tokenizer has no merges; llama.cpp opens a vocabulary of bytes with merges alone"
        )
    return {
        "ggml.model": "gpt2",
        "ggml.pre": find_cut(backend, bool(getattr(backend.model, "ignore_merges", False))),
        "ggml.merges": _joined(merges),
    }


def _joined(merges: Sequence[Sequence[str]]) -> list[str]:
    return [f"{first} {second}" for first, second in merges]


def _sentencepiece(backend: Tokenizer, tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> JsonObject:
    """Better scored is what is merged earlier."""
    rank: dict[str, int] = {}
    for index, (first, second) in enumerate(merges):
        rank.setdefault(first + second, index)
    spec = json.loads(backend.to_str())
    metaspace = spec["pre_tokenizer"] or {}
    has_prefix = '"Prepend"' in json.dumps(spec["normalizer"]) or (
        metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme") != "never"
    )
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [-float(rank.get(token.replace(" ", "▁"), len(merges))) for token in tokens],
        "ggml.add_space_prefix": has_prefix,
    }


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], generation_config: Mapping[str, Any]
) -> dict[str, int]:
    """Numbers of the special tokens; an end of turn and of a message beside the one EOS."""
    given = generation_config.get("eos_token_id")
    ends = [*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else next(iter(ends), None)
    numbered: dict[str, int | None] = {"eos": eos}
    missing = [end for end in ends if end not in gguf_end_tokens(tokens, numbered)]
    for name in ("eot", "eom"):
        numbered[name] = missing.pop(0) if missing else None
    if missing:
        texts = ", ".join(repr(tokens[end]) for end in missing)
        raise UserError(f"a GGUF file numbers three ends of a response, and the model has more: {texts}")
    names = {
        "bos": tokenizer.bos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    found = {**numbered, **names}
    return {f"ggml.{name}_token_id": number for name, number in found.items() if isinstance(number, int)}


def _additions(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether a text begins with BOS and ends with EOS."""
    ids = tokenizer("a")["input_ids"]
    return {
        "ggml.add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "ggml.add_eos_token": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }
