"""Held-out log-probs as a table, one line for each response: Parquet or JSON lines.

location, source     where the row stands in the data, and the subset that it belongs to
row, response        number of the row among those scored, and the response's place in it, best first
rank                 0 is best; equal ranks are ties
prompt, text         as the data have them; conversations as JSON
tokens               number of scored tokens
policy, reference    log-probs summed over them, in nats
log_ratio, reward    policy − reference, and β times it
token_ids, policy_tokens, reference_tokens   the scored tokens and their log-probs one by one
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from dpo.config import Config
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.token_ratios import score_tokens
from dpo.files import new_file, replace_text
from dpo.outcomes import UserError
from dpo.parallel.sharding import own_mesh
from dpo.training.adapted import load_reference
from dpo.training.policy import load_policy
from dpo.training.reading import tokenize_preferences

ENDINGS = (".parquet", ".jsonl")


class Line(TypedDict):
    """One response; the module says what the columns are."""

    location: str
    source: str
    row: int
    response: int
    rank: int
    prompt: str
    text: str
    tokens: int
    policy: float
    reference: float
    log_ratio: float
    reward: float
    token_ids: list[int]
    policy_tokens: list[float]
    reference_tokens: list[float]


def require_ending(path: str) -> None:
    """Refuse a file of another kind before anything is scored."""
    if not path.endswith(ENDINGS):
        raise UserError(f"rows is {path!r}; allowed: a file that ends with {' or '.join(ENDINGS)}")


def write_rows(path: str, config: Config, heldout: Heldout, *, beta: float) -> int:
    """Score token by token and write the table, whole or not at all; returns the number of lines.

    Sums are those of `heldout`; its tokens are scored again, one model in memory at a time.
    """
    require_ending(path)
    lines = list(_lines(config, heldout, beta=beta))
    write_lines(path, lines)
    return len(lines)


def write_lines(path: str, lines: Sequence[Line]) -> None:
    """The lines as Parquet or JSON lines, by the ending of the file's name."""
    if path.endswith(".jsonl"):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        replace_text(Path(path), text, what="the rows")
        return
    import pyarrow
    import pyarrow.parquet

    with new_file("the rows", Path(path)) as beside:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(lines)), beside)


def _lines(config: Config, heldout: Heldout, *, beta: float) -> Iterator[Line]:
    mesh, model = own_mesh(config.mesh), config.model
    policy = load_policy(model, mesh)
    tokens = tokenize_preferences(config.data, heldout.preferences, policy.pretrained.tokenizer)
    ours = score_tokens(config.data, policy, tokens, mesh, chunk=model.log_prob_chunk)
    del policy
    reference = load_reference(config, mesh)
    theirs = score_tokens(config.data, reference, tokens, mesh, chunk=model.log_prob_chunk)
    rows = heldout.rows
    for i, k in np.argwhere(rows.present):
        preference = heldout.preferences[i]
        log_ratio = float(rows.policy[i, k] - rows.reference[i, k])
        yield Line(
            location=preference.location,
            source=preference.source,
            row=int(i),
            response=int(k),
            rank=int(rows.ranks[i, k]),
            prompt=_as_text(preference.prompt),
            text=_as_text(preference.responses[k]),
            tokens=int(rows.lengths[i, k]),
            policy=float(rows.policy[i, k]),
            reference=float(rows.reference[i, k]),
            log_ratio=log_ratio,
            reward=beta * log_ratio,
            token_ids=tokens.responses(i)[k][tokens.scored_of(i)[k]].tolist(),
            policy_tokens=ours[i][k].astype(float).tolist(),
            reference_tokens=theirs[i][k].astype(float).tolist(),
        )


def _as_text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
