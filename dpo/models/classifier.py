"""Sequence classifiers, reward models among them: a decoder with a linear head at a sequence's last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dpo.models.attention import Implementation
from dpo.models.decoder import Decoder, Remat
from dpo.models.decoder_config import DecoderConfig
from dpo.models.linear import Linear
from dpo.models.sampling import LENGTH_MULTIPLE
from dpo.outcomes import UserError


class SequenceClassifier(Decoder):
    """`score(hidden)` of one position a row; the head is float32, and there is no output projection."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_labels: int,
        pad_token_id: int | None,
        rngs: nnx.Rngs,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = "full",
        attention: Implementation = "auto",
    ):
        super().__init__(
            replace(config, tie_embeddings=True),
            rngs=rngs,
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            remat=remat,
            attention=attention,
        )
        self.pad_token_id = pad_token_id
        self.score = Linear(
            config.hidden_size,
            num_labels,
            use_bias=False,
            dtype=jnp.dtype(jnp.float32),
            param_dtype=jnp.dtype(param_dtype),
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        group: Int[Array, "R T"],
        branch: Int[Array, "R T"],
        pooled: Int[Array, " R"],
    ) -> Float[Array, "R labels"]:
        """Logits of every row, read at its position `pooled`."""
        hidden = self.hidden(tokens, positions, group, branch)
        hidden = jnp.take_along_axis(hidden, pooled[:, None, None], axis=1)[:, 0]
        return self.score(hidden.astype(jnp.float32))


def classify(
    model: SequenceClassifier,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> Iterator[tuple[int, Float[np.ndarray, " labels"]]]:
    """Logits of every sequence, with its index, batch by batch; sequences of similar length go together.

    Raises:
      ValueError: for a sequence without tokens, with a token that the model does not know, or longer than
        its learned positions.
    """
    _check_sequences(model, sequences)
    graphdef, params = nnx.split(model)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _make_batch([sequences[i] for i in rows], model.pad_token_id, batch_size)
        logits = np.asarray(_run(graphdef, params, *batch))
        yield from ((i, logits[row]) for row, i in enumerate(rows))


def pooled_position(sequence: Sequence[int], pad_token_id: int | None) -> int:
    """Where transformers reads a sequence's scores: the last token that is not the padding token.

    Where padding and end token are the same, that is the token before the end. Without a padding token it is
    the last token.
    """
    if pad_token_id is None:
        return len(sequence) - 1
    return max((i for i, token in enumerate(sequence) if token != pad_token_id), default=0)


@partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, params: nnx.State, *batch: Array) -> Float[Array, "R labels"]:
    return nnx.merge(graphdef, params)(*batch)


def _make_batch(
    sequences: Sequence[Sequence[int]], pad_token_id: int | None, batch_size: int
) -> tuple[Array, ...]:
    """One sequence a row: a power of two of rows, and lengths that are multiples, keep compilations few."""
    num_rows = min(batch_size, 1 << (len(sequences) - 1).bit_length())
    longest = max(map(len, sequences))
    tokens = np.zeros((num_rows, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE), np.int32)
    group, pooled = np.zeros_like(tokens), np.zeros(num_rows, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        group[row, : len(sequence)] = 1
        pooled[row] = pooled_position(sequence, pad_token_id)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None, :], tokens.shape)
    return tuple(map(jnp.asarray, (tokens, positions, group, np.zeros_like(tokens), pooled)))


def _check_sequences(model: SequenceClassifier, sequences: Sequence[Sequence[int]]) -> None:
    empty = [i for i, sequence in enumerate(sequences) if len(sequence) == 0]
    if empty:
        raise UserError(f"sequences {empty} have no tokens; at least one is needed")
    largest = max((max(sequence) for sequence in sequences), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"a sequence has token {largest}; the model knows {model.config.vocab_size} from 0: its "
            "tokenizer has tokens that it was not resized for"
        )
    longest = max((len(sequence) for sequence in sequences), default=0)
    if model.config.position == "learned" and longest > model.config.max_positions:
        raise UserError(
            f"the longest sequence has {longest} tokens; the model has {model.config.max_positions} positions"
        )
