"""Sampling responses: prefill, then one token a step for a batch of rows, until all have ended.

But for rounding a row's tokens do not depend on the rows beside it: the token at position t of a row is drawn
with the key fold_in(key(seed), t), and rows never see one another. Prompts are padded on the right and each
row decodes at its own positions, so different lengths share a batch. Shapes are rounded up to keep
compilations few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int, UInt

from dpo.models.cache import Cache
from dpo.models.decoder import Decoder
from dpo.models.drawing import SamplingConfig, penalise, sample
from dpo.outcomes import UserError
from dpo.parallel.distributed import fetch

LENGTH_MULTIPLE = 32
"""Prompts and numbers of new tokens are padded to multiples of it."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    stop_tokens: Sequence[int],
    batch_size: int = 64,
) -> list[list[int]]:
    """One response for each prompt and its seed, the stop token included where one was drawn.

    Prompts of similar length are decoded together, `batch_size` at a time. Of several processes whose
    devices share the model all call this alike.
    """
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds; one seed for each prompt is needed")
    _check_prompts(model, prompts, sampling.max_new_tokens)
    graphdef, params = nnx.split(model)
    rules = replace(sampling, max_new_tokens=_round_up(sampling.max_new_tokens))
    responses: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _make_batch([prompts[i] for i in rows], [seeds[i] for i in rows], batch_size)
        limit = jnp.asarray(sampling.max_new_tokens, jnp.int32)
        batch, limit = jax.device_get(
            (batch, limit)
        )  # what lies on one device does not mix with what is on all
        state = _run(graphdef, rules, tuple(stop_tokens), params, batch, limit)
        output, count = fetch(state.output), fetch(state.count)
        for row, i in enumerate(rows):
            responses[i] = output[row, : count[row]].tolist()
    return responses


def lower_generation(
    model: Decoder, *, rows: int, longest_prompt: int, sampling: SamplingConfig, stop_tokens: Sequence[int]
) -> Lowered:
    """The program that `generate` runs for `rows` prompts of which the longest has so many tokens."""
    graphdef, params = nnx.split(model)
    rules = replace(sampling, max_new_tokens=_round_up(sampling.max_new_tokens))
    batch = _make_batch([[0] * longest_prompt] * rows, [0] * rows, rows)
    limit = jnp.asarray(sampling.max_new_tokens, jnp.int32)
    return _run.lower(graphdef, rules, tuple(stop_tokens), params, *jax.device_get((batch, limit)))


def stream(
    model: Decoder, prompt: Sequence[int], *, sampling: SamplingConfig, seed: int, stop_tokens: Sequence[int]
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is drawn."""
    _check_prompts(model, [prompt], sampling.max_new_tokens)
    graphdef, params = nnx.split(model)
    batch = _make_batch([prompt], [seed], 1)
    rules = replace(sampling, max_new_tokens=_round_up(sampling.max_new_tokens))
    static = (graphdef, rules, tuple(stop_tokens))
    state = _prefill(*static, params, batch)
    for _ in range(sampling.max_new_tokens):
        yield int(state.token[0])
        if state.done[0]:
            return
        state = _step(*static, params, batch, state)


class _Batch(NamedTuple):
    tokens: Int[Array, "R T"]
    lengths: Int[Array, " R"]
    """0 is a row of padding."""
    seeds: UInt[Array, " R"]


class _State(NamedTuple):
    """After n steps, n + 1 tokens of each row are drawn."""

    cache: Cache
    seen: Bool[Array, "R V"] | None
    token: Int[Array, " R"]
    position: Int[Array, " R"]
    """Where `token` stands."""
    done: Bool[Array, " R"]
    output: Int[Array, "R N"]
    count: Int[Array, " R"]
    """Tokens of each row's response so far."""
    step: Int[Array, ""]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    graphdef: nnx.GraphDef,
    sampling: SamplingConfig,
    stop_tokens: tuple[int, ...],
    params: nnx.State,
    batch: _Batch,
    limit: Int[Array, ""],
) -> _State:
    static = (graphdef, sampling, stop_tokens)
    state = jax.lax.while_loop(
        lambda state: (state.step + 1 < limit) & ~state.done.all(),
        lambda state: _step(*static, params, batch, state),
        _prefill(*static, params, batch),
    )
    return state._replace(cache=Cache(jnp.zeros((0,) * 5), jnp.zeros((0,) * 5)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graphdef: nnx.GraphDef,
    sampling: SamplingConfig,
    stop_tokens: tuple[int, ...],
    params: nnx.State,
    batch: _Batch,
) -> _State:
    """Run the prompts and draw every row's first token."""
    model = nnx.merge(graphdef, params)
    R, T = batch.tokens.shape
    slots = jnp.broadcast_to(jnp.arange(T)[None, :], (R, T))
    cache = model.init_cache(R, T + sampling.max_new_tokens)
    in_prompt = (slots < batch.lengths[:, None]).astype(jnp.int32)
    hidden, cache = model.decode(batch.tokens, slots, cache, in_prompt)
    last = jnp.take_along_axis(hidden, jnp.maximum(batch.lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    seen = None
    if sampling.repetition_penalty != 1:
        seen = jnp.zeros((R, model.config.vocab_size), bool)
        seen = seen.at[jnp.arange(R)[:, None], batch.tokens].max(slots < batch.lengths[:, None])
    state = _State(
        cache=cache,
        seen=seen,
        token=jnp.zeros(R, jnp.int32),
        position=batch.lengths - 1,
        done=batch.lengths == 0,
        output=jnp.zeros((R, sampling.max_new_tokens), jnp.int32),
        count=jnp.zeros(R, jnp.int32),
        step=jnp.asarray(-1, jnp.int32),
    )
    return _draw(model.logits(last), state, batch.seeds, sampling, stop_tokens)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,))
def _step(
    graphdef: nnx.GraphDef,
    sampling: SamplingConfig,
    stop_tokens: tuple[int, ...],
    params: nnx.State,
    batch: _Batch,
    state: _State,
) -> _State:
    """Run every row's newest token and draw the next."""
    model = nnx.merge(graphdef, params)
    hidden, cache = model.decode(state.token[:, None], state.position[:, None], state.cache)
    state = state._replace(cache=cache)
    return _draw(model.logits(hidden[:, 0]), state, batch.seeds, sampling, stop_tokens)


def _draw(
    logits: Float[Array, "R V"],
    state: _State,
    seeds: UInt[Array, " R"],
    sampling: SamplingConfig,
    stop_tokens: tuple[int, ...],
) -> _State:
    """Draw the token after `state.token` and record it."""
    position, step = state.position + 1, state.step + 1
    token = sample(penalise(logits, state.seen, sampling), position, seeds, sampling)
    rows = jnp.arange(token.shape[0])
    stop = (token[:, None] == jnp.asarray(stop_tokens, jnp.int32)[None, :]).any(axis=1)
    return state._replace(
        seen=None if state.seen is None else state.seen.at[rows, token].set(True),
        token=token,
        position=position,
        done=state.done | stop,
        output=state.output.at[:, step].set(jnp.where(state.done, 0, token)),
        count=state.count + ~state.done,
        step=step,
    )


def _make_batch(prompts: Sequence[Sequence[int]], seeds: Sequence[int], batch_size: int) -> _Batch:
    """Pad rows to a power of two (at most `batch_size`) and prompts to a multiple of `LENGTH_MULTIPLE`."""
    num_rows = min(batch_size, 1 << (len(prompts) - 1).bit_length())
    tokens = np.zeros((num_rows, _round_up(max(map(len, prompts)))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    padding = (0, num_rows - len(prompts))
    lengths = np.pad(np.asarray([len(prompt) for prompt in prompts], np.int32), padding)
    return _Batch(*map(jnp.asarray, (tokens, lengths, np.pad(np.asarray(seeds, np.uint32), padding))))


def _check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise UserError(f"prompts {empty} have no tokens; at least one is needed")
    largest = max((max(prompt) for prompt in prompts), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"a prompt has token {largest}; the model knows {model.config.vocab_size} from 0: its tokenizer "
            "has tokens that it was not resized for"
        )
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    if model.config.position == "learned" and longest > model.config.max_positions:
        raise UserError(
            f"the longest prompt and {max_new_tokens} new tokens need {longest} positions; the model has "
            f"{model.config.max_positions}"
        )


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
