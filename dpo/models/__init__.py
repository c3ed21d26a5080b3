"""A Hugging Face causal language model in Flax NNX: load, run, sample, save."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.models.classifier import SequenceClassifier, classify
    from dpo.models.decoder import Decoder
    from dpo.models.decoder_config import DecoderConfig
    from dpo.models.pretrained import (
        Pretrained,
        load_classifier,
        load_pretrained,
        load_tokenizer,
        save_pretrained,
    )
    from dpo.models.sampling import SamplingConfig, generate

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Pretrained",
    "SamplingConfig",
    "SequenceClassifier",
    "classify",
    "generate",
    "load_classifier",
    "load_pretrained",
    "load_tokenizer",
    "save_pretrained",
]

_MODULES = {
    "Decoder": "decoder",
    "DecoderConfig": "decoder_config",
    "SamplingConfig": "sampling",
    "SequenceClassifier": "classifier",
    "classify": "classifier",
    "generate": "sampling",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `transformers` takes seconds, and the mathematics does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'pretrained')}"), name)
