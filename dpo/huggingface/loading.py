"""Tensors in files to parameters on devices: read in pieces, each straight into the shards that hold it.

A parameter stacks its layers' tensors. While it is filled, the host holds one buffer for each distinct shard
of it that this process needs, and one piece of one tensor. Parameters are made largest first, so that the
peak is at most the model plus what is left of the largest one: the last ones are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo.huggingface.binding import Binding
from dpo.huggingface.weights import Tensors
from dpo.parallel.partition import Placement

MAX_PIECE_BYTES = 16 * 2**20
"""Tensors are read in runs of rows of about this size, as float32."""

_Region = tuple[tuple[int, int], ...]
"""First and last (exclusive) index along every axis."""


def load_parameters(
    bindings: Sequence[Binding],
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: np.dtype,
    placement: Placement | None,
) -> dict[str, jax.Array]:
    """Every parameter by path, in `dtype`, where `placement` puts it (else on the default device)."""
    values: dict[str, jax.Array] = {}
    largest_first = sorted(bindings, key=lambda b: -sum(math.prod(shapes[leaf]) for leaf in b.leaves))
    for binding in largest_first:
        targets = [
            _Target(shapes[leaf], dtype, None if placement is None else placement(leaf, shapes[leaf]))
            for leaf in binding.leaves
        ]
        _fill(binding, tensors, targets)
        for leaf in binding.leaves:
            values[leaf] = targets.pop(0).finish()
    return values


def _fill(binding: Binding, tensors: Tensors, targets: Sequence[_Target]) -> None:
    """Read the binding's tensors, one for each layer (and head), into the parameters that they hold."""
    num_leading = binding.num_leading
    for index, name in zip(np.ndindex(targets[0].shape[:num_leading]), binding.names, strict=True):
        leading = tuple((i, i + 1) for i in index)
        for rows in _pieces(binding):
            regions = [_region(binding, target.shape[num_leading:], rows) for target in targets]
            if not any(t.wants((*leading, *region)) for t, region in zip(targets, regions, strict=True)):
                continue
            parts = binding.to_ours(tensors.read(name, rows))
            for target, region, part in zip(targets, regions, parts, strict=True):
                target.write((*leading, *region), part.reshape((1,) * num_leading + part.shape))


def _pieces(binding: Binding) -> Iterator[slice]:
    """Runs of rows that make up one tensor; what is split over several parameters stays whole."""
    num_rows = binding.shape[0]
    if binding.rule.fusion is not None:
        yield slice(0, num_rows)
        return
    step = max(1, MAX_PIECE_BYTES // max(1, 4 * math.prod(binding.shape[1:])))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _region(binding: Binding, shape: tuple[int, ...], rows: slice) -> _Region:
    """Where these rows of one tensor lie in one layer of a parameter."""
    region = [(0, size) for size in shape]
    if binding.rule.fusion is None:
        region[-1 if binding.is_transposed else 0] = (rows.start, rows.stop)
    return tuple(region)


class _Target:
    """One parameter while it is filled: a buffer for every distinct shard that this process holds."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None):
        self.shape, self._sharding = shape, sharding
        self._devices: dict[_Region, list[Any]] = {}
        for device, index in _shards(shape, sharding):
            bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            self._devices.setdefault(tuple(bounds), []).append(device)
        self._buffers = {
            region: np.empty([stop - start for start, stop in region], dtype) for region in self._devices
        }

    def wants(self, region: _Region) -> bool:
        """Whether any shard here holds a part of it."""
        return any(_overlap(region, held) is not None for held in self._buffers)

    def write(self, region: _Region, values: np.ndarray) -> None:
        """Copy the values of a region of the parameter into the shards that hold it."""
        for held, buffer in self._buffers.items():
            overlap = _overlap(region, held)
            if overlap is not None:
                buffer[_slices(overlap, held)] = values[_slices(overlap, region)]

    def finish(self) -> jax.Array:
        """The parameter, on its devices; the buffers are given up."""
        arrays = []
        while self._buffers:
            region, buffer = self._buffers.popitem()
            if self._sharding is None:
                return jax.block_until_ready(jnp.asarray(buffer))
            arrays += [jax.device_put(buffer, device) for device in self._devices[region]]
            jax.block_until_ready(arrays[-1])
            del buffer
        assert self._sharding is not None
        return jax.make_array_from_single_device_arrays(self.shape, self._sharding, arrays)


def _shards(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> list[tuple[Any, Any]]:
    """Every device here with the part of the array that it holds."""
    if sharding is None:
        return [(None, (slice(None),) * len(shape))]
    return list(sharding.addressable_devices_indices_map(shape).items())


def _overlap(first: _Region, second: _Region) -> _Region | None:
    bounds = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return bounds if all(start < stop for start, stop in bounds) else None


def _slices(region: _Region, origin: _Region) -> tuple[slice, ...]:
    """A region as an index into an array that begins where `origin` does."""
    return tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(region, origin, strict=True))
