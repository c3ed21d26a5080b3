"""Where activations live on a mesh: the names of its axes, and what is split over which.

    data      rows of a batch; parameters are copied
    fsdp      rows, and parameters: gathered a layer at a time, or met in parts (the vocabulary)
    tensor    heads, hidden units and the vocabulary

The compiler fills in the rest from these constraints and from where the parameters are
(`dpo.parallel.sharding`). Without a mesh, or on one device, every constraint is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
ROWS = (DATA, FSDP)
"""What the rows of a batch are split over."""
VOCABULARY = (TENSOR, FSDP)
"""What the vocabulary is split over where hidden states meet it."""

Axes = str | tuple[str, ...] | None
"""What one dimension is split over."""

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Where a parameter lives, by its path (such as layers.mlp.up_proj.kernel) and shape."""


@dataclass(frozen=True)
class Partition:
    """The mesh that a model computes on."""

    mesh: Mesh | None = None

    @property
    def is_split(self) -> bool:
        """Whether there is more than one device."""
        return self.mesh is not None and self.mesh.size > 1

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu: what the program is compiled for, which may be another machine's."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def size(self, axes: Axes) -> int:
        """Number of parts that a dimension over `axes` has."""
        names = (axes,) if isinstance(axes, str) else (axes or ())
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in names)

    def divides(self, axes: Axes, *sizes: int) -> Axes:
        """`axes` where they divide all of `sizes`, else None: that dimension stays whole."""
        return axes if all(size % self.size(axes) == 0 for size in sizes) else None

    def spec(self, axes: Sequence[Axes], shape: tuple[int, ...]) -> PartitionSpec:
        """What to split each leading dimension of `shape` over, as far as it can be divided."""
        return PartitionSpec(*(self.divides(axis, size) for axis, size in zip(axes, shape, strict=False)))

    def constrain(self, x: jax.Array, *axes: Axes) -> jax.Array:
        """`x` with its leading dimensions split over `axes`, the others whole."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(axes, x.shape)))


ONE_DEVICE = Partition()
"""No mesh: nothing is split."""
