"""What layers keep of decoded positions, by kind."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dpo.models.decoder_config import DecoderConfig
from dpo.parallel.partition import ROWS, TENSOR, Partition


class Cache(NamedTuple):
    """Keys and values of attention, and what else layers keep; slot s holds position s of its row.

    A layer whose keys and values others read is the last of those with its heads.
    """

    keys: Float[Array, "L R G C S"]
    values: Float[Array, "L R G S C"]
    convolved: Float[Array, "N R W D"] | None = None
    """What convolutions read of each row's last positions, where there are such layers."""
    states: Float32[Array, "N R H 1 K V"] | None = None
    """What the delta rule keeps of each row's positions, where there are such layers."""
    global_keys: Float[Array, "L R G C S"] | None = None
    global_values: Float[Array, "L R G S C"] | None = None
    """Of layers of kind `global`, where there are such layers."""

    def held(self, kind: str) -> tuple[Array, Array]:
        """Keys and values of the layers of a kind of attention."""
        if kind == "attention":
            return self.keys, self.values
        assert self.global_keys is not None
        assert self.global_values is not None
        return self.global_keys, self.global_values

    def holding(self, kind: str, keys: Array, values: Array) -> Cache:
        """The same with other keys and values of these layers."""
        if kind == "attention":
            return self._replace(keys=keys, values=values)
        return self._replace(global_keys=keys, global_values=values)


def empty_cache(
    config: DecoderConfig, partition: Partition, dtype: jnp.dtype, *, rows: int, length: int
) -> Cache:
    """For positions below `length`."""

    def attention(kind: str) -> list[Array]:
        sizes = config.of_kind(kind)
        count = len(config.layers_of(kind)) + len(config.layers_of(f"{kind}_kept"))
        stack = (count, rows, sizes.num_kv_heads)
        keys = jnp.zeros((*stack, sizes.head_dim, length), dtype)
        values = jnp.zeros((*stack, length, sizes.head_dim), dtype)
        return [partition.constrain(x, None, ROWS, TENSOR) for x in (keys, values)]

    cache = Cache(*attention("attention"))
    if config.is_uniform:
        return cache
    if config.global_heads is not None:
        cache = cache.holding("global", *attention("global"))
    others, delta = config.num_layers - config.num_attending, config.delta
    if not others:
        return cache
    shape = (others, rows, config.convolution_width - 1, config.convolved_channels)
    cache = cache._replace(convolved=partition.constrain(jnp.zeros(shape, dtype), None, ROWS))
    if delta is None:
        return cache
    shape = (others, rows, delta.num_value_heads, 1, delta.key_dim, delta.value_dim)
    return cache._replace(states=jnp.zeros(shape))
