"""Held-out preferences while a run goes on: scored now and then, by the metrics of a step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from dpo.data.batch import ROW_FIELDS, Batch
from dpo.data.loader import Loader
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
        scores = make_scores(policy, self.reference.lookup(np.arange(len(tokens))), self._facts())
        return rows, as_numbers(preference_metrics(scores, beta))

    def save(self, path: Path, rows: Rows) -> None:
        """What `evaluate` and the report need, one array a name, [n, K]."""
        facts = self._facts()
        arrays = {
            "policy": rows["logps"],
            "reference": self.reference.rows["logps"],
            "present": facts.present,
            "lengths": facts.lengths,
            "ranks": facts.ranks,
            "scores": facts.scores,
            "origin": self.dataset.tokens.origin,
        }
        with new_file("held-out log-probs", path) as beside:
            save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, beside)

    def _facts(self) -> Batch:
        """One batch's per-prompt arrays for the whole data set, in its order, without rows."""
        batches = [self.loader.batch(step) for step in range(self.loader.num_steps)]
        joined = {
            name: np.concatenate([getattr(batch, name) for batch in batches])
            for name in Batch._fields
            if name not in ROW_FIELDS
        }
        real = joined["index"] >= 0
        rows = dict.fromkeys(ROW_FIELDS, np.zeros((0, 0), np.int32))
        return Batch(**rows, **{name: values[real] for name, values in joined.items()})
