"""Held-out preferences while a run goes on: scored now and then, by the metrics of a step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from dpo.data.loader import Loader
from dpo.data.packing import facts
from dpo.files import new_file
from dpo.training.metrics import as_numbers, preference_metrics
from dpo.training.reference import ReferenceStore, Rows, Score, score_rows
from dpo.training.setup import Dataset
from dpo.training.step import make_scores

HELDOUT_FILE = "heldout.safetensors"
"""Log-probs of the last held-out evaluation, in the run directory."""


class Validation(NamedTuple):
    """Held-out preferences and the reference's log-probs of them."""

    dataset: Dataset
    loader: Loader
    reference: ReferenceStore

    def evaluate(self, score: Score, beta: float) -> tuple[Rows, dict[str, float]]:
        """The policy's sums of all rows, and the metrics of a step over all of them."""
        tokens = self.dataset.tokens
        rows = score_rows(
            score, self.loader.batches(), num_rows=len(tokens), num_responses=tokens.max_responses
        )
        policy = {name: np.nan_to_num(values) for name, values in rows.items()}
        scores = make_scores(policy, self.reference.lookup(np.arange(len(tokens))), facts(tokens))
        return rows, as_numbers(preference_metrics(scores, beta))

    def save(self, path: Path, rows: Rows) -> None:
        """What `evaluate` and the report need, one array a name, [n, K]."""
        known = facts(self.dataset.tokens)
        arrays = {
            "policy": rows["logps"],
            "reference": self.reference.rows["logps"],
            "present": known.present,
            "lengths": known.lengths,
            "ranks": known.ranks,
            "scores": known.scores,
            "origin": self.dataset.tokens.origin,
        }
        with new_file("held-out log-probs", path) as beside:
            save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, beside)
