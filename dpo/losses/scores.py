"""What an objective sees, one number a response, and what an objective is.

The step makes `Scores` from per-token log-probs `[R, N]`, their `owner` (response p·K + k) and nothing else:

    policy          segment sum of the policy's log-probs over owner
    reference       the same under the reference, looked up in the store
    log_collision   segment sum over owner of log Σ_v π(v)², the policy's collision log-probability at each
                    scored position (`weighting.py`); only when "log_collision" is in the objective's `needs`
    policy_head     segment sum over the tokens that `weighting.in_head` marks, and `reference_head` likewise
                    from the store; only when "head" is in the objective's `needs`
    shift           `RunningMean.mean` carried in the train state, updated with `Objective.observe(scores)`
                    before the loss; only when "shift" is in the objective's `needs`

Fields that nobody asked for stay None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

MISMATCHED = 2**30
"""Rank of a response that belongs to another prompt: it measures KTO's baseline and is never compared."""


class Scores(NamedTuple):
    """Summed log-probs of P prompts' K responses, best first. Absent responses hold finite filler."""

    policy: Float[jax.Array, "P K"]
    reference: Float[jax.Array, "P K"]
    lengths: Int[jax.Array, "P K"]
    present: Bool[jax.Array, "P K"]
    ranks: Int[jax.Array, "P K"]
    """0 is best, not decreasing along K; equal ranks are ties. Unpaired data: 0 desirable, 1 undesirable."""
    scores: Float[jax.Array, "P K"]
    """Given scores, higher is better; NaN where the data has none."""
    log_collision: Float[jax.Array, "P K"] | None = None
    """Sum over the response's tokens of log Σ_v π(v)² (WPO)."""
    policy_head: Float[jax.Array, "P K"] | None = None
    """Policy log-probs summed over as many tokens as the prompt's shortest response has (LD-DPO)."""
    reference_head: Float[jax.Array, "P K"] | None = None
    """The same under the reference."""
    shift: Float[jax.Array, ""] | None = None
    """Running mean of the log-ratio over the responses seen so far (BCO)."""
    weights: Float[jax.Array, "P K"] | None = None
    """Constant weights of responses; a pair counts with the product of its two (set by WPO)."""

    @property
    def log_ratio(self) -> Float[jax.Array, "P K"]:
        """log π(y|x) − log ρ(y|x); β times it is the implicit reward up to β log Z(x)."""
        return self.policy - self.reference


Loss = Callable[[Scores], Float[jax.Array, " P"]]
"""Loss of each prompt. The step takes the mean over the prompts of the global batch."""


@dataclass(frozen=True)
class Objective:
    """A loss for each prompt, and what it takes to compute it. Call it like the function it holds."""

    loss: Loss
    needs: frozenset[str] = frozenset()
    """Beyond log-probs: "scores" or "mismatched" (the data must have them), "log_collision", "head",
    "shift"."""
    whole_batch: bool = False
    """A prompt's loss depends on the other prompts: call it once, on the scores of the whole batch."""
    reference_free: bool = False
    """`Scores.reference` is not read: no reference log-probs are needed."""
    ordered: bool = False
    """It jumps where two implicit rewards change places, so rounding decides its value at log-ratio zero."""
    admits: frozenset[str] = frozenset()
    """Modifiers that make sense with it: "divergence", "ld_alpha", "wpo" (see `weighting`, `divergences`)."""

    def __call__(self, scores: Scores) -> Float[jax.Array, " P"]:
        return self.loss(scores)

    def expected_initial_loss(self, scores: Scores) -> Float[jax.Array, " P"] | None:
        """What the loss must be while the policy still is the reference; None if it says nothing.

        ln 2 for `dpo`, log K! for `plackett_luce`, 1/(4β²) for `ipo`: the loss at log-ratio zero.
        """
        if self.reference_free or self.ordered:
            return None
        return self.loss(scores._replace(policy=scores.reference, policy_head=scores.reference_head))

    def observe(self, scores: Scores) -> tuple[Float[jax.Array, "P K"], Bool[jax.Array, "P K"]]:
        """The values, and which of them count, whose running mean the step hands back as `Scores.shift`."""
        return jax.lax.stop_gradient(scores.log_ratio), scores.present & (scores.ranks != MISMATCHED)


class RunningMean(NamedTuple):
    """Mean of all values seen so far: explicit state, carried in the train state and in its checkpoint."""

    mean: Float[jax.Array, ""]
    count: Float[jax.Array, ""]

    @classmethod
    def zero(cls) -> RunningMean:
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(self, values: Float[jax.Array, "P K"], counted: Bool[jax.Array, "P K"]) -> RunningMean:
        """Take in one batch. Moves the mean by (batch mean − mean)·n/(N + n), which never forms a large
        sum."""
        new = jnp.sum(counted).astype(self.count.dtype)
        count = self.count + new
        deviation = jnp.sum(jnp.where(counted, values - self.mean, 0.0))
        return RunningMean(self.mean + deviation / jnp.maximum(count, 1.0), count)
