"""Token by token: where the policy left its reference, for the pairs that it orders best and worst.

Sums over a response say that it became more or less probable; which words did it is in the log-ratio of every
token. A run keeps it for a few pairs, chosen by their δ, in a JSON file that the report colours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dpo.config import Config, DataConfig
from dpo.data.preferences import Preference
from dpo.data.tokenized import TokenizedDataset
from dpo.data.tokenizer_calls import decode_ids
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.rows import Rows, make_pairs
from dpo.files import replace_text
from dpo.parallel.sharding import own_mesh
from dpo.runs import MADE_FROM
from dpo.training.adapted import load_reference
from dpo.training.datasets import scoring_loader
from dpo.training.placement import place_batch
from dpo.training.policy import Policy, load_policy
from dpo.training.reading import tokenize_preferences
from dpo.training.step import make_token_step

NUM_PAIRS = 5
"""Pairs at each end."""
_PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer decodes a character of which only some bytes are there."""


class OrderedPair(NamedTuple):
    """A pair of responses of one row, and how far apart the policy puts them."""

    row: int
    better: int
    worse: int
    delta: float


class Extremes(NamedTuple):
    """The pairs with the lowest and with the highest δ, the most extreme first; a row is there only once."""

    worst: list[OrderedPair]
    best: list[OrderedPair]


def extreme_pairs(rows: Rows, *, beta: float, count: int = NUM_PAIRS) -> Extremes:
    """Up to `count` pairs at each end, and no row at both; of an odd number the worst get the middle one."""
    pairs = make_pairs(rows)
    delta = beta * pairs.gap(rows.log_ratio)
    order = np.argsort(delta, kind="stable")
    found = [
        OrderedPair(int(pairs.row[i]), int(pairs.better[i]), int(pairs.worse[i]), float(delta[i]))
        for i in order
    ]
    num_rows = len({pair.row for pair in found})
    worst = _one_a_row(found, set())[: min(count, (num_rows + 1) // 2)]
    return Extremes(worst, _one_a_row(found[::-1], {pair.row for pair in worst})[:count])


class ScoredSide(TypedDict):
    """A response, token by token."""

    tokens: list[str]
    """The text that each adds."""
    policy: list[float | None]
    reference: list[float | None]
    """Log-probs; None of a token that is read and not scored."""


class ScoredSides(TypedDict):
    """Both responses of a pair."""

    better: ScoredSide
    worse: ScoredSide


class ScoredPair(TypedDict):
    """An `OrderedPair` with its log-probs."""

    location: str
    """Where the row stands in the data."""
    row: int
    better: int
    worse: int
    """Places of the responses in their row."""
    delta: float
    sides: ScoredSides


class TokenRatios(TypedDict):
    """What evaluation.tokens.json holds."""

    policy: str
    reference: str
    """Sources of the models."""
    pairs: list[ScoredPair]


def score_extremes(config: Config, heldout: Heldout, *, beta: float) -> TokenRatios:
    """Per-token log-probs of the extreme pairs under policy (`model.source`) and reference.

    One model is in memory at a time.
    """
    assert config.model.reference is not None
    extremes = extreme_pairs(heldout.rows, beta=beta)
    wanted = [*extremes.worst, *extremes.best]
    result: TokenRatios = {"policy": config.model.source, "reference": config.model.reference, "pairs": []}
    if not wanted:  # labelled responses are no pairs
        return result
    rows = list(dict.fromkeys(pair.row for pair in wanted))
    preferences = [heldout.preferences[row] for row in rows]
    mesh = own_mesh(config.mesh)
    policy, tokens, tokenizer = _score(config, load_policy(config.model, mesh), preferences, mesh)
    reference, _, _ = _score(config, load_reference(config, mesh), preferences, mesh)

    def side(row: int, place: int) -> ScoredSide:
        flags = tokens.scored_of(row)[place].tolist()
        return {
            "tokens": token_texts(tokenizer, tokens.responses(row)[place].tolist()),
            "policy": _beside(flags, policy[row][place]),
            "reference": _beside(flags, reference[row][place]),
        }

    for pair in wanted:
        place = rows.index(pair.row)
        result["pairs"].append(
            {
                "location": heldout.preferences[pair.row].location,
                "row": pair.row,
                "better": pair.better,
                "worse": pair.worse,
                "delta": pair.delta,
                "sides": {"better": side(place, pair.better), "worse": side(place, pair.worse)},
            }
        )
    return result


def _beside(flags: Sequence[bool], values: Sequence[float]) -> list[float | None]:
    """The values at the places of the flags that are set, None elsewhere."""
    left = iter(values)
    return [next(left) if flag else None for flag in flags]


def write_token_ratios(
    path: str | Path, config: Config, heldout: Heldout, *, beta: float, made_from: str | None = None
) -> None:
    """`score_extremes` as a file, which may say what it was made from."""
    content = {**score_extremes(config, heldout, beta=beta), MADE_FROM: made_from}
    text = json.dumps(content, ensure_ascii=False)
    replace_text(Path(path), text + "\n", what="log-probs of tokens")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens included; together they are the decoded whole.

    A token that only begins a character adds nothing; the one that completes it adds the character.
    """
    texts: list[str] = []
    shown = ""
    for end in range(1, len(ids) + 1):
        text = decode_ids(tokenizer, ids[:end], clean_up_tokenization_spaces=False)
        is_whole = not text.endswith(_PARTIAL) or end == len(ids)
        texts.append(text[len(shown) :] if is_whole else "")
        shown = text if is_whole else shown
    return texts


def _one_a_row(pairs: Sequence[OrderedPair], taken: set[int]) -> list[OrderedPair]:
    """The first pair of every row that is not taken."""
    first: dict[int, OrderedPair] = {}
    for pair in pairs:
        if pair.row not in taken:
            first.setdefault(pair.row, pair)
    return list(first.values())


def _score(
    config: Config, policy: Policy, preferences: Sequence[Preference], mesh: Mesh
) -> tuple[list[list[list[float]]], TokenizedDataset, Any]:
    """Log-probs by row, response and token, to four places; the tokens; the tokenizer."""
    tokenizer = policy.pretrained.tokenizer
    tokens = tokenize_preferences(config.data, preferences, tokenizer)
    assert len(tokens) == len(preferences), "rows that were kept once are kept again"
    found = score_tokens(config.data, policy, tokens, mesh, chunk=config.model.log_prob_chunk)
    rounded = [[values.astype(float).round(4).tolist() for values in responses] for responses in found]
    return rounded, tokens, tokenizer


def score_tokens(
    data: DataConfig, policy: Policy, tokens: TokenizedDataset, mesh: Mesh, *, chunk: int = 1024
) -> list[list[Float[np.ndarray, " _"]]]:
    """Log-probs of the scored tokens, by row and response."""
    step = make_token_step(policy.graphdef, chunk=chunk)
    found: list[list[np.ndarray]] = [[] for _ in range(len(tokens))]
    for batch in scoring_loader(data, tokens, mesh).batches():
        values = np.asarray(step(policy.params, policy.frozen, place_batch(mesh, batch))).reshape(-1)
        owner, K = np.asarray(batch.owner).reshape(-1), batch.present.shape[1]
        for p, row in enumerate(np.asarray(batch.index)):
            if row >= 0:
                count = int(np.asarray(batch.present[p]).sum())
                found[row] = [values[owner == p * K + k] for k in range(count)]
    return found
