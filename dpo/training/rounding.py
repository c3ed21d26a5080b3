"""How far bfloat16's rounding moves the margin of a pair, measured on the first batch and said in nats.

Weights are kept in float32 and rounded for a bfloat16 forward. A step at a small learning rate moves most of
them by less than a rounding step: which of them jump is chance, and so is what that does to a pair's margin.
Beside this noise stands what the first steps changed, which is what a step learns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Bool, Float

from dpo.data.batch import Batch
from dpo.training.hooks import Done, Hook
from dpo.training.reference import Score
from dpo.training.step import Params

STEPS = 2
"""Updates after which the change is looked at; the first one of a warm-up has learning rate 0."""
Margins = Callable[[Params], Float[np.ndarray, " n"]]
"""From parameters to the log-prob of the best response less that of the worst, of each prompt with two."""


def say_rounding(
    params: Params,
    batch: Batch,
    score_with: Callable[[Params], Score],
    *,
    learning_rate: float,
    log: Callable[[str], None],
) -> Hook:
    """Measure the noise now, and after `STEPS` updates say it beside the change; nothing without pairs."""
    margins: Margins = lambda given: _margins(score_with(given)(batch)["logps"], np.asarray(batch.present))  # noqa: E731
    before = margins(params)
    noise = rounding_noise(margins, params, by=learning_rate)

    def say(done: Done) -> None:
        if done.step == STEPS and len(before):
            change = float(np.mean(margins(done.state.params) - before))
            log(describe_rounding(noise, change, learning_rate))

    return say


def describe_rounding(noise: float, change: float, learning_rate: float) -> str:
    """One line, with what helps where the noise is the larger."""
    line = (
        f"bfloat16: rounding moves a pair's margin by {noise:.2g} nats when weights move by "
        f"{learning_rate:g}; the first {STEPS} steps changed it by {change:+.2g} on average"
    )
    if noise > abs(change):
        line += " (where later steps are as small, model.round_products: backward or float32 keeps them)"
    return line


def rounding_noise(margins: Margins, params: Params, *, by: float, seed: int = 0) -> float:
    """Root mean square of the rounding error of a margin, in nats; NaN without margins.

    Every weight is moved by ± `by` at random, and the other way round. To first order the true margin moves
    by as much up as down, so the mean of both less the margin in the middle is rounding alone: three errors
    of the same size, of which two are halved.
    """
    middle = margins(params)
    sides = [margins(_moved(params, jax.random.key(seed), by=sign * by)) for sign in (1.0, -1.0)]
    left = (sides[0] + sides[1]) / 2 - middle
    return float(np.sqrt(np.mean(left**2) / 1.5)) if len(left) else float("nan")


@partial(jax.jit, static_argnames="by")
def _moved(params: Params, key: jax.Array, *, by: float) -> Params:
    """Every weight plus or minus `by`, as the key draws the signs."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten([leaf + by * sign for leaf, sign in zip(leaves, signs, strict=True)])


def _margins(logps: Float[np.ndarray, "P K"], present: Bool[np.ndarray, "P K"]) -> Float[np.ndarray, " n"]:
    paired = np.flatnonzero(present.sum(1) > 1)
    worst = present[paired].sum(1) - 1
    return np.asarray(logps)[paired, 0] - np.asarray(logps)[paired, worst]
