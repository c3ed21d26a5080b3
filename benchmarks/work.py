"""The work of a step, counted, and the rate at which this machine multiplies matrices, measured."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dpo.data.batch import Batch
from dpo.data.tokenized import TokenizedDataset
from dpo.models.attention import visible
from dpo.models.decoder_config import DecoderConfig


class Work(NamedTuple):
    """Floating-point operations that one forward pass over a batch must do; padding is not among them."""

    body: float
    attention: float
    output: float

    @property
    def forward(self) -> float:
        return self.body + self.attention + self.output

    @property
    def training(self) -> float:
        """A product's derivative is two products. What is computed again to save memory does not count."""
        return 3 * self.forward

    @property
    def adapter_training(self) -> float:
        """Of a frozen weight's product the derivative is one product; what adapters add is left out."""
        return 2 * (self.body + self.output) + 3 * self.attention


def count_work(config: DecoderConfig, batch: Batch) -> Work:
    """Two operations a multiplication, real tokens, visible (query, key) pairs and scored tokens only."""
    D, H, G, C = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    products = 3 if config.gated_mlp else 2
    attending, convolving = len(config.layers_of("attention")), len(config.layers_of("convolution"))
    mixing = attending * (2 * D * H * C + 2 * D * G * C) + convolving * 4 * D * D
    kernels = mixing + config.num_layers * products * D * config.intermediate_size
    real = int((np.asarray(batch.group) != 0).sum())
    pairs = int(visible(*(jnp.asarray(x) for x in (batch.positions, batch.group, batch.branch))).sum())
    scored = int(np.asarray(batch.lengths).sum())
    return Work(
        body=2.0 * kernels * real,
        attention=4.0 * H * C * attending * pairs,
        output=2.0 * config.vocab_size * D * scored,
    )


def pair_tokens(dataset: TokenizedDataset, rows: Int[np.ndarray, " n"]) -> int:
    """Tokens of chosen and rejected sequences, the prompt in both, a ranking expanded to all its pairs.

    The measure of work done that does not depend on how it is laid out: what a pairwise trainer must read.
    """
    prompts, responses = dataset.prompt_lengths, dataset.response_lengths
    total = 0
    for row in rows:
        better = _better(np.asarray(dataset.ranks[dataset.row_offsets[row] : dataset.row_offsets[row + 1]]))
        lengths = prompts[row] + responses[row][: len(better)]
        total += int((better * (lengths[:, None] + lengths[None, :])).sum())
    return total


def num_pairs(dataset: TokenizedDataset, rows: Int[np.ndarray, " n"]) -> int:
    """Ordered pairs of different rank."""
    offsets = dataset.row_offsets
    return sum(int(_better(np.asarray(dataset.ranks[offsets[r] : offsets[r + 1]])).sum()) for r in rows)


def matmul_rate(
    config: DecoderConfig, positions: int, *, dtype: Any = jnp.float32, seconds: float = 2.0
) -> float:
    """Best FLOP/s of plain 2-D products at the model's own shapes, on one device."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = [(positions, D, F), (positions, F, D), (positions, D, D), (512, D, V)]
    return max(_rate(shape, dtype, seconds / len(shapes)) for shape in shapes)


def _rate(shape: tuple[int, int, int], dtype: Any, seconds: float) -> float:
    M, K, N = shape
    left = jax.random.normal(jax.random.key(0), (M, K)).astype(dtype)
    right = jax.random.normal(jax.random.key(1), (K, N)).astype(dtype)
    repeats = max(1, round(2e10 / (2 * M * K * N)))

    @jax.jit
    def multiply(left: Array, right: Array) -> Array:
        # Each product's operand depends on the one before, so that none can be left out.
        def one(_: int, total: Array) -> Array:
            return (left + total[0, 0].astype(left.dtype) * 0) @ right

        return jax.lax.fori_loop(0, repeats, one, jnp.zeros((M, N), dtype))

    multiply(left, right).block_until_ready()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        multiply(left, right).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return repeats * 2.0 * M * K * N / best


def _better(ranks: Int[np.ndarray, " K"]) -> Bool[np.ndarray, "K K"]:
    return ranks[:, None] < ranks[None, :]
