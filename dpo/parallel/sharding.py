"""Where parameters live: a mesh, ordered (regex → PartitionSpec) rules, and the rows that a process holds.

Axes: `data` splits rows and copies parameters, `fsdp` splits rows and parameters, `tensor` splits heads and
hidden units. One device is the mesh (1, 1, 1): the same code, no special case. What is between parameters and
batch is in `dpo.parallel.partition`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo.outcomes import UserError
from dpo.parallel.distributed import is_alone
from dpo.parallel.partition import AXES, FSDP, ROWS, TENSOR, Partition, Placement

Rules = Sequence[tuple[str, PartitionSpec]]


@runtime_checkable
class Sizes(Protocol):
    """Devices along each axis, -1 for the rest of them: the settings of a mesh, or anything alike."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


class MeshSizes(NamedTuple):
    """Sizes that no settings gave."""

    data: int
    fsdp: int
    tensor: int


# The order is important: the first match wins. Specs are of the last dimensions; leading ones (the stacked
# layer axis) are not split. Adapters are small: they are split only where their linear's heads or units are.
PARAMETER_RULES: Rules = (
    (
        r"([qkvgzabcx]_proj|gate_proj|up_proj)'?\]?.*lora_b",
        PartitionSpec(None, TENSOR),
    ),
    (r"(o|down)_proj.*lora_a", PartitionSpec(TENSOR, None)),
    (r"lora_", PartitionSpec()),
    (
        r"([qkvgzabcx]_proj|gate_proj|up_proj|qkv_proj|gate_up_proj)'?\]?.*kernel",
        PartitionSpec(FSDP, TENSOR),
    ),
    (r"(o|down)_proj.*kernel", PartitionSpec(TENSOR, FSDP)),
    (r"(embed_tokens|embed_positions|lm_head)", PartitionSpec(TENSOR, FSDP)),
    (r".*", PartitionSpec()),
)


def make_mesh(given: Sizes, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay the devices out along (data, fsdp, tensor).

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [given.data, given.fsdp, given.tensor]
    if sizes.count(-1) > 1:
        raise UserError(f"mesh is {dict(zip(AXES, sizes, strict=True))}; at most one size may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} has {int(np.prod(sizes))} places "
            f"for {len(devices)} devices; the product must be equal"
        )
    if len(devices) > 1 and devices[0].platform == "tpu":  # neighbours of an axis are neighbours in the torus
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def own_mesh(given: Sizes) -> Mesh:
    """The mesh of what one process does alone: the run's, or where that does not fit, its devices on `fsdp`.

    What a run left is evaluated on other machines too; results agree to rounding.
    """
    devices, sizes = jax.local_devices(), (given.data, given.fsdp, given.tensor)
    rest, known = -1 in sizes, math.prod(size for size in sizes if size != -1)
    fits = len(devices) % known == 0 if rest else len(devices) == known
    return make_mesh(given if is_alone() and fits else MeshSizes(data=1, fsdp=-1, tensor=1), devices)


def row_multiple(mesh: Mesh) -> int:
    """A batch's row count must be a multiple of this."""
    return Partition(mesh).size(ROWS)


def own_rows(mesh: Mesh) -> Callable[[int], Collection[int]] | None:
    """Of a batch of so many rows, those that devices of this process hold; None where it holds all."""
    if is_alone():
        return None
    rows = NamedSharding(mesh, PartitionSpec(ROWS))

    def held(count: int) -> Collection[int]:
        pieces = rows.addressable_devices_indices_map((count,)).values()
        return {row for piece in pieces if piece is not None for row in range(count)[piece[0]]}

    return held


def parameter_rules(given: Mapping[str, Sequence[Any]]) -> Rules:
    """The rules of the settings (`mesh.rules`), before the ones that hold without them."""
    own = [
        (pattern, PartitionSpec(*(tuple(axes) if isinstance(axes, list) else axes for axes in spec)))
        for pattern, spec in given.items()
    ]
    return (*own, *PARAMETER_RULES)


def parameter_sharding(mesh: Mesh, params: Any, rules: Rules = PARAMETER_RULES) -> Any:
    """A sharding for each leaf by the first rule whose regex is found in its path.

    A dimension that its axis does not divide is left whole.
    """
    place = parameter_placement(mesh, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(jax.tree_util.keystr(path), leaf.shape), params
    )


def with_sharding(shapes: Any, sharding: Any) -> Any:
    """Shapes of arrays that know where they will be: what a step is traced and compiled with."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, sharding
    )


def parameter_placement(mesh: Mesh, rules: Rules = PARAMETER_RULES) -> Placement:
    """The same for one parameter, by its path and shape: what `load_pretrained` puts it into."""

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next(spec for pattern, spec in rules if re.search(pattern, path))
        return NamedSharding(mesh, _fit(spec, shape, mesh))

    return place


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(arrays: Any, shardings: Any) -> Any:
    """Host arrays to a tree of shardings: each process sends what its devices hold and looks at no more."""

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
            return jax.device_put(array, sharding)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, arrays, shardings)


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Align a spec of the last dimensions with `shape`, leaving whole what can't be divided."""
    if len(shape) < len(spec):
        return PartitionSpec()
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return Partition(mesh).spec(axes, shape)
