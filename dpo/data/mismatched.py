"""Another prompt's response beside each prompt's own: what measures KTO's baseline."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Int

from dpo.data.tokenized import TokenizedDataset
from dpo.losses.scores import MISMATCHED
from dpo.outcomes import UserError


def add_mismatched(dataset: TokenizedDataset, *, seed: int) -> TokenizedDataset:
    """Give every row one more response, of rank `MISMATCHED`: one that answers another prompt.

    It is drawn from the responses to all other prompts, each as likely as the next, whatever its rank, and
    cut where it is longer than the longest prompt plus response that the data has anyway, so that rows do not
    grow. The pairing is a function of data and seed: its reference log-probs are stored like any other.

    Raises:
      ValueError: when all rows have the same prompt.
    """
    drawn = _draw_of_other_prompts(dataset, np.random.default_rng([seed % 2**64, len(dataset)]))
    longest = int((dataset.prompt_lengths + dataset.response_lengths.max(1)).max())
    room = longest - dataset.prompt_lengths
    starts, ends = dataset.response_offsets[:-1], dataset.response_offsets[1:]
    tokens: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for row, other in enumerate(drawn.tolist()):
        cut = slice(starts[other], min(ends[other], starts[other] + room[row]))
        tokens += [*dataset.responses(row), dataset.response_tokens[cut]]
        if dataset.scored is not None:
            scored += [*dataset.scored_of(row), dataset.scored[cut]]
    places = dataset.row_offsets[1:]  # behind each row's own
    return dataclasses.replace(
        dataset,
        response_tokens=np.concatenate(tokens),
        response_offsets=np.cumsum([0, *map(len, tokens)]),
        row_offsets=dataset.row_offsets + np.arange(len(dataset) + 1),
        ranks=np.insert(dataset.ranks, places, MISMATCHED),
        scores=np.insert(dataset.scores, places, np.nan),
        scored=None if dataset.scored is None else np.concatenate(scored),
        fingerprint=hashlib.sha256(f"mismatched {seed} {dataset.fingerprint}".encode()).hexdigest(),
    )


def _draw_of_other_prompts(dataset: TokenizedDataset, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """For every row the number of a response, uniform over those whose rows have another prompt.

    Responses are lined up prompt by prompt, so that those of one prompt, on however many rows, are one
    stretch: a draw among the others is a number that jumps over it.
    """
    numbers: dict[bytes, int] = {}
    prompts = [dataset.prompt(row).tobytes() for row in range(len(dataset))]
    prompt_of_row = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    prompt_of_response = np.repeat(prompt_of_row, dataset.num_responses)
    lined_up = np.argsort(prompt_of_response, kind="stable")
    counts = np.bincount(prompt_of_response)
    first, own = (np.cumsum(counts) - counts)[prompt_of_row], counts[prompt_of_row]
    others = len(prompt_of_response) - own
    if len(numbers) < 2:
        raise UserError(
            f"the objective needs other prompts' responses, but all {len(dataset)} rows have the same prompt"
        )
    draw = rng.integers(0, others)
    return lined_up[np.where(draw < first, draw, draw + own)]
