"""A tokenizer's rules are a stranger's: what it raises has to be said, so that it is called in one place."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "dpo"
ALLOWED = {"data/tokenizer_calls.py", "huggingface/tokenizer_worker.py", "huggingface/gguf_vocabulary.py"}
"""The last one asks what surrounds the letter a; the worker is a process of its own."""
METHODS = {"decode", "batch_decode", "encode", "encode_batch", "apply_chat_template"}


def _is_tokenizer(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name == "tokenizer"


def _uses(tree: ast.Module) -> bool:
    """Whether a tokenizer is called on something, or a method that would be is taken off it."""
    nodes = list(ast.walk(tree))
    called = any(isinstance(one, ast.Call) and one.args and _is_tokenizer(one.func) for one in nodes)
    taken = any(
        isinstance(one, ast.Attribute) and one.attr in METHODS and _is_tokenizer(one.value) for one in nodes
    )
    return called or taken


def test_one_module_calls_tokenizers_on_texts() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if _uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED
