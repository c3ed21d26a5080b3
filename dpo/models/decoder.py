"""A Hugging Face causal language model: one decoder for all families (`layers.py` has its parts).

Layers are stacked along a leading L axis and scanned, each kind's on its own, so compile time does not grow
with depth but with the pattern in which the kinds repeat. Norms,
softmax and logits are float32; the residual stream has the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from dpo.models.attention import (
    NO_WINDOW,
    Implementation,
    attend,
    attend_cached,
    check_implementation,
    visible_in_cache,
)
from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.decoder_config import DecoderConfig
from dpo.models.delta_rule import continued, gated_delta, make_chunks
from dpo.models.layers import Embedding, LayerMaker, stack_layers
from dpo.models.linear import PRODUCT, Rounds
from dpo.models.look_back import find_predecessors, look_back, take_slots
from dpo.models.patterns import Run, find_runs
from dpo.models.precision import precision_of
from dpo.models.rotary import cos_sin
from dpo.models.soft_cap import soft_cap
from dpo.parallel.partition import DATA, FSDP, ONE_DEVICE, ROWS, TENSOR, Partition

Remat = Literal["none", "dots", "full"]


class Cache(NamedTuple):
    """What layers keep of decoded positions; slot s holds position s of its row."""

    keys: Float[Array, "L R G C S"]
    values: Float[Array, "L R G S C"]
    convolved: Float[Array, "N R W D"] | None = None
    """What convolutions read of each row's last positions, where there are such layers."""
    states: Float32[Array, "N R H 1 K V"] | None = None
    """What the delta rule keeps of each row's positions, where there are such layers."""


class Decoder(nnx.Module):
    """Token ids to hidden states. Attribute names are Hugging Face's; linear kernels are [in, out]."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = "full",
        attention: Implementation = "auto",
        partition: Partition = ONE_DEVICE,
    ):
        self.config = config
        self.partition = partition
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat: Remat = remat
        self.scan_unroll = 1
        """Layers, or patterns of them, that a pass of the loop over layers holds."""
        self.rounds: Rounds = "both" if self.compute_dtype == jnp.bfloat16 else "neither"
        """Of linears; the output projection then rounds in the backward pass alone."""
        check_implementation(
            attention,
            partition=partition,
            dtype=self.compute_dtype,
            softcap=config.attention_softcap,
            has_key_bias=config.alibi is not None,
        )
        self.attention: Implementation = attention
        make = LayerMaker(config, rngs, self.compute_dtype, jnp.dtype(param_dtype))
        self.embed_tokens = make.embedding(config.vocab_size)
        if config.position == "learned":
            self.embed_positions = make.embedding(config.max_positions + config.position_offset)
        if config.embedding_norm:
            self.embed_norm = make.norm(config.hidden_size)
        self.layers = stack_layers(make)
        self.norm = make.norm(config.hidden_size)
        if not config.tie_embeddings:
            self.lm_head = make.embedding(config.vocab_size)

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits."""
        return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).embedding[...]

    def hidden(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        group: Int[Array, "R T"],
        branch: Int[Array, "R T"],
    ) -> Float[Array, "R T D"]:
        """Final-normed hidden states of packed rows; logits are `hidden @ output_embedding.T`."""
        layout = {"positions": positions, "group": group, "branch": branch}
        key_bias = self._key_bias(positions)
        ropes, grow = self._ropes(positions, group), self._query_growth(positions)
        cores = self._cores(group, branch)

        def block(kind: str, graphdef: nnx.GraphDef) -> Callable:
            def apply(h: Array, layer: _Layer) -> Array:
                core = partial(self._attend, **layout, grow=grow, key_bias=key_bias, window=layer.window)
                core = cores.get(kind, core)
                h = nnx.merge(graphdef, layer.state)(h, ropes(layer.rope), core)[0]
                return self.partition.constrain(h, ROWS)

            return _rematerialised(apply, self.remat)

        return self._final(self._through_layers(block, self._embed(tokens, positions)))

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Float32 logits with the family's soft-capping; for few positions, [..., V] is large."""
        embedding = self.output_embedding.astype(hidden.dtype)
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden,
            embedding,
            precision=precision_of(hidden, embedding),
            preferred_element_type=jnp.float32,
        )
        cap = self.config.logit_softcap
        return logits if cap is None else soft_cap(logits, cap)

    def init_cache(self, rows: int, length: int) -> Cache:
        """An empty cache for positions below `length`."""
        config = self.config
        stack = (len(config.layers_of("attention")), rows, config.num_kv_heads)
        keys = jnp.zeros((*stack, config.head_dim, length), self.compute_dtype)
        values = jnp.zeros((*stack, length, config.head_dim), self.compute_dtype)
        cache = Cache(*(self.partition.constrain(x, None, ROWS, TENSOR) for x in (keys, values)))
        if config.is_uniform:
            return cache
        others, delta = config.num_layers - stack[0], config.delta
        shape = (others, rows, config.convolution_width - 1, config.convolved_channels)
        cache = cache._replace(
            convolved=self.partition.constrain(jnp.zeros(shape, self.compute_dtype), None, ROWS)
        )
        if delta is None:
            return cache
        shape = (others, rows, delta.num_value_heads, 1, delta.key_dim, delta.value_dim)
        return cache._replace(states=jnp.zeros(shape))

    def decode(
        self,
        tokens: Int[Array, "R S"],
        positions: Int[Array, "R S"],
        cache: Cache,
        group: Int[Array, "R S"] | None = None,
    ) -> tuple[Float[Array, "R S D"], Cache]:
        """Hidden states of further tokens of each row, which see the cached positions up to their own.

        Positions are consecutive in a row, so prompts are padded on the right and decoding starts at each
        row's own length. `group` is 0 at padding: rope scaling by length does not count it, and what
        recurrent layers keep leaves it out.
        """
        group = jnp.ones_like(positions) if group is None else group
        ropes = self._ropes(positions, group)
        grow = self._query_growth(positions)
        rows = jnp.arange(tokens.shape[0])[:, None]
        slots = jnp.arange(cache.values.shape[3])[None, :]
        key_bias = self._key_bias(jnp.broadcast_to(slots, (tokens.shape[0], slots.shape[1])))

        def attention(cache: Cache, layer: _Layer, q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
            keys = cache.keys.at[layer.index, rows, :, :, positions].set(k.astype(cache.keys.dtype))
            values = cache.values.at[layer.index, rows, :, positions].set(v.astype(cache.values.dtype))
            mask = visible_in_cache(positions, keys.shape[-1], layer.window)
            at = (keys[layer.index], values[layer.index])
            out = attend_cached(grow(q), *at, mask, key_bias=key_bias, **self._scoring)
            return out, cache._replace(keys=keys, values=values)

        def convolution(cache: Cache, layer: _Layer, u: Array) -> tuple[list[Array], Cache]:
            assert cache.convolved is not None
            before, last = look_back(cache.convolved[layer.index], u, group)
            return before, cache._replace(convolved=cache.convolved.at[layer.index].set(last))

        def delta(cache: Cache, layer: _Layer, u: Array) -> tuple[list[Array], Callable]:
            before, cache = convolution(cache, layer, u)

            def run(*given: Array) -> tuple[Array, Cache]:
                assert cache.states is not None
                read, states = gated_delta(*given, chunks=chunks, states=cache.states[layer.index])
                return read, cache._replace(states=cache.states.at[layer.index].set(states))

            return before, run

        chunks = continued(group)
        cores = {"attention": attention, "convolution": convolution, "delta": delta}

        def block(kind: str, graphdef: nnx.GraphDef) -> Callable:
            def apply(carry: tuple[Array, Cache], layer: _Layer) -> tuple[Array, Cache]:
                h, cache = carry
                core = partial(cores[kind], cache, layer)
                return nnx.merge(graphdef, layer.state)(h, ropes(layer.rope), core)

            return apply

        h, cache = self._through_layers(block, (self._embed(tokens, positions), cache))
        return self._final(h), cache

    def _through_layers(self, block: Callable[[str, nnx.GraphDef], Callable], carry: Any) -> Any:
        """`block(kind, graphdef)(carry, layer)` of all layers in order: a scan for each run of a pattern."""
        uniform = self.config.is_uniform
        stacks = {
            kind: nnx.split(self.layers if uniform else getattr(self.layers, kind))
            for kind in dict.fromkeys(self.config.layer_kinds)
        }
        for run in find_runs(self.config.layer_kinds):
            blocks = [block(kind, stacks[kind][0]) for kind in run.pattern]

            def body(carry: Any, layers: tuple[_Layer, ...], blocks: list[Callable] = blocks) -> Any:
                for apply, layer in zip(blocks, layers, strict=True):
                    carry = apply(carry, layer)
                return carry, None

            layers = tuple(
                self._layers(run, place, stacks[kind][1]) for place, kind in enumerate(run.pattern)
            )
            carry, _ = jax.lax.scan(body, carry, layers, unroll=self.scan_unroll)
        return carry

    def _cores(self, group: Int[Array, "R T"], branch: Int[Array, "R T"]) -> dict[str, Callable]:
        """What layers read of the positions before them within packed rows, by kind; attention aside."""
        if self.config.is_uniform:
            return {}
        slots = find_predecessors(group, branch, self.config.convolution_width - 1)

        def before(u: Array) -> list[Array]:
            return [take_slots(u, each) for each in slots]

        if self.config.delta is None:
            return {"convolution": lambda u: (before(u), None)}
        chunks, delta = make_chunks(group, branch), self.config.delta
        shape = (group.shape[0], delta.num_value_heads, 2, delta.key_dim, delta.value_dim)

        def run(*given: Array) -> tuple[Array, None]:
            return gated_delta(*given, chunks=chunks, states=jnp.zeros(shape))[0], None

        return {"delta": lambda u: (before(u), run)}

    @property
    def _scoring(self) -> dict[str, Any]:
        return {"scale": self.config.attention_scale, "softcap": self.config.attention_softcap}

    def _key_bias(self, positions: Int[Array, "R S"]) -> Float[Array, "R S H"] | None:
        alibi = self.config.alibi
        if alibi is None:
            return None
        dtype = jnp.bfloat16 if alibi.bfloat16 else jnp.float32
        bias = positions.astype(dtype)[:, :, None] * jnp.asarray(alibi.slopes, dtype)[None, None, :]
        return bias.astype(jnp.float32) * alibi.scale

    def _query_growth(self, positions: Int[Array, "R T"]) -> Callable[[Array], Array]:
        """What queries at these positions are multiplied by, as a function of them."""
        growth = self.config.query_growth
        if growth is None:
            return lambda q: q
        times = 1 + growth.beta * jnp.log1p((positions // growth.length).astype(jnp.float32))
        return lambda q: q * times[:, :, None, None].astype(q.dtype)

    def _attend(
        self, q: Array, k: Array, v: Array, *, grow: Callable[[Array], Array], **layout: Any
    ) -> tuple[Array, None]:
        how = {"implementation": self.attention, "partition": self.partition}
        return attend(grow(q), k, v, **layout, **self._scoring, **how), None

    def _embed(self, tokens: Int[Array, "R T"], positions: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        h = self._look_up(self.embed_tokens, tokens)
        h = h * jnp.asarray(self.config.embedding_scale, self.compute_dtype)
        if self.config.position == "learned":
            h = h + self._look_up(self.embed_positions, positions + self.config.position_offset)
        return self.embed_norm(h) if self.config.embedding_norm else h

    def _look_up(self, table: Embedding, index: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        """On a mesh every device looks up its columns for the rows of its whole `fsdp` group, and then
        columns are exchanged for rows: the table itself is never gathered.
        """
        index = self.partition.constrain(index, DATA)
        columns = self.partition.constrain(table(index), DATA, None, FSDP)
        return self.partition.constrain(columns, ROWS)

    def _final(self, h: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.norm(h) * jnp.asarray(self.config.logit_scale, self.compute_dtype)

    def _ropes(self, positions: Array, group: Array) -> Callable[[Array | None], tuple[Array, Array] | None]:
        """Cosines and sines of every kind, computed once and picked by each layer."""
        tables = [cos_sin(rope, positions, group) for rope in self.config.ropes]
        if len(tables) < 2:
            return lambda _: tables[0] if tables else None
        cos, sin = (jnp.stack(part) for part in zip(*tables, strict=True))
        return lambda kind: (cos[kind], sin[kind])

    def _layers(self, run: Run, place: int, stack: nnx.State) -> _Layer:
        """The layers at one place of a run's pattern, from the stack of their kind."""
        config, period = self.config, len(run.pattern)
        numbers = slice(run.start + place, run.end, period)
        of_kind = config.layers_of(run.pattern[place])
        first, step = of_kind.index(numbers.start), run.pattern.count(run.pattern[place])
        index = np.arange(len(of_kind))[first:][: step * run.repeats : step]
        if len(index) < len(of_kind):
            stack = jax.tree.map(lambda leaf: leaf[first:][: step * run.repeats : step], stack)
        windowed = min(config.windows) < NO_WINDOW
        return _Layer(
            state=stack,
            index=jnp.arange(len(of_kind)) if len(index) == len(of_kind) else jnp.asarray(index),
            window=jnp.asarray(config.windows[numbers], jnp.int32) if windowed else None,
            rope=jnp.asarray(config.layer_rope[numbers], jnp.int32) if len(config.ropes) > 1 else None,
        )


class _Layer(NamedTuple):
    """What the scan hands to one layer."""

    state: nnx.State
    index: Int[Array, "*n"]
    window: Int[Array, "*n"] | None
    rope: Int[Array, "*n"] | None


def _rematerialised(block: Callable, remat: Remat) -> Callable:
    """`full` keeps a layer's input and its attention's output, `dots` also the outputs of the projections.

    Attention's probabilities are kept by neither.
    """
    if remat == "none":
        return block
    names = SAVED_NAMES if remat == "full" else (*SAVED_NAMES, PRODUCT)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    if remat == "dots":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = jax.checkpoint_policies.save_from_both_policies(dots, policy)
    return jax.checkpoint(block, policy=policy, prevent_cse=False)
