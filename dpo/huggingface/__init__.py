"""Files to our parameters and back: directories, hub ids, GGUF, adapters, families and their weight names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.huggingface.pretrained import (
        Pretrained,
        load_classifier,
        load_pretrained,
        load_tokenizer,
        save_pretrained,
    )

__all__ = ["Pretrained", "load_classifier", "load_pretrained", "load_tokenizer", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Import on first use: `transformers` takes seconds, and reading a header does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.pretrained"), name)
