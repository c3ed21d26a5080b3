"""Held-out preferences while a run goes on: scored now and then, by the metrics of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save

from dpo.data.loader import Loader
from dpo.data.packing import facts
from dpo.data.ties import has_order
from dpo.files import new_file
from dpo.losses import Objective, Scores
from dpo.parallel.distributed import is_main
from dpo.training.interrupt import stoppable
from dpo.training.metrics import as_numbers, preference_metrics
from dpo.training.on_policy import Observe
from dpo.training.reading import Dataset
from dpo.training.reference import ReferenceStore, Rows, Score, score_rows
from dpo.training.step import Params, TrainState, make_scores
from dpo.training.tracking import Tracker

DATA_KEY = "preferences"
"""In the metadata of held-out log-probs: the fingerprint of the preferences that it is about."""
TRUNCATED_KEY = "truncated"
"""There, too: how many of them are scored in part only."""

MeanLoss = Callable[[Scores], Float[Array, ""]]


@runtime_checkable
class Evaluate(Protocol):
    """How the policy does on held-out data, logged; None where there are none."""

    def __call__(self, state: TrainState, step: int, path: Path | None = None) -> dict[str, float] | None: ...


class Validation(NamedTuple):
    """Held-out preferences and the reference's log-probs of them."""

    dataset: Dataset
    loader: Loader
    reference: ReferenceStore
    mean_loss: MeanLoss | None
    """The objective's mean over all rows, at once; None where these data have none (`why_no_loss`)."""
    fingerprint: str
    """Of the preferences as they were read."""

    def evaluate(
        self, score: Score, beta: float, *, shift: Float[Array, ""] | None = None
    ) -> tuple[Rows, dict[str, float]]:
        """The policy's sums of all rows, and the metrics of a step over all of them.

        `shift` is the running mean that training has come to, for objectives that subtract one.
        """
        tokens = self.dataset.tokens
        rows = score_rows(
            score,
            self.loader.batches(),
            num_rows=len(tokens),
            num_responses=tokens.max_responses,
            locate=self.dataset.location,
        )
        policy = {name: np.nan_to_num(values) for name, values in rows.items()}
        reference = self.reference.lookup(np.arange(len(tokens)))
        scores = make_scores(policy, reference, facts(tokens), shift)
        loss = {} if self.mean_loss is None else {"loss": self.mean_loss(scores)}
        return rows, as_numbers(loss | preference_metrics(scores, beta))

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
        about = {DATA_KEY: self.fingerprint, TRUNCATED_KEY: str(self.dataset.tokens.num_truncated)}
        with new_file("held-out log-probs", path) as beside:
            contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
            beside.write_bytes(save(contiguous, metadata=about))


def make_mean_loss(objective: Objective, dataset: Dataset) -> MeanLoss:
    """The mean of the objective over rows that it sees as one batch, compiled once.

    As in training, rows without a pair do not count where nothing but pairs does.
    """
    tokens = dataset.tokens
    counted = np.ones(len(tokens), bool) if objective.learns_from_ties else has_order(tokens)
    return jax.jit(lambda scores: jnp.where(counted, objective(scores), 0).sum() / counted.sum())


def why_no_loss(objective: Objective, dataset: Dataset) -> str | None:
    """What held-out rows lack for the objective's loss; None where they have it all."""
    tokens, name = dataset.tokens, objective.name
    if "mismatched" in objective.needs:
        return f"{name} needs another prompt's response beside each, which only training data are given"
    if "scores" in objective.needs and (location := dataset.location_without_score()):
        return f"{name} needs scores; {location} has none (field 'scores', one a response)"
    if tokens.max_responses < 2 and not objective.learns_from_single_responses:
        return f"{name} compares responses, and every prompt has one"
    return None


def open_validation(
    objective: Objective,
    heldout: Dataset,
    reference: ReferenceStore,
    *,
    loader: Loader,
    fingerprint: str,
    log: Callable[[str], None],
) -> Validation:
    """What is evaluated now and then; says why where these data have no loss of the objective."""
    lacking = why_no_loss(objective, heldout)
    if lacking is not None:
        log(f"no held-out loss: {lacking}")
    mean_loss = make_mean_loss(objective, heldout) if lacking is None else None
    return Validation(heldout, loader, reference, mean_loss, fingerprint)


def make_evaluate(
    validation: Validation | None,
    *,
    beta: float,
    score_with: Callable[[Params], Score],
    observe: Observe | None,
    tracker: Tracker,
    stop_requested: Callable[[], bool],
) -> Evaluate:
    """The held-out evaluation of a state, which adds what `observe` says, and ends where a stop is asked for.

    Where it is given a `path`, the main process keeps the log-probs there.
    """

    def evaluate(state: TrainState, step: int, path: Path | None = None) -> dict[str, float] | None:
        if validation is None:
            return None
        observed = {} if observe is None else observe(step, state.params)
        score = stoppable(score_with(state.params), stop_requested)
        rows, metrics = validation.evaluate(score, beta, shift=jnp.asarray(np.asarray(state.shift.mean)))
        metrics |= observed
        tracker.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        if path is not None and is_main():
            validation.save(path, rows)
        return metrics

    return evaluate
