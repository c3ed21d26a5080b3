"""One token a row from logits: penalty, temperature, top-k, top-p, min-p, then a draw from what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from dpo.outcomes import UserError

_CDF_BLOCK = 256


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn; filters apply in this order, as in transformers."""

    max_new_tokens: int = 128
    """Longest response, its end token included."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens already in prompt or response; 1 is off."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens."""
    top_p: float | None = None
    """Only the fewest most probable tokens whose probabilities reach p."""
    min_p: float | None = None
    """Only tokens with at least p times the probability of the most probable one."""

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}; allowed is {allowed}")


def sample(
    logits: Float[Array, "R V"],
    position: Int[Array, " R"],
    seeds: UInt[Array, " R"],
    sampling: SamplingConfig,
) -> Int[Array, " R"]:
    """One token a row from temperature-scaled, filtered logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / sampling.temperature, sampling)
    uniform = jax.vmap(lambda seed, t: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), t)))
    return _invert_cdf(jax.nn.softmax(logits, axis=-1), uniform(seeds, position))


def filter_logits(logits: Float[Array, "R V"], sampling: SamplingConfig) -> Float[Array, "R V"]:
    """Minus infinity for the tokens that top-k, then top-p, then min-p exclude."""
    if sampling.top_k is not None:
        k = sampling.top_k
        logits = _keep_above(logits, logits, lambda above: above.sum(axis=-1, keepdims=True) < k)
    if sampling.top_p is not None and sampling.top_p < 1:
        probs, p = jax.nn.softmax(logits, axis=-1), sampling.top_p
        logits = _keep_above(logits, probs, lambda above: (above * probs).sum(axis=-1, keepdims=True) < p)
    if sampling.min_p is not None and sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + np.log(sampling.min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _keep_above(
    logits: Float[Array, "R V"], values: Float[Array, "R V"], fits: Callable[[Array], Array]
) -> Float[Array, "R V"]:
    """Keep tokens down to the least value t for which the tokens strictly above t satisfy `fits`.

    Sorting a vocabulary takes a CPU longer than the model's step, so t is found by bisection over keys of 32
    bits that are ordered as the floats are: 32 passes are exact, and tokens with equal values stay together.
    """
    keys = _ordered_keys(values)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = fits(keys > middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    least = jnp.zeros((keys.shape[0], 1), jnp.uint32)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (least, keys.max(axis=-1, keepdims=True)))
    return jnp.where(keys >= threshold, logits, -jnp.inf)


def _ordered_keys(values: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """Unsigned integers in the order of the floats: flip the sign bit, and all bits of negative ones."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _invert_cdf(probs: Float[Array, "R V"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """The first token whose cumulative probability exceeds `uniform`: a block first, then within it.

    Gumbel noise for every token of the vocabulary costs a CPU twenty times as much.
    """
    R, V = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -V % _CDF_BLOCK))).reshape(R, -1, _CDF_BLOCK)
    sums = blocks.sum(axis=-1)
    target = uniform * sums.sum(axis=-1)
    block, before = _first_above(sums, target)
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _CDF_BLOCK + _first_above(inner, target - before)[0]).astype(jnp.int32)


def _first_above(
    weights: Float[Array, "R N"], target: Float[Array, " R"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """First index of positive weight whose cumulative sum exceeds the target, and the sum before it.

    Where rounding leaves none, the largest weight is taken, so that an excluded token never is.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    above = (cumulative > target[:, None]) & (weights > 0)
    index = jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1))
    before = jnp.take_along_axis(cumulative - weights, index[:, None], axis=-1)[:, 0]
    return index, before


def penalise(
    logits: Float[Array, "R V"], seen: Bool[Array, "R V"] | None, sampling: SamplingConfig
) -> Float[Array, "R V"]:
    """Repetition penalty (Keskar et al. 2019)."""
    if seen is None:
        return logits
    penalty = sampling.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
