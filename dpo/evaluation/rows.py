"""Held-out log-probs as rows, and the ordered pairs that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dpo.outcomes import UserError
from dpo.training.metrics import RESOLUTION


class Rows(NamedTuple):
    """n prompts with up to K responses, best first. What is absent may hold anything, NaN too."""

    policy: Float[np.ndarray, "n K"]
    reference: Float[np.ndarray, "n K"]
    lengths: Int[np.ndarray, "n K"]
    present: Bool[np.ndarray, "n K"]
    ranks: Int[np.ndarray, "n K"]
    prompts: Shaped[np.ndarray, " n"]
    """Identity of each row's prompt: rows of one prompt are one cluster."""
    sources: Shaped[np.ndarray, " n"]
    """Subset that each row belongs to."""

    @property
    def log_ratio(self) -> Float[np.ndarray, "n K"]:
        """log π − log ρ; 0 where absent."""
        return np.where(self.present, self.policy - self.reference, 0.0)

    @property
    def resolved_ratio(self) -> Float[np.ndarray, "n K"]:
        """By which rankings are ordered: log_ratio, 0 where the log-probs' precision cannot tell it from 0.

        One model's log-probs of a response differ in their last digits from one shape of a batch to another,
        so that without it rounding would order the responses of a policy that is the reference still. Of two
        responses `Pairs.resolved_gap` asks both at once.
        """
        finest = RESOLUTION * np.finfo(np.float32).eps * np.abs(self.policy)
        return np.where(np.abs(self.log_ratio) <= finest, 0.0, self.log_ratio)

    def take(self, kept: Bool[np.ndarray, " n"]) -> Rows:
        """Some of the rows."""
        return Rows(*(array[kept] for array in self))


class Pairs(NamedTuple):
    """Every strictly ordered pair of every row."""

    row: Int[np.ndarray, " m"]
    better: Int[np.ndarray, " m"]
    worse: Int[np.ndarray, " m"]
    weight: Float[np.ndarray, " m"]
    """1 over the number of pairs of its row: every row that has pairs counts the same."""

    def gap(self, values: Shaped[np.ndarray, "n K"]) -> Float[np.ndarray, " m"]:
        """Value of the better response minus that of the worse one."""
        return (values[self.row, self.better] - values[self.row, self.worse]).astype(np.float64)

    def resolved_gap(self, rows: Rows) -> Float[np.ndarray, " m"]:
        """Gap of the log-ratios, 0 where the precision of the pair's log-probs cannot tell it from 0.

        The rule of the metrics that training writes (`dpo.training.metrics`): both log-probs round.
        """
        gap, size = self.gap(rows.log_ratio), np.abs(rows.policy)
        finest = (
            RESOLUTION * np.finfo(np.float32).eps * (size[self.row, self.better] + size[self.row, self.worse])
        )
        return np.where(np.abs(gap) <= finest, 0.0, gap)


def make_pairs(rows: Rows) -> Pairs:
    """All (i, j) of a row with i ranked above j; ties state no preference."""
    both = rows.present[:, :, None] & rows.present[:, None, :]
    row, better, worse = np.nonzero(both & (rows.ranks[:, :, None] < rows.ranks[:, None, :]))
    count = np.bincount(row, minlength=len(rows.ranks))
    return Pairs(row, better, worse, 1.0 / count[row])


def as_pairs(rows: Rows) -> Rows:
    """Single labelled responses (rank 0 desirable, 1 not) as pairs; any other rows as they are.

    The other side is the reference itself: its log-ratio is 0, so that a desirable response is right when the
    policy made it likelier, an undesirable one when less likely. For the baselines it has the median length
    and the median log-prob of the reference.
    """
    if rows.ranks.shape[1] != 1 or not rows.present.all():
        return rows
    is_desirable = rows.ranks == 0

    def beside(values: Shaped[np.ndarray, "n 1"]) -> Shaped[np.ndarray, "n 2"]:
        median = np.full_like(values, np.median(values))
        return np.where(
            is_desirable, np.concatenate([values, median], 1), np.concatenate([median, values], 1)
        )

    reference, log_ratio = beside(rows.reference), np.zeros((len(rows.ranks), 2))
    log_ratio[np.arange(len(rows.ranks)), rows.ranks[:, 0]] = rows.log_ratio[:, 0]
    return rows._replace(
        policy=reference + log_ratio,
        reference=reference,
        lengths=beside(rows.lengths),
        present=np.ones(reference.shape, bool),
        ranks=np.tile([0, 1], (len(rows.ranks), 1)),
    )


def check_finite(rows: Rows, places: Sequence[str] | None = None) -> None:
    """Refuse log-probs that are not numbers, naming their rows, by `places` where they are known."""
    for name, values in (("policy", rows.policy), ("reference", rows.reference)):
        bad = np.nonzero((rows.present & ~np.isfinite(values)).any(1))[0].tolist()
        if bad:
            which = str(bad[:20]) if places is None else ", ".join(places[row] for row in bad[:5])
            raise UserError(
                f"{name} log-probs of {len(bad)} of {len(rows.ranks)} rows are not finite ({which}): check "
                "the weights, and the learning rate they were trained with"
            )
