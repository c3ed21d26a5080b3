"""A Hugging Face causal language model: one decoder for all families (`layers.py` has its parts).

Layers are stacked along a leading L axis and scanned, each kind's on its own, so compile time does not grow
with depth but with the pattern in which the kinds repeat. Norms,
softmax and logits are float32; the residual stream has the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpo.models.attention import (
    Implementation,
    attend,
    attend_cached,
    check_implementation,
    visible_in_cache,
)
from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.cache import Cache, empty_cache
from dpo.models.decoder_config import DecoderConfig, split_kind
from dpo.models.delta_rule import continued, gated_delta, make_chunks
from dpo.models.layers import stack_layers
from dpo.models.linear import PRODUCT, Rounds
from dpo.models.look_back import find_predecessors, look_back, take_slots
from dpo.models.parts import Embedding, LayerMaker
from dpo.models.patterns import Layer, through_layers
from dpo.models.per_layer import PerLayerInputs
from dpo.models.precision import precision_of
from dpo.models.rotary import cos_sin
from dpo.models.soft_cap import soft_cap
from dpo.parallel.partition import DATA, FSDP, ONE_DEVICE, ROWS, Partition

Remat = Literal["none", "dots", "full"]


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
        if config.per_layer_size:
            self.per_layer_inputs = PerLayerInputs(make)
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
        kept: dict[str, tuple[Array, Array]] = {}

        def block(kind: str, graphdef: nnx.GraphDef) -> Callable:
            heads, role = split_kind(kind)

            def run(h: Array, layer: Layer) -> tuple[Array, Any]:
                core = partial(self._attend, **layout, grow=grow, key_bias=key_bias, window=layer.window)
                core = _keeping(core) if role == "kept" else cores.get(kind, core)
                core = partial(_reading, core, *kept[heads]) if role == "reader" else core
                h, extra = nnx.merge(graphdef, layer.state)(h, ropes(kind, layer.rope), core, *layer.beside)
                return self.partition.constrain(h, ROWS), extra

            if role != "kept":
                return _rematerialised(lambda h, layer: run(h, layer)[0], self.remat)

            def keep(h: Array, layer: Layer) -> Array:
                h, kept[heads] = _rematerialised(run, self.remat)(h, layer)
                return h

            return keep

        h = self._embed(tokens, positions)
        return self._final(self._through_layers(block, h, self._beside(tokens, h)))

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
        return empty_cache(self.config, self.partition, self.compute_dtype, rows=rows, length=length)

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
        cores = self._cached_cores(positions, group, length=cache.values.shape[3])

        def block(kind: str, graphdef: nnx.GraphDef) -> Callable:
            def apply(carry: tuple[Array, Cache], layer: Layer) -> tuple[Array, Cache]:
                h, cache = carry
                core = partial(cores[kind], cache, layer)
                return nnx.merge(graphdef, layer.state)(h, ropes(kind, layer.rope), core, *layer.beside)

            return apply

        h = self._embed(tokens, positions)
        h, cache = self._through_layers(block, (h, cache), self._beside(tokens, h))
        return self._final(h), cache

    def _cached_cores(
        self, positions: Int[Array, "R S"], group: Int[Array, "R S"], *, length: int
    ) -> dict[str, Callable]:
        """By kind, what layers read of a cache of so many positions, and the cache with their own in it."""
        grow = self._query_growth(positions)
        count = positions.shape[0]
        rows = jnp.arange(count)[:, None]
        key_bias = self._key_bias(jnp.broadcast_to(jnp.arange(length)[None, :], (count, length)))

        def attention(
            kind: str, cache: Cache, layer: Layer, q: Array, k: Array, v: Array
        ) -> tuple[Array, Cache]:
            keys, values = cache.held(kind)
            keys = keys.at[layer.index, rows, :, :, positions].set(k.astype(keys.dtype))
            values = values.at[layer.index, rows, :, positions].set(v.astype(values.dtype))
            mask = visible_in_cache(positions, keys.shape[-1], layer.window)
            at = (keys[layer.index], values[layer.index])
            out = attend_cached(grow(q), *at, mask, key_bias=key_bias, **self._scoring)
            return out, cache.holding(kind, keys, values)

        def reading(kind: str, cache: Cache, layer: Layer, q: Array) -> tuple[Array, Cache]:
            keys, values = (each[layer.index] for each in cache.held(kind))
            mask = visible_in_cache(positions, keys.shape[-1], layer.window)
            return attend_cached(grow(q), keys, values, mask, key_bias=key_bias, **self._scoring), cache

        def convolution(cache: Cache, layer: Layer, u: Array) -> tuple[list[Array], Cache]:
            assert cache.convolved is not None
            before, last = look_back(cache.convolved[layer.index], u, group)
            return before, cache._replace(convolved=cache.convolved.at[layer.index].set(last))

        def delta(cache: Cache, layer: Layer, u: Array) -> tuple[list[Array], Callable]:
            before, cache = convolution(cache, layer, u)

            def run(*given: Array) -> tuple[Array, Cache]:
                assert cache.states is not None
                read, states = gated_delta(*given, chunks=chunks, states=cache.states[layer.index])
                return read, cache._replace(states=cache.states.at[layer.index].set(states))

            return before, run

        chunks = continued(group)
        return {
            **{kind: partial(attention, kind) for kind in ("attention", "global")},
            **{f"{kind}_kept": partial(attention, kind) for kind in ("attention", "global")},
            **{f"{kind}_reader": partial(reading, kind) for kind in ("attention", "global")},
            "convolution": convolution,
            "delta": delta,
        }

    def _through_layers(
        self, block: Callable[[str, nnx.GraphDef], Callable], carry: Any, beside: tuple[Array, ...]
    ) -> Any:
        return through_layers(self.config, self.layers, block, carry, beside, unroll=self.scan_unroll)

    def _cores(self, group: Int[Array, "R T"], branch: Int[Array, "R T"]) -> dict[str, Callable]:
        """What layers read of the positions before them within packed rows, by kind; attention aside."""
        if self.config.num_attending == self.config.num_layers:
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

    def _beside(self, tokens: Int[Array, "R T"], h: Float[Array, "R T D"]) -> tuple[Array, ...]:
        """What each layer is handed beside the residual stream, `[L R T P]`, where there is such."""
        if not self.config.per_layer_size:
            return ()
        return (self.per_layer_inputs(h, self._look_up(self.per_layer_inputs.embed_tokens, tokens)),)

    def _look_up(self, table: Embedding, index: Int[Array, "R T"]) -> Float[Array, "R T D"]:
        """On a mesh every device looks up its columns for the rows of its whole `fsdp` group, and then
        columns are exchanged for rows: the table itself is never gathered.
        """
        index = self.partition.constrain(index, DATA)
        columns = self.partition.constrain(table(index), DATA, None, FSDP)
        return self.partition.constrain(columns, ROWS)

    def _final(self, h: Float[Array, "R T D"]) -> Float[Array, "R T D"]:
        return self.norm(h) * jnp.asarray(self.config.logit_scale, self.compute_dtype)

    def _ropes(
        self, positions: Array, group: Array
    ) -> Callable[[str, Array | None], tuple[Array, Array] | None]:
        """Cosines and sines of every rotation, computed once and picked by each layer, or for its kind."""
        config = self.config
        tables = [cos_sin(rope, positions, group) for rope in config.ropes]
        if len(tables) < 2:
            return lambda *_: tables[0] if tables else None
        if config.global_heads is not None:
            of_kind = {
                kind: tables[config.layer_rope[config.layers_of(kind)[0]]] for kind in set(config.layer_kinds)
            }
            return lambda kind, _: of_kind[kind]
        cos, sin = (jnp.stack(part) for part in zip(*tables, strict=True))
        return lambda _, rope: (cos[rope], sin[rope])


def _keeping(core: Callable) -> Callable:
    """Attention that hands on its keys and values."""
    return lambda q, k, v: (core(q, k, v)[0], (k, v))


def _reading(core: Callable, k: Array, v: Array, q: Array) -> tuple[Array, Any]:
    """Attention to keys and values of another layer."""
    return core(q, k, v)


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
