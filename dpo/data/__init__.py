"""From a JSONL line to a `Batch`: read preferences, tokenise them once, pack them into rows of few shapes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.data.batch import Batch
    from dpo.data.inspection import inspect_dataset, render_example, render_report
    from dpo.data.loader import Loader, evaluation_loader, training_loader
    from dpo.data.packing import Shape, pack
    from dpo.data.preferences import DataError, Preference, read_preferences
    from dpo.data.tokenization import tokenize
    from dpo.data.tokenized import TokenizedDataset

__all__ = [
    "Batch",
    "DataError",
    "Loader",
    "Preference",
    "Shape",
    "TokenizedDataset",
    "evaluation_loader",
    "inspect_dataset",
    "pack",
    "read_preferences",
    "render_example",
    "render_report",
    "tokenize",
    "training_loader",
]

_MODULES = {
    "batch": ("Batch",),
    "preferences": ("DataError", "Preference", "read_preferences"),
    "tokenization": ("tokenize",),
    "tokenized": ("TokenizedDataset",),
    "packing": ("Shape", "pack"),
    "loader": ("Loader", "evaluation_loader", "training_loader"),
    "inspection": ("inspect_dataset", "render_example", "render_report"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: `transformers` takes seconds, and a `Batch` does not need it."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
