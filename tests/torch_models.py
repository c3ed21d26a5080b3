"""transformers' torch models, as oracles; importing this needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def torch_model(directory: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """transformers' model of a checkpoint, which must fill it exactly.

    Eager attention, which has every family's details; but Falcon's (transformers 5.23) counts ALiBi twice, in
    the mask and in the scores, so it is held to the default, SDPA.
    """
    falcon = json.loads((directory / "config.json").read_text())["model_type"] == "falcon"
    model, report = kind.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="sdpa" if falcon else "eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model.eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def torch_log_probs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Of every token but the first, given those before it."""
    log_probs = torch.log_softmax(torch.tensor(torch_logits(model, tokens)), dim=-1).numpy()
    return np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


def torch_greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def torch_scores(directory: Path, sequences: list[list[int]]) -> np.ndarray:
    """Logits of transformers' sequence classifier, one sequence at a time."""
    model = torch_model(directory, AutoModelForSequenceClassification)
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([tokens])).logits.numpy() for tokens in sequences])
