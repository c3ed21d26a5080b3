"""Where arrays live: a mesh, ordered (regex → PartitionSpec) rules for parameters, rows of a batch.

Axes: `data` splits rows and copies parameters, `fsdp` splits rows and parameters, `tensor` splits heads and
hidden units. One device is the mesh (1, 1, 1): the same code, no special case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo.config import MeshConfig
from dpo.data.batch import ROW_FIELDS, Batch
from dpo.models.loading import Placement

AXES = ("data", "fsdp", "tensor")

Rules = Sequence[tuple[str, PartitionSpec]]

# The order is important: the first match wins. Specs are of the last dimensions; leading ones (the stacked
# layer axis) are not split. Adapters are small: they are split only where their linear's heads or units are.
PARAMETER_RULES: Rules = (
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)'?\]?.*lora_b", PartitionSpec(None, "tensor")),
    (r"(o|down)_proj.*lora_a", PartitionSpec("tensor", None)),
    (r"lora_", PartitionSpec()),
    (
        r"(q_proj|k_proj|v_proj|gate_proj|up_proj|qkv_proj|gate_up_proj)'?\]?.*kernel",
        PartitionSpec("fsdp", "tensor"),
    ),
    (r"(o|down)_proj.*kernel", PartitionSpec("tensor", "fsdp")),
    (r"(embed_tokens|lm_head)", PartitionSpec("tensor", "fsdp")),
    (r".*", PartitionSpec()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay the devices out along (data, fsdp, tensor).

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh is {dict(zip(AXES, sizes, strict=True))}; at most one size may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} has {int(np.prod(sizes))} places "
            f"for {len(devices)} devices; the product must be equal"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def row_multiple(mesh: Mesh) -> int:
    """A batch's row count must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parameter_sharding(mesh: Mesh, params: Any, rules: Rules = PARAMETER_RULES) -> Any:
    """A sharding for each leaf by the first rule whose regex is found in its path.

    A dimension that its axis does not divide is left whole.
    """
    place = parameter_placement(mesh, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(jax.tree_util.keystr(path), leaf.shape), params
    )


def parameter_placement(mesh: Mesh, rules: Rules = PARAMETER_RULES) -> Placement:
    """The same for one parameter, by its path and shape: what `load_pretrained` puts it into."""

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next(spec for pattern, spec in rules if re.search(pattern, path))
        return NamedSharding(mesh, _fit(spec, shape, mesh))

    return place


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Rows over data and fsdp, per-prompt arrays on every device."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Batch(
        **{
            name: jax.device_put(array, rows if name in ROW_FIELDS else everywhere)
            for name, array in batch._asdict().items()
        }
    )


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Align a spec of the last dimensions with `shape`, leaving whole what can't be divided."""
    if len(shape) < len(spec):
        return PartitionSpec()
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return PartitionSpec(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )
