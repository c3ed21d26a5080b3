"""Positions and vocabulary on a mesh, for log-probs of which no device holds all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dpo.parallel.partition import DATA, FSDP, ROWS, TENSOR, VOCABULARY, Partition

Arrays = dict[str, Array]
"""Inputs or results by name; "bias" and "logits" only where there are any."""


class Shard:
    """How positions and vocabulary lie on a mesh, and what a device must ask of the others.

    The rows of positions are split over data and fsdp, the vocabulary over tensor and fsdp. The devices of an
    fsdp group share their positions with one another, and each makes the logits of all of them in its part
    of the vocabulary: neither the matrix nor logits ever travel whole. The matrix is kept with its columns
    split over fsdp; one exchange makes rows of them. On one device, and for positions without rows, nothing
    is shared.
    """

    def __init__(self, partition: Partition, arrays: Arrays):
        hidden, (vocab_size, dim) = arrays["hidden"], arrays["embedding"].shape
        rows = hidden.ndim == 3 and partition.divides(ROWS, len(hidden)) is not None
        self._is_split = partition.is_split and rows and partition.divides(FSDP, dim) is not None
        self._mesh = partition.mesh
        self._group = partition.size(FSDP)
        self._tensor = TENSOR if partition.divides(TENSOR, vocab_size) else None
        self._rows = vocab_size // partition.size(self._tensor)
        """Of the matrix, on the devices of one fsdp group."""

    def map(self, function: Callable[[Arrays], Arrays], arrays: Arrays, names: Sequence[str]) -> Arrays:
        """The results `names` of `function`, called by every device with its part of the arrays."""
        if not self._is_split:
            return function(arrays)

        def on_a_device(arrays: Arrays) -> Arrays:
            results = function({name: self._to_rows(name, array) for name, array in arrays.items()})
            return {name: self._from_rows(name, results[name]) for name in names}

        return jax.shard_map(
            on_a_device,
            mesh=self._mesh,
            in_specs=({name: self._spec(name) for name in arrays},),
            out_specs={name: self._spec(name) for name in names},
            check_vma=False,
        )(arrays)

    def gather(self, x: Array) -> Array:
        """The positions of all devices of the fsdp group."""
        return jax.lax.all_gather(x, FSDP, tiled=True) if self._is_split else x

    def own(self, x: Array) -> Array:
        """A device's own among the group's positions."""
        if not self._is_split:
            return x
        size = len(x) // self._group
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(FSDP) * size, size)

    def own_sum(self, x: Array) -> Array:
        """The sum over all parts of the vocabulary, of a device's own positions."""
        if not self._is_split:
            return x
        x = x if self._tensor is None else jax.lax.psum(x, self._tensor)
        return jax.lax.psum_scatter(x, FSDP, tiled=True)

    def max_over_vocabulary(self, x: Array) -> Array:
        """The largest of all parts of the vocabulary, of the group's positions."""
        axes = (FSDP,) if self._tensor is None else (self._tensor, FSDP)
        return jax.lax.pmax(x, axes) if self._is_split else x

    def sum_over_data(self, x: Array) -> Array:
        """The sum over positions that other groups have."""
        return jax.lax.psum(x, DATA) if self._is_split else x

    def first_column(self, size: int) -> Array | int:
        """Number of the first token of a device's part of the vocabulary, which has `size`."""
        if not self._is_split:
            return 0
        of_group = 0 if self._tensor is None else jax.lax.axis_index(self._tensor) * self._rows
        return of_group + jax.lax.axis_index(FSDP) * size

    def num_columns(self, size: int) -> Array | int:
        """How many of these are tokens; the others only make the parts equal."""
        return jnp.minimum(size, self._rows - jax.lax.axis_index(FSDP) * size) if self._is_split else size

    def hide_padding(self, x: Float[Array, "M v"], value: float = -1e30) -> Float[Array, "M v"]:
        """`value` in the columns that are no tokens."""
        if not self._is_split or self._rows % self._group == 0:
            return x
        return jnp.where((jnp.arange(x.shape[1]) < self.num_columns(x.shape[1]))[None, :], x, value)

    def _to_rows(self, name: str, array: Array) -> Array:
        """A device's rows of the matrix and entries of the bias, from its columns and all entries."""
        if name not in ("embedding", "bias"):
            return array
        padding = -self._rows % self._group
        array = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        return self.own(array) if name == "bias" else jax.lax.all_to_all(array, FSDP, 0, 1, tiled=True)

    def _from_rows(self, name: str, array: Array) -> Array:
        """The way back."""
        if name == "bias":
            return self.gather(array)[: self._rows]
        return (
            jax.lax.all_to_all(array, FSDP, 1, 0, tiled=True)[: self._rows] if name == "embedding" else array
        )

    def _spec(self, name: str) -> PartitionSpec:
        """Where an array lies on the mesh."""
        known = {
            "embedding": PartitionSpec(self._tensor, FSDP),
            "bias": PartitionSpec(self._tensor),
            "normaliser": PartitionSpec(None, ROWS),
            "logits": PartitionSpec(None, DATA, (FSDP,) if self._tensor is None else VOCABULARY),
        }
        return known.get(name, PartitionSpec(ROWS))
