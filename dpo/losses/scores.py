"""What an objective sees, one number a response, and what an objective is.

The step makes `Scores` from per-token log-probs `[R, N]`, their `owner` (response p·K + k) and nothing else:

    policy          segment sum of the policy's log-probs over owner
    reference       the same under the reference, looked up in the store
    log_collision, policy_head, reference_head
                    segment sums of what `sums.EXTRA_SUMS` says; only when "log_collision" or "head" is in the
                    objective's `needs`
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

from dpo.losses.sums import EXTRA_SUMS
from dpo.outcomes import UserError

MISMATCHED = 2**30
"""Rank of a response that belongs to another prompt: it measures KTO's baseline and is never compared."""
TIE = 1e-3
"""Nats. Log-ratios are equal within it where a loss or its slope would jump between them, as all are at the
start: float32 sums over a response differ by less than a tenth of it between two layouts of the rows."""


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


OTHER_NEEDS = frozenset({"scores", "mismatched", "shift"})
"""What an objective may need besides log-probs and extra sums: the first two of the data, the last of the
step."""


@dataclass(frozen=True)
class Objective:
    """A loss for each prompt, and what it takes to compute it. Call it like the function it holds."""

    loss: Loss
    needs: frozenset[str] = frozenset()
    """Beyond log-probs: names in `EXTRA_SUMS` and `OTHER_NEEDS`."""
    learns_from_ties: bool = False
    """A row says something to it although no response of it ranks above another; of a sum: to a term."""
    learns_from_single_responses: bool = False
    """A prompt with one response, which is a row without order, says something to it; of a sum: to all
    terms."""
    whole_batch: bool = False
    """A prompt's loss depends on the other prompts: call it once, on the scores of the whole batch."""
    reference_free: bool = False
    """`Scores.reference` is not read: no reference log-probs are needed."""
    admits: frozenset[str] = frozenset()
    """Modifiers that make sense with it: "divergence", "ld_alpha", "wpo" (see `weighting`, `divergences`)."""
    name: str = "(unnamed)"
    """What messages call it; `make_objective` gives it the name of the settings."""
    terms: tuple[Objective, ...] = ()
    """What it is a weighted sum of; empty where it is no sum."""

    def __post_init__(self) -> None:
        unknown = sorted(self.needs.difference(EXTRA_SUMS, OTHER_NEEDS))
        if unknown:
            allowed = ", ".join(sorted({*EXTRA_SUMS, *OTHER_NEEDS}))
            raise UserError(f"an objective's needs are {', '.join(unknown)}; allowed: {allowed}")
        if self.learns_from_single_responses and not self.learns_from_ties:
            raise UserError(
                "an objective that learns from single responses learns from rows without an order: "
                "learns_from_ties must be true too"
            )

    def __call__(self, scores: Scores) -> Float[jax.Array, " P"]:
        return self.loss(scores)

    @property
    def sums(self) -> frozenset[str]:
        """The extra sums that it reads."""
        return self.needs.intersection(EXTRA_SUMS)

    @property
    def reference_sums(self) -> frozenset[str]:
        """Those of them that it reads of the reference too, whose store has them beside the log-probs."""
        return frozenset(name for name in self.sums if EXTRA_SUMS[name].reference is not None)

    def expected_initial_loss(self, scores: Scores) -> Float[jax.Array, " P"] | None:
        """What the loss must be while the policy still is the reference; None if it says nothing.

        ln 2 for `dpo`, log K! for `plackett_luce`, 1/(4β²) for `ipo`: the loss at log-ratio zero.
        """
        if self.reference_free:
            return None
        known = {
            extra.policy: getattr(scores, extra.reference) for extra in EXTRA_SUMS.values() if extra.reference
        }
        return self.loss(scores._replace(policy=scores.reference, **known))

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
