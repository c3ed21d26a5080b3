"""Before anything is learnt the policy is the reference: the first loss must say so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpo.config import Config
from dpo.data.batch import Batch
from dpo.losses import Objective
from dpo.outcomes import UserError
from dpo.training.step import Sums, make_scores

PREFLIGHT_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-4}
"""How far the first loss may be from the objective's value at log-ratio zero, relative to it. In bfloat16 the
reference scores the step's own batches, in float32 any."""


def describe_reference(config: Config) -> str:
    """What the policy is measured against, in words."""
    if config.model.reference is not None:
        return f"{config.model.reference} (model.reference)"
    if config.lora.init is not None:
        return f"the policy as it starts, {config.model.source} with the adapters of {config.lora.init}"
    if config.lora.is_on:
        return f"the policy as it starts, {config.model.source} (the new adapters change nothing yet)"
    return f"the policy as it starts, {config.model.source}"


def expected_first_loss(config: Config, objective: Objective, batch: Batch, reference: Sums) -> float | None:
    """The objective at log-ratio zero on the first batch: ln 2 for dpo, log K! for plackett_luce.

    None where the reference's log-probs alone don't say: another reference, a reference-free objective, sums
    that the reference's store does not have (WPO's).
    """
    stored = objective.sums == objective.reference_sums
    if config.model.reference is not None or not stored:
        return None
    index = np.asarray(batch.index)
    if config.model.forward_dtype == "bfloat16" and len(np.unique(index)) < len(index):
        return None  # a row that comes twice rounds differently in its two places, and is stored once
    scores = make_scores(reference, reference, batch, jnp.zeros(()))
    losses = jax.jit(objective.expected_initial_loss)(scores)  # one program, not one an operation
    return None if losses is None else float(losses.mean())


def check_first_loss(loss: float, expected: float, forward_dtype: str) -> None:
    """Refuse to go on when the policy, which still is the reference, does not score like it.

    Raises:
      ValueError: with the values and what usually causes it.
    """
    tolerance = PREFLIGHT_TOLERANCE[forward_dtype] * max(1.0, abs(expected))
    if not abs(loss - expected) <= tolerance:
        raise UserError(
            f"the first loss is {loss:.6f}, but the policy still is the reference, so it must be "
            f"{expected:.6f} (± {tolerance:.1g}). The policy and the stored reference log-probs differ: look "
            "for non-finite values, or for a model.compute_dtype or model.round_products too coarse for this "
            "data (try float32 and neither)"
        )
