"""What of a step's largest arrays goes between devices: parameters that become whole, logits.

Kernels are gathered a layer at a time or met in pieces, and hidden states go to the parts of the vocabulary
(`dpo.models.log_probs`), so that no parameter is ever whole on a device and no logits leave theirs. A
compiler may decide otherwise. This reads from the shapes in a program's collectives what it did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo.models.decoder import DecoderConfig
from dpo.parallel.partition import FSDP, TENSOR, Axes
from dpo.parallel.sharding import Rules, parameter_placement
from dpo.planning.hlo import Collective, Program

Dims = tuple[int, ...]
"""Lengths of an array's dimensions, without those of 1."""


class Travel(NamedTuple):
    """What collectives bring to a device."""

    largest_gather: Collective | None
    """The all-gather that brings most bytes at once."""
    parameters: list[str]
    """Paths of parameters that are split over `fsdp` and that some collective brings whole, all layers."""
    logits: list[Collective] | None
    """Collectives of arrays whose last dimension is the vocabulary, or a device's part of it. None where
    shapes don't tell, because such a part is as long as hidden states, or as a part of them.
    """


def read_travel(
    program: Program, split: Mapping[str, set[Dims]], decoder: DecoderConfig, mesh: Mapping[str, int]
) -> Travel:
    """Look for them in a program; `split` comes from `split_parameters`, `mesh` are the sizes of the axes."""
    counts = {1, mesh[TENSOR], mesh[FSDP], mesh[TENSOR] * mesh[FSDP]}
    vocabulary, hidden = (_parts(size, counts) for size in (decoder.vocab_size, decoder.hidden_size))
    matrices = {shape[-2:] for shapes in split.values() for shape in shapes}
    tables = _parts(decoder.vocab_size, {1, mesh[TENSOR]})
    kernels = [matrix for matrix in matrices if tables.isdisjoint(matrix)]

    def is_logits(dims: Dims) -> bool:
        *positions, columns = dims or (1,)
        rows = math.prod(positions)
        is_piece = any(columns in _parts(width, counts) and not length % rows for length, width in kernels)
        return columns in vocabulary - hidden and rows not in {1, *hidden} and not is_piece

    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    logits = [c for c in program.collectives if any(map(is_logits, _given(c, r"b?f\d+\w*")))]
    brought = {tuple(sorted(dims)) for c in program.collectives for dims in _brought(c)}
    return Travel(
        largest_gather=max(gathers, key=lambda c: c.size, default=None),
        parameters=[
            path
            for path, shapes in split.items()
            if any(tuple(sorted(_dims(shape))) in brought for shape in shapes)
        ],
        logits=logits if logits or vocabulary.isdisjoint(hidden) else None,
    )


def split_parameters(mesh: Mesh, params: Any, rules: Rules) -> dict[str, set[Dims]]:
    """By path, every parameter that `fsdp` splits: its shape, whole and with only `tensor` splitting it."""
    place, found = parameter_placement(mesh, rules), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        where = place(name, leaf.shape)
        assert isinstance(where, NamedSharding)
        gathered = NamedSharding(mesh, PartitionSpec(*map(_without_fsdp, where.spec))).shard_shape(leaf.shape)
        if where.shard_shape(leaf.shape) != gathered:
            found[name] = {leaf.shape, gathered}
    return found


def _without_fsdp(axes: Axes) -> Axes:
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != FSDP)


def _given(collective: Collective, dtype: str = r"\w+") -> list[Dims]:
    """What a device gives, of a dtype that fits the regex; ids of tokens are as many as there are slots."""
    shapes = re.findall(rf"\b{dtype}\[([\d,]*)\]", collective.arrays)
    return [_dims(int(d) for d in shape.split(",") if d) for shape in shapes]


def _brought(collective: Collective) -> Iterator[Dims]:
    """What a device may get: by an all-gather one dimension grows, or there is one more."""
    for dims in _given(collective):
        if collective.kind != "all-gather":
            yield dims
            continue
        for i in range(len(dims) + 1):
            yield _dims((*dims[:i], math.prod(dims[i : i + 1]) * collective.group, *dims[i + 1 :]))


def _parts(size: int, counts: set[int]) -> set[int]:
    """The size cut into so many parts, the last of which may be padded."""
    return {-(-size // count) for count in counts}


def _dims(shape: Iterable[int]) -> Dims:
    return tuple(d for d in shape if d > 1)
