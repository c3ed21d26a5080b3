"""Tries a tokenizer in a process of its own (`dpo.limited`): does it make tokens of texts?

    {"path": of a tokenizer.json or of a directory, ...}
        gives {"tried": number of texts} or {"error": what is wrong}

What is tried are texts of many kinds. What grows with a text that nobody tried shows in its rules: how much
longer they may make a text, and expressions that could be matched without end. It runs without the rest of
the project.
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

MOST_GROWTH = 64
"""Times as long as it was normalisation may make a text; Unicode's own (NFKC) has at most 18."""
MOST_RULES = 200
LONGEST_ADDED = 1000
"""Characters that are put before a text."""
MOST_ADDED_TOKENS = 1000
"""Tokens that are put around a text."""
TEXTS = (
    *(
        "",
        " ",
        "a",
        "Hello, world! It's 2024: 1234567 + 0.5.",
        "  two  spaces\n\n\tand a tab ",
        "x" * 2000,
        " " * 2000,
    ),
    *("Größe naïve café", "你好，世界。", "こんにちは", "안녕하세요", "مرحبا ﷺ", "שלום", "हिन्दी", "Привет"),
    *(
        "😀👩‍👩‍👧‍👦🇩🇪",
        "a\u0300\u0301",
        "\u200b\ufeff\u202e",
        "\x00\x01\x7f",
        "\ud7ff\ue000\U0010ffff",
        "<s></s><unk>[UNK]",
    ),
)


class _WrongError(Exception):
    """What a tokenizer is refused for."""


def main(request: dict[str, Any]) -> None:
    """Answer one request."""
    memory = request["memory"]
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, request["seconds"]),
        (resource.RLIMIT_FSIZE, request["writes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        said = {"tried": _try(request["path"])}
    except MemoryError:
        said = {"error": f"it takes more than {memory >> 20} MiB of memory"}
    except BaseException as error:  # a panic of Rust is no Exception
        said = str(error).strip() or "the library that reads it raised it without a word"
        text = said if isinstance(error, _WrongError) else f"{type(error).__name__}: {said}"
        said = {"error": text[:500]}
    print(json.dumps(said), flush=True)


def _try(path: str) -> int:
    tokenizer = _open(path)
    if getattr(tokenizer.model, "dropout", None):
        raise _WrongError(
            f"its model leaves out merges at random (dropout is {tokenizer.model.dropout:g}), so that a text "
            "has other tokens each time; allowed is null"
        )
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(tokenizer, name)
        if part is not None:
            check_rules(name, json.loads(part.__getstate__()))
    if tokenizer.post_processor is not None:
        check_added_tokens(json.loads(tokenizer.post_processor.__getstate__()))
    for text in TEXTS:
        for special in (True, False):
            _try_text(tokenizer, text, special)
    return len(TEXTS)


def _open(path: str) -> Any:
    """The tokenizer of a file, or the one that transformers makes of a directory's files without their code.

    For a vocabulary that is not there some classes take an empty one, which would make no sense of any text.
    """
    from tokenizers import Tokenizer

    if not os.path.isdir(path):
        return Tokenizer.from_file(path)
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    names = sorted({*type(made).vocab_files_names.values(), "tokenizer.json"})
    if not any(os.path.isfile(os.path.join(path, name)) for name in names):
        raise _WrongError(f"its vocabulary is not there; allowed is one of {', '.join(names)}")
    if not hasattr(made, "backend_tokenizer"):
        raise _WrongError(
            f"{type(made).__name__} is written in Python; allowed are those of the Rust library"
        )
    return made.backend_tokenizer


def _try_text(tokenizer: Any, text: str, special: bool) -> None:
    """A text that it has no tokens for is none that is refused here: such a text may never come."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=special).ids
        tokenizer.decode(ids, skip_special_tokens=special)
    except MemoryError:
        raise
    except Exception:
        return


# ---- rules ----


def check_rules(name: str, rules: Any) -> None:
    """Normaliser, pre-tokeniser or decoder: what their rules could make of any text."""
    flat = list(_flatten(rules))
    if len(flat) > MOST_RULES:
        raise _WrongError(f"its {name} has more than {MOST_RULES} rules; allowed are as many")
    growth, added = 1.0, 0
    for rule in flat:
        kind, pattern = rule.get("type"), rule.get("pattern")
        if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            _check_expression(name, pattern["Regex"])
        if kind == "Replace":
            growth *= _grows(pattern or {}, rule.get("content") or "")
        elif kind == "Prepend":
            added += len(rule.get("prepend") or "")
        elif kind == "Precompiled":
            growth *= _grows_at_most(base64.b64decode(rule["precompiled_charsmap"]))
    if growth > MOST_GROWTH or added > LONGEST_ADDED:
        raise _WrongError(
            f"its {name} may make a text {growth:.3g} times as long and {added} characters longer; allowed "
            f"are {MOST_GROWTH} times and {LONGEST_ADDED} characters"
        )


def check_added_tokens(rule: Any) -> None:
    """A post-processor: how many tokens its templates put around any text."""
    added = 0
    for part in _flatten(rule):
        ids = {name: len(one.get("ids") or ()) for name, one in (part.get("special_tokens") or {}).items()}
        used = [piece.get("SpecialToken") or {} for piece in part.get("single") or ()]
        added += sum(ids.get(token.get("id"), 0) for token in used)
    if added > MOST_ADDED_TOKENS:
        raise _WrongError(
            f"its post_processor adds {added} tokens to a text; allowed are {MOST_ADDED_TOKENS}"
        )


def _flatten(rule: Any) -> Iterator[dict[str, Any]]:
    """A rule, and those that it consists of, in order."""
    if not isinstance(rule, dict):
        return
    yield rule
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in rule.get(name) or ():
            yield from _flatten(inner)


def _grows(pattern: dict[str, Any], content: str) -> float:
    """How much longer a replacement makes what it replaces; an expression may match one character."""
    length = len(pattern["String"]) if "String" in pattern else 1
    return max(1.0, len(content) / length if length else 1 + len(content))


def _grows_at_most(charsmap: bytes) -> int:
    """The longest text that a SentencePiece map has for a character: behind its tree they end with zeros."""
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size > len(charsmap) - 4:
        raise _WrongError("its precompiled_charsmap is cut off")
    longest = max(map(len, charsmap[4 + size :].split(b"\0")))
    return max(1, longest // 4)


def _check_expression(name: str, expression: str) -> None:
    if len(expression) > 10_000 or _repeats_repetitions(expression):
        raise _WrongError(
            f"its {name} has the expression {expression[:80]!r}, which could be matched without end; allowed "
            "are at most 10000 characters, and no repetition of a group that has one"
        )


_PIECES = re.compile(
    r"\\.|\[(?:\\.|\[:\w+:\]|[^\]\\])*\]|\(\?[#:=!<>a-zA-Z-]*|[()]|[*+]|\{\d*,?\d*\}|.", re.DOTALL
)


def _repeats_repetitions(expression: str) -> bool:
    """Whether a group that has an unbounded repetition in it is itself repeated."""
    groups, closed = [False], False
    for piece in _PIECES.findall(expression):
        repeats = piece in ("*", "+") or bool(
            re.fullmatch(r"\{\d*,\}|\{\d{2,}(,\d*)?\}|\{\d*,\d{2,}\}", piece)
        )
        if repeats and closed:
            return True
        closed = False
        if piece.startswith("("):
            groups.append(False)
        elif piece == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif repeats:
            groups[-1] = True
    return False


if __name__ == "__main__":
    main(json.load(sys.stdin))
