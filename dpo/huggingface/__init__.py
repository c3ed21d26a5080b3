"""Files to our parameters and back: directories, hub ids, GGUF, adapters, families and their weight names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.huggingface.pretrained import Pretrained, load_classifier, load_pretrained
    from dpo.huggingface.saving import save_pretrained
    from dpo.huggingface.tokenizer_files import load_tokenizer

__all__ = ["Pretrained", "load_classifier", "load_pretrained", "load_tokenizer", "save_pretrained"]

_ELSEWHERE = {"load_tokenizer": "tokenizer_files", "save_pretrained": "saving"}
"""Modules of the names that are not of `pretrained`."""


def __getattr__(name: str) -> Any:
    """Import on first use: `transformers` takes seconds, and reading a header does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _ELSEWHERE.get(name, "pretrained")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
