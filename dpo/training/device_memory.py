"""Bytes on a device: of programs that are compiled, of arrays, of the machine; limits in bytes."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dpo.config import TrainingConfig
from dpo.outcomes import UserError

GIB = 2.0**30
Limit = float | Literal["device"] | None
"""A limit of memory: so many GiB, all that the device has, or none."""


def temporary_bytes(compiled: Any) -> float:
    """Bytes besides the arguments: temporaries, results that do not replace an argument, code."""
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return float(stats.temp_size_in_bytes + max(0, results) + stats.generated_code_size_in_bytes)


def device_bytes(tree: Any) -> float:
    """Bytes on one device of arrays, or of shapes with shardings."""
    return float(
        sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def saving_bytes(state: Any, platform: str) -> float:
    """Bytes on a device of the copy of a state that is written as a checkpoint: on a CPU it is one place."""
    return device_bytes(state) if platform == "cpu" else 0.0


def saves_between_steps(training: TrainingConfig) -> bool:
    """Whether checkpoints are written while steps go on."""
    return (training.save_every, training.save_minutes, training.keep_best) != (None, None, None)


def compiled_bytes(lower: Callable[[], Any], read: Callable[[Any], float]) -> float:
    """What `read` finds in the compiled program; infinite where the compiler says that it is too large."""
    try:
        return read(lower().compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def limit_bytes(limit: Limit, memory: float) -> float:
    """`training.memory_limit` in bytes; the device's own memory for "device" and without one."""
    return memory if limit is None or limit == "device" else limit * GIB


def limit_of(limit: Limit, mesh: Mesh) -> float:
    """`training.memory_limit` in bytes of a device of the mesh.

    Raises:
      ValueError: where an accelerator does not say what it gives out, or gives out less than is asked for.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return limit_bytes(limit, _share_of_machine(mesh))
    stats = device.memory_stats()
    if stats is None and limit in (None, "device"):
        raise UserError(
            f"training.memory_limit is {limit or 'not given'}, and {device.device_kind} does not say how "
            "much it gives out (XLA_PYTHON_CLIENT_ALLOCATOR=platform does not count); allowed: a number of "
            "GiB, or another allocator"
        )
    pool = math.inf if stats is None else float(stats["bytes_limit"])
    asked = limit_bytes(limit, pool)
    if asked > pool:
        raise UserError(
            f"training.memory_limit is {gib(asked)} and {device.device_kind} gives out {gib(pool)}; allowed: "
            "up to that, or device. JAX reserves a part of a GPU's memory, as XLA_CLIENT_MEM_FRACTION says"
        )
    return asked


def _share_of_machine(mesh: Mesh) -> float:
    """Bytes of a CPU device: its share of the machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(mesh.local_devices)


def other_bytes(mesh: Mesh) -> float:
    """Bytes in use on a device now that are no arrays: of a CPU device its share of the process.

    An accelerator whose allocator does not count has none that are known.
    """
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        return max(0.0, resident_bytes() - array_bytes(jax.local_devices())) / len(devices)
    stats = devices[0].memory_stats() or {"bytes_in_use": 0}
    return max(0.0, float(stats["bytes_in_use"]) - array_bytes(devices[:1]))


def resident_bytes() -> float:
    """Memory of this process; where the system does not say (macOS), the most that it was."""
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (
        1 if sys.platform == "darwin" else 1024
    )


def array_bytes(devices: Iterable[Any]) -> float:
    """Of all arrays on these devices, buffers that several share counted once."""
    on = set(devices)
    shards = [
        shard for array in jax.live_arrays() for shard in array.addressable_shards if shard.device in on
    ]
    return float(sum({shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards}.values()))


def gib(size: float) -> str:
    return "more than fits" if math.isinf(size) else f"{size / GIB:.2f} GiB"
