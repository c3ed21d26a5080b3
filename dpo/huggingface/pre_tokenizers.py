"""How a byte-level vocabulary's text is cut into words before merges, by its name in GGUF files.

A GGUF file does not hold the cut, only its name (`tokenizer.ggml.pre`); merges that were learned under one
cut make other tokens under another. A cut is a chain: each expression's matches become pieces of their own
within the pieces that the one before left, and so does what lies between matches.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from dpo.outcomes import UserError


class PreTokenizerKind(NamedTuple):
    """One way to cut text."""

    splits: tuple[str, ...]
    """Regular expressions, applied one after the other."""
    ignores_merges: bool = False
    """A word that is in the vocabulary is its token, whatever the merges would make of it."""
    adds_bos: bool = False
    """A text begins with BOS where the file does not say."""


def find_pre_tokenizer(name: str) -> PreTokenizerKind:
    """The kind of this name; `ValueError` lists those there are."""
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"is {name!r}, which is not known; allowed: {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Give the model as a directory with its tokenizer.json instead"
        )
    return PRE_TOKENIZERS[name]


def make_pre_tokenizer(kind: PreTokenizerKind) -> PreTokenizer:
    """The cut, and then bytes as the characters that the vocabulary spells them with."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in kind.splits]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


_ENDINGS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_DIGIT = r"\p{N}"


def _with_line_ends(digits: str, letters: str = r"\p{L}", *, breaks: str = r"[\r\n]*") -> str:
    """Words with the character before them, so many digits, punctuation with the line ends behind it."""
    other = letters.strip("[]")
    return (
        rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s{other}\p{{N}}]+{breaks}|\s*[\r\n]+|{_SPACES}"
    )


def _by_case(digits: str, endings: str) -> str:
    """Words cut where small letters are followed by capitals."""
    before, big, small = (
        r"[^\r\n\p{L}\p{N}]?",
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    )
    return (
        rf"{before}{big}*{small}+{endings}|{before}{big}+{small}*{endings}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


_PLAIN = PreTokenizerKind((_GPT2,))
_SINGLE_DIGITS = PreTokenizerKind((_DIGIT, _GPT2))
_LLAMA3 = PreTokenizerKind((_with_line_ends(r"\p{N}{1,3}"),), ignores_merges=True, adds_bos=True)
_THREE_DIGITS = PreTokenizerKind((_with_line_ends(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizerKind((_with_line_ends(_DIGIT),))
_GPT4O = PreTokenizerKind((_by_case(r"\p{N}{1,3}", rf"(?i:{_ENDINGS})?"),))
_FINNISH = r" ?[^(\s|.,!?…。，、।۔،)]+"

_KINDS: dict[PreTokenizerKind, tuple[str, ...]] = {
    _PLAIN: (
        *("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion"),
        *("granite-docling", "exaone4"),
    ),
    _SINGLE_DIGITS: (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
    PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): ("falcon",),
    _LLAMA3: ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    _THREE_DIGITS: ("dbrx", "smaug-bpe", "chatglm-bpe"),
    _THREE_DIGITS._replace(ignores_merges=True): ("glm4", "glm5"),
    _QWEN2: (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
        "grok-2",
    ),
    PreTokenizerKind((_with_line_ends(_DIGIT, r"[\p{L}\p{M}]"),)): ("qwen35",),
    PreTokenizerKind((_by_case(_DIGIT, ""),), ignores_merges=True, adds_bos=True): ("tekken",),
    _GPT4O: ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizerKind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", _DIGIT)): (
        "deepseek-coder",
    ),
    PreTokenizerKind((_FINNISH,)): ("poro-chat", "bloom", "gpt3-finnish"),
    PreTokenizerKind((_FINNISH, _DIGIT)): ("viking",),
    PreTokenizerKind((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): ("superbpe",),
}
PRE_TOKENIZERS = {name: kind for kind, names in _KINDS.items() for name in names}
"""Values of `tokenizer.ggml.pre`, as llama.cpp reads them."""
