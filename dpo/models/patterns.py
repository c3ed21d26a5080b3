"""Layers of several kinds as runs of a repeating pattern, each of which is one scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dpo.models.attention import NO_WINDOW
from dpo.models.decoder_config import DecoderConfig, split_kind


class Run(NamedTuple):
    """`pattern`, `repeats` times, from layer `start` on."""

    start: int
    pattern: tuple[str, ...]
    repeats: int

    @property
    def end(self) -> int:
        """The first layer behind it."""
        return self.start + len(self.pattern) * self.repeats


class Layer(NamedTuple):
    """What the scan hands to one layer."""

    state: nnx.State
    index: Int[Array, "*n"]
    window: Int[Array, "*n"] | None
    rope: Int[Array, "*n"] | None
    beside: tuple[Float[Array, "*n R T P"], ...]


def through_layers(
    config: DecoderConfig,
    stacks: Any,
    block: Callable[[str, nnx.GraphDef], Callable],
    carry: Any,
    beside: tuple[Float[Array, "L R T P"], ...],
    *,
    unroll: int,
) -> Any:
    """`block(kind, graphdef)(carry, layer)` of all layers in order: a scan for each run of a pattern.

    A layer whose keys and values others read is alone in its run, and runs outside of a scan. A pass of a
    scan holds `unroll` repetitions.
    """
    split = {
        kind: nnx.split(stacks if config.is_uniform else getattr(stacks, kind))
        for kind in dict.fromkeys(config.layer_kinds)
    }
    for run in find_runs(config.layer_kinds):
        blocks = [block(kind, split[kind][0]) for kind in run.pattern]

        def body(carry: Any, layers: tuple[Layer, ...], blocks: list[Callable] = blocks) -> Any:
            for apply, layer in zip(blocks, layers, strict=True):
                carry = apply(carry, layer)
            return carry, None

        layers = tuple(
            _layers_at(config, run, place, split[kind][1], beside) for place, kind in enumerate(run.pattern)
        )
        if split_kind(run.pattern[0])[1] == "kept":
            carry = blocks[0](carry, jax.tree.map(lambda leaf: leaf[0], layers[0]))
            continue
        carry, _ = jax.lax.scan(body, carry, layers, unroll=unroll)
    return carry


def find_runs(kinds: Sequence[str]) -> list[Run]:
    """All layers in order, from the left what covers most of them by repetition.

    C C A C C A C A C A C   is   (C C A) twice, (C A) twice, C once: so many blocks are compiled.
    """
    runs: list[Run] = []
    while (start := runs[-1].end if runs else 0) < len(kinds):
        longest = (len(kinds) - start) // 2
        found = [_run(kinds, start, length) for length in range(1, max(longest, 1) + 1)]
        runs.append(max(found, key=lambda run: (run.end if run.repeats > 1 else 0, -len(run.pattern))))
    return runs


def _run(kinds: Sequence[str], start: int, length: int) -> Run:
    pattern = tuple(kinds[start : start + length])
    repeats = 1
    while tuple(kinds[start + repeats * length : start + (repeats + 1) * length]) == pattern:
        repeats += 1
    return Run(start, pattern, repeats)


def _layers_at(
    config: DecoderConfig, run: Run, place: int, stack: nnx.State, beside: tuple[Array, ...]
) -> Layer:
    """The layers at one place of a run's pattern, from the stack of their kind."""
    period = len(run.pattern)
    numbers = slice(run.start + place, run.end, period)
    of_kind = config.layers_of(run.pattern[place])
    first, step = of_kind.index(numbers.start), run.pattern.count(run.pattern[place])
    index = np.arange(len(of_kind))[first:][: step * run.repeats : step]
    if len(index) < len(of_kind):
        stack = jax.tree.map(lambda leaf: leaf[first:][: step * run.repeats : step], stack)
    heads, role = split_kind(run.pattern[place])
    if role:  # in the cache the layer that is kept stands behind the others
        index = np.full(len(index), len(config.layers_of(heads)))
    windowed = min(config.windows) < NO_WINDOW
    return Layer(
        state=stack,
        index=jnp.arange(len(of_kind)) if len(index) == len(of_kind) and not role else jnp.asarray(index),
        window=jnp.asarray(config.windows[numbers], jnp.int32) if windowed else None,
        rope=jnp.asarray(config.layer_rope[numbers], jnp.int32) if len(config.ropes) > 1 else None,
        beside=tuple(each[numbers] for each in beside),
    )
