"""Where the arrays of a `Batch` live on a mesh."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo.data.batch import ROW_FIELDS, Batch
from dpo.parallel.partition import ROWS
from dpo.parallel.sharding import place, replicated


def batch_sharding(mesh: Mesh) -> Any:
    """Rows over data and fsdp, per-prompt arrays on every device; a `Batch` of shardings."""
    rows, everywhere = NamedSharding(mesh, PartitionSpec(ROWS)), replicated(mesh)
    return Batch._make(rows if name in ROW_FIELDS else everywhere for name in Batch._fields)


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """The batch on the mesh; of several processes, each places the rows of its own devices (`own_rows`)."""
    return place(batch, batch_sharding(mesh))
