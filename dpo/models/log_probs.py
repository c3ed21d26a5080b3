"""Per-token log-probabilities from hidden states, a chunk of tokens at a time; owns the output projection.

Only scored positions come here, and `[tokens, vocabulary]` never exists: a chunk's logits are made, reduced
and dropped. The derivative is written by hand so that the backward pass does the same, from the saved
log-normaliser: with p = softmax(logits), ∂ log p[target] / ∂ logits = onehot(target) − p. A gradient that
nobody asks for (the embedding's, under adapters) is not computed.

Chunks run along N. On a mesh the vocabulary is split and hidden states travel, which are small: `Shard` says
how. A flat list of tokens is the same thing without the row axis. The matrix is rounded to the hidden states'
dtype, once for all chunks, so that bfloat16 is multiplied with bfloat16; sums, logits, normalisers and
results are float32 whatever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Float32, Int

from dpo.models.precision import precision_of
from dpo.models.products import rounded_sum
from dpo.models.soft_cap import soft_cap
from dpo.models.vocabulary_split import Arrays, Shard
from dpo.outcomes import UserError
from dpo.parallel.partition import DATA, ONE_DEVICE, ROWS, VOCABULARY, Partition


def token_log_probs(
    hidden: Float[Array, "*R N D"],
    embedding: Float[Array, "V D"],
    target: Int[Array, "*R N"],
    *,
    chunk: int,
    softcap: float | None = None,
    bias: Float[Array, " V"] | None = None,
    keep_logits: bool | None = None,
    rounds_backward: bool = False,
    partition: Partition = ONE_DEVICE,
) -> Float32[Array, "*R N"]:
    """log p(target) at each position, differentiable in `hidden`, `embedding` and `bias`.

    `chunk` bounds how many positions of a device meet the vocabulary at a time, all its rows together.
    `keep_logits` saves the logits for the backward pass (positions x V floats) instead of making them again:
    a quarter fewer products. When not given they are kept where all positions of a device are one chunk,
    which holds them all anyway.
    `rounds_backward` rounds operands of the backward pass's products to bfloat16 (dpo/models/products.py).
    """
    if keep_logits is None:
        keep_logits = _Chunks(hidden.shape[:-1], chunk * partition.size(ROWS)).steps == 1
    arrays = {"hidden": hidden, "embedding": embedding, "target": target}
    arrays |= {} if bias is None else {"bias": bias}
    return _token_log_probs(_Settings(chunk, softcap, keep_logits, rounds_backward), partition, arrays)


def reduce_logits(
    reduce: Callable[[Float32[Array, "M V"]], Float32[Array, " M"]],
    hidden: Float[Array, "*R N D"],
    embedding: Float[Array, "V D"],
    *,
    chunk: int,
    softcap: float | None = None,
    bias: Float[Array, " V"] | None = None,
    partition: Partition = ONE_DEVICE,
) -> Float32[Array, "*R N"]:
    """`reduce` applied to every position's logits, chunk by chunk. Carries no gradient."""
    hidden, embedding, bias = jax.lax.stop_gradient((hidden, embedding, bias))
    embedding = partition.constrain(embedding.astype(hidden.dtype), VOCABULARY)
    chunks = _Chunks(hidden.shape[:-1], chunk * partition.size(ROWS))

    def reduce_chunk(hidden: Array) -> Array:
        logits = _logits(partition.constrain(hidden, DATA), embedding, bias, softcap)
        return reduce(partition.constrain(logits, DATA, VOCABULARY))

    return chunks.join(jax.lax.map(reduce_chunk, chunks.split(hidden)))


class _Settings(NamedTuple):
    """What the derivative does not see."""

    chunk: int
    softcap: float | None
    keep_logits: bool
    rounds_backward: bool


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("names",))
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for; known while tracing."""

    names: tuple[str, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_log_probs(settings: _Settings, partition: Partition, arrays: Arrays) -> Array:
    return _compute(settings._replace(keep_logits=False), partition, arrays)[0]


def _forward(settings: _Settings, partition: Partition, arrays: dict[str, Any]) -> tuple[Array, tuple]:
    """Every array comes as its value, and whether it is differentiated."""
    wanted = _Wanted(tuple(name for name, array in arrays.items() if array.perturbed))
    log_probs, saved = _compute(settings, partition, custom_vjp_primal_tree_values(arrays))
    return log_probs, (wanted, *saved)


def _compute(settings: _Settings, partition: Partition, arrays: Arrays) -> tuple[Array, tuple]:
    shard = Shard(partition, arrays)
    names = ("log_probs", "normaliser", *(("logits",) if settings.keep_logits else ()))
    results = shard.map(partial(_forward_local, settings, shard), _as_multiplied(arrays), names)
    return results["log_probs"], (arrays, {name: results[name] for name in names[1:]})


def _as_multiplied(arrays: Arrays) -> Arrays:
    """The matrix in the hidden states' dtype: products of two dtypes are made in the wider one."""
    return arrays | {"embedding": arrays["embedding"].astype(arrays["hidden"].dtype)}


def _forward_local(settings: _Settings, shard: Shard, arrays: Arrays) -> Arrays:
    """Log-probs and normalisers of a device's own positions; the logits, if they are to be kept."""
    embedding, bias = arrays["embedding"], arrays.get("bias")
    chunks = _Chunks(arrays["target"].shape, settings.chunk)
    first, size = shard.first_column(len(embedding)), len(embedding)

    def one_chunk(_, inputs):
        hidden, target = (shard.gather(x) for x in inputs)
        logits = shard.hide_padding(_logits(hidden, embedding, bias, settings.softcap))
        maximum = shard.max_over_vocabulary(logits.max(axis=-1))
        total = shard.own_sum(jnp.exp(logits - maximum[:, None]).sum(axis=-1))
        normaliser = shard.own(maximum) + jnp.log(total)
        place = target - first
        picked = jnp.take_along_axis(logits, place.clip(0, size - 1)[:, None], axis=-1)[:, 0]
        here = (place >= 0) & (place < shard.num_columns(size))
        log_probs = shard.own_sum(jnp.where(here, picked, 0)) - normaliser
        results = {"log_probs": log_probs, "normaliser": normaliser}
        return None, results | ({"logits": logits} if settings.keep_logits else {})

    inputs = (chunks.split(arrays["hidden"]), chunks.split(arrays["target"]))
    results = jax.lax.scan(one_chunk, None, inputs)[1]
    return results | {"log_probs": chunks.join(results["log_probs"])}


def _backward(settings: _Settings, partition: Partition, saved: tuple, cotangent: Array) -> tuple:
    wanted, arrays, kept = saved
    shard = Shard(partition, arrays)
    local = partial(_backward_local, settings, shard, wanted.names)
    inputs = _as_multiplied(arrays) | kept | {"cotangent": cotangent}
    gradients = shard.map(local, inputs, wanted.names)
    known = {name: gradients[name].astype(arrays[name].dtype) for name in wanted.names}
    return ({name: known.get(name) for name in arrays},)


def _backward_local(settings: _Settings, shard: Shard, names: Sequence[str], arrays: Arrays) -> Arrays:
    """Gradients of a device's own hidden states and of its part of the vocabulary, as far as asked for."""
    embedding, bias = arrays["embedding"], arrays.get("bias")
    chunks = _Chunks(arrays["target"].shape, settings.chunk)
    columns = shard.first_column(len(embedding)) + jnp.arange(len(embedding))
    dtype = jnp.bfloat16 if settings.rounds_backward else embedding.dtype
    rounded = embedding.astype(dtype)

    def one_chunk(gradients, inputs):
        *own, logits = inputs
        hidden, target, cotangent, normaliser = (shard.gather(x) for x in own)
        if logits is None:
            logits = _logits(hidden, embedding, bias, settings.softcap)
        picked = target[:, None] == columns[None, :]
        slope = cotangent[:, None] * (picked - jnp.exp(logits - normaliser[:, None]))
        if settings.softcap is not None:
            slope = slope * (1 - jnp.square(logits / settings.softcap))
        slope = shard.hide_padding(slope, 0.0)
        if "bias" in names:
            gradients |= {"bias": gradients["bias"] + slope.sum(axis=0)}
        slope = slope.astype(dtype)
        if "embedding" in names:
            rounds = settings.rounds_backward
            found = rounded_sum(slope, hidden) if rounds else _product(slope, hidden, 0, 0)
            gradients |= {"embedding": gradients["embedding"] + found}
        if "hidden" not in names:
            return gradients, None
        by_hidden = shard.own_sum(_product(slope, rounded, 1, 0))
        return gradients, by_hidden.astype(hidden.dtype)

    zeros = {
        name: jnp.zeros(arrays[name].shape, jnp.float32) for name in ("embedding", "bias") if name in names
    }
    own = (chunks.split(arrays[name]) for name in ("hidden", "target", "cotangent"))
    inputs = (*own, arrays["normaliser"], arrays.get("logits"))
    gradients, by_hidden = jax.lax.scan(one_chunk, zeros, inputs)
    gradients = {name: shard.sum_over_data(x) for name, x in gradients.items()}
    return gradients | ({} if by_hidden is None else {"hidden": chunks.join(by_hidden)})


_token_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)


class _Chunks:
    """Cuts [R N ...] into [steps, R * n, ...] and back; R * n ≤ chunk, but at least one position of each row.

    Flat, because XLA's CPU backend sums a product over two axes by writing its operands out transposed.
    """

    def __init__(self, shape: tuple[int, ...], chunk: int):
        if chunk < 1:
            raise UserError(f"chunk is {chunk}; allowed is at least 1 position")
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
    return logits if softcap is None else soft_cap(logits, softcap)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(
        left, right, axes, precision=precision_of(left, right), preferred_element_type=jnp.float32
    )
