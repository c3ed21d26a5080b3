"""Per-token log-probabilities from hidden states, a chunk of tokens at a time; owns the output projection.

Only scored positions come here, and `[tokens, vocabulary]` never exists: a chunk's logits are made, reduced
and dropped. The derivative is written by hand so that the backward pass does the same, from the saved
log-normaliser: with p = softmax(logits), ∂ log p[target] / ∂ logits = onehot(target) − p. A gradient that
nobody asks for (the embedding's, under adapters) is not computed.

Chunks run along N, so rows that are split over a mesh stay where they are; a flat list of tokens is the same
thing without the row axis. Logits, normalisers and results are float32 whatever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Float32, Int


def token_log_probs(
    hidden: Float[Array, "*R N D"],
    embedding: Float[Array, "V D"],
    target: Int[Array, "*R N"],
    *,
    chunk: int,
    softcap: float | None = None,
    bias: Float[Array, " V"] | None = None,
    keep_logits: bool | None = None,
) -> Float32[Array, "*R N"]:
    """log p(target) at each position, differentiable in `hidden`, `embedding` and `bias`.

    `chunk` bounds how many positions meet the vocabulary at a time, all rows together. `keep_logits` saves
    the logits for the backward pass (positions x V floats) instead of making them again: a quarter fewer
    products. When not given they are kept where all positions are one chunk, which holds them all anyway.
    """
    if keep_logits is None:
        keep_logits = _Chunks(hidden.shape[:-1], chunk).steps == 1
    return _token_log_probs(chunk, softcap, keep_logits, hidden, embedding, bias, target)


def collision_log_probs(
    hidden: Float[Array, "*R N D"],
    embedding: Float[Array, "V D"],
    *,
    chunk: int,
    softcap: float | None = None,
    bias: Float[Array, " V"] | None = None,
) -> Float32[Array, "*R N"]:
    """log Σ_v p_v² at each position: how likely two samples agree. Carries no gradient."""

    def reduce(logits: Array) -> Array:
        return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)

    return _reduce_logits(reduce, hidden, embedding, chunk=chunk, softcap=softcap, bias=bias)


def token_entropies(
    hidden: Float[Array, "*R N D"],
    embedding: Float[Array, "V D"],
    *,
    chunk: int,
    softcap: float | None = None,
    bias: Float[Array, " V"] | None = None,
) -> Float32[Array, "*R N"]:
    """−Σ_v p_v log p_v at each position, in nats. Carries no gradient."""

    def reduce(logits: Array) -> Array:
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    return _reduce_logits(reduce, hidden, embedding, chunk=chunk, softcap=softcap, bias=bias)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("hidden", "embedding", "bias"))
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for; known while tracing."""

    hidden: bool
    embedding: bool
    bias: bool


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_log_probs(chunk, softcap, keep_logits, hidden, embedding, bias, target):
    return _compute(chunk, softcap, False, hidden, embedding, bias, target)[0]


def _forward(chunk, softcap, keep_logits, hidden, embedding, bias, target):
    """Every argument comes as its value, and whether it is differentiated."""
    wanted = _Wanted(hidden.perturbed, embedding.perturbed, bias is not None and bias.perturbed)
    values = custom_vjp_primal_tree_values((hidden, embedding, bias, target))
    log_probs, saved = _compute(chunk, softcap, keep_logits, *values)
    return log_probs, (wanted, saved)


def _compute(chunk, softcap, keep_logits, hidden, embedding, bias, target):
    chunks = _Chunks(hidden.shape[:-1], chunk)

    def one_chunk(_, inputs):
        hidden, target = inputs
        logits = _logits(hidden, embedding, bias, softcap)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - normaliser
        return None, (log_prob, normaliser, logits if keep_logits else None)

    _, (log_probs, normaliser, logits) = jax.lax.scan(
        one_chunk, None, (chunks.split(hidden), chunks.split(target))
    )
    return chunks.join(log_probs), (hidden, embedding, bias, target, normaliser, logits)


def _backward(chunk, softcap, keep_logits, saved, cotangent):
    wanted, (hidden, embedding, bias, target, normaliser, kept) = saved
    chunks = _Chunks(hidden.shape[:-1], chunk)

    def one_chunk(gradients, inputs):
        hidden, target, cotangent, normaliser, logits = inputs
        if logits is None:
            logits = _logits(hidden, embedding, bias, softcap)
        picked = target[..., None] == jnp.arange(logits.shape[1])[None, :]
        slope = cotangent[..., None] * (picked - jnp.exp(logits - normaliser[..., None]))
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        by_embedding, by_bias = gradients
        if wanted.bias:
            by_bias = by_bias + slope.sum(axis=0)
        slope = slope.astype(hidden.dtype)
        if wanted.embedding:
            by_embedding = by_embedding + _product(slope, hidden, 0, 0)
        by_hidden = _product(slope, embedding, 1, 0).astype(hidden.dtype) if wanted.hidden else None
        return (by_embedding, by_bias), by_hidden

    zeros = (
        jnp.zeros(embedding.shape, jnp.float32) if wanted.embedding else None,
        jnp.zeros(bias.shape, jnp.float32) if wanted.bias else None,
    )
    inputs = (chunks.split(hidden), chunks.split(target), chunks.split(cotangent), normaliser, kept)
    (by_embedding, by_bias), by_hidden = jax.lax.scan(one_chunk, zeros, inputs)
    return (
        None if by_hidden is None else chunks.join(by_hidden),
        None if by_embedding is None else by_embedding.astype(embedding.dtype),
        None if by_bias is None else by_bias.astype(bias.dtype),
        None,
    )


_token_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)


def _reduce_logits(
    reduce: Callable[[Array], Array], hidden: Array, embedding: Array, *, chunk: int, softcap, bias
) -> Array:
    """`reduce` applied to every position's logits, chunk by chunk, without derivative."""
    hidden, embedding, bias = jax.lax.stop_gradient((hidden, embedding, bias))
    chunks = _Chunks(hidden.shape[:-1], chunk)
    return chunks.join(
        jax.lax.map(lambda h: reduce(_logits(h, embedding, bias, softcap)), chunks.split(hidden))
    )


class _Chunks:
    """Cuts [R N ...] into [steps, R * n, ...] and back; R * n ≤ chunk, but at least one position of each row.

    Flat, because XLA's CPU backend sums a product over two axes by writing its operands out transposed.
    """

    def __init__(self, shape: tuple[int, ...], chunk: int):
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; allowed is at least 1 position")
        *self.rows, self.length = shape
        most = max(1, chunk // max(1, math.prod(self.rows)))
        self.steps = max(1, -(-self.length // most))
        self.size = -(-self.length // self.steps)

    def split(self, array: Array) -> Array:
        axis, rest = len(self.rows), array.shape[len(self.rows) + 1 :]
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, self.steps * self.size - self.length)
        array = jnp.pad(array, padding).reshape(*self.rows, self.steps, self.size, *rest)
        return jnp.moveaxis(array, axis, 0).reshape(self.steps, -1, *rest)

    def join(self, array: Array) -> Array:
        axis, rest = len(self.rows), array.shape[2:]
        array = jnp.moveaxis(array.reshape(self.steps, *self.rows, self.size, *rest), 0, axis)
        array = array.reshape(*self.rows, self.steps * self.size, *rest)
        return jax.lax.slice_in_dim(array, 0, self.length, axis=axis)


def _logits(
    hidden: Float[Array, "M D"],
    embedding: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
) -> Float32[Array, "M V"]:
    logits = _product(hidden, embedding, 1, 1)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None, :]
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
