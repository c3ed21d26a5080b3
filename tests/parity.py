"""How far this project's numbers are from transformers', for one tiny checkpoint; needs torch."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tiny_models import batch_arrays, load_case, tokens_of
from torch_models import torch_greedy, torch_log_probs, torch_logits, torch_model

from dpo.huggingface.saving import save_pretrained
from dpo.models.decoder import Decoder
from dpo.models.drawing import SamplingConfig
from dpo.models.log_probs import token_log_probs
from dpo.models.sampling import generate

NEW_TOKENS = 32
PROMPT = 9
"""Tokens of the prompt that is continued greedily."""
SEEDS = (0, 1, 2)


class Parity(NamedTuple):
    """Largest absolute differences, and agreement of greedy tokens."""

    logits: float
    log_probs: float
    """Of two responses that share their prompt in one row, against the two separate sequences."""
    export: float
    """Logits of our export as torch opens it, against our own."""
    agreed: int
    compared: int
    """Greedy tokens; fewer than asked where rope scaling by length would change keys that are cached."""


def measure(case: str, seed: int) -> Parity:
    """One checkpoint of a case, its weights and its tokens drawn with `seed`."""
    tokens = tokens_of(seed)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "in"
        ours = load_case(directory, case, seed=seed)
        theirs = torch_model(directory)
        logits = np.asarray(ours.logits(ours.hidden(*batch_arrays(tokens))))
        config = json.loads((directory / "config.json").read_text())
        out = save_pretrained(ours, Path(scratch) / "out", hf_config=config, tokenizer=None)
        reopened = torch_logits(torch_model(out), tokens)
        difference = np.abs(logits - torch_logits(theirs, tokens)).max()
        agreed, compared = _greedy(ours, theirs, tokens)
        return Parity(
            float(difference),
            _shared(ours, theirs, tokens),
            np.abs(logits - reopened).max(),
            agreed,
            compared,
        )


def _shared(ours: Decoder, theirs: object, tokens: np.ndarray) -> float:
    """A row of prompt, response and response, against two rows of prompt and response."""
    prompt, responses = tokens[0, :12], (tokens[0, 12:], tokens[1, 12:])
    row = np.concatenate([prompt, *responses])[None]
    lengths = [len(prompt), *map(len, responses)]
    positions = np.concatenate([np.arange(12), *(12 + np.arange(n) for n in lengths[1:])])[None]
    branch = np.repeat([0, 1, 2], lengths)[None]
    hidden = ours.hidden(*map(jnp.asarray, (row, positions, np.ones_like(branch), branch)))[0]
    worst = 0.0
    for number, response in enumerate(responses):
        start = 12 + sum(lengths[1 : 1 + number])
        source = np.concatenate([[11], np.arange(start, start + len(response) - 1)])
        found = token_log_probs(
            hidden[source],
            ours.output_embedding,
            jnp.asarray(response),
            chunk=8,
            softcap=ours.config.logit_softcap,
        )
        expected = torch_log_probs(theirs, np.concatenate([prompt, response])[None])[0, 11:]
        worst = max(worst, float(np.abs(np.asarray(found) - expected).max()))
    return worst


def _greedy(ours: Decoder, theirs: object, tokens: np.ndarray) -> tuple[int, int]:
    limits = [rope.original_length - PROMPT for rope in ours.config.ropes if rope.original_length]
    compared = min([NEW_TOKENS, *limits])
    prompt = tokens[0, :PROMPT].tolist()
    sampling = SamplingConfig(max_new_tokens=compared, temperature=0.0)
    found = generate(ours, [prompt], sampling=sampling, seeds=[0], stop_tokens=[])[0]
    expected = torch_greedy(theirs, prompt, compared)
    pairs = enumerate(zip(found, expected, strict=True))
    return next((i for i, (a, b) in pairs if a != b), compared), compared
