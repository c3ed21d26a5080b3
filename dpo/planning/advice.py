"""Which settings to change where a step does not fit, or is split badly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dpo.config import Config
from dpo.models.decoder_config import DecoderConfig
from dpo.parallel.partition import DATA, FSDP, ROWS, TENSOR
from dpo.planning.plan import Plan


def advise(config: Config, plan: Plan, decoder: DecoderConfig) -> Iterator[str]:
    """What to change of mesh and dtype, the most useful first; what else helps is tried (`remedies`)."""
    partition = {axis: plan.mesh[axis] for axis in (*ROWS, TENSOR)}
    tensor = partition[TENSOR]
    for keys in decoder.kv_head_counts:
        if decoder.num_heads % tensor or keys % tensor:
            yield (
                f"mesh.tensor {tensor} does not divide {decoder.num_heads} query and {keys} key heads: "
                "attention is computed by every device of the axis"
            )
    if plan.fits:
        yield from _smaller_groups(plan)
        return
    memory, parts = plan.memory, partition["data"] * partition["fsdp"]
    held = memory.parameters + memory.optimizer
    if held > 0.5 * memory.limit and partition["data"] > 1:
        yield f"mesh.fsdp {parts} instead of {partition['fsdp']}: the state takes {held / 2**30:.2f} GiB"
    if config.model.compute_dtype == "float32":
        yield "model.compute_dtype bfloat16: half the activations"
    if held > 0.5 * memory.limit or plan.workload.shape.rows <= parts * config.training.micro_batches:
        yield f"a larger topology: {int(np.ceil(memory.total / memory.limit))} times the devices would do"


_GROUP = 16
"""Chips that gather and scatter by pieces; the TPU's compiler makes sums over all of 64 and more instead."""


def _smaller_groups(plan: Plan) -> Iterator[str]:
    """Fewer devices to a group of `fsdp`, where communication takes longest and memory allows."""
    fsdp, memory = plan.mesh[FSDP], plan.memory
    more = (memory.parameters + memory.optimizer) * (fsdp // _GROUP - 1)
    waits = plan.times is not None and plan.times.communication == plan.times.hidden
    if fsdp >= 4 * _GROUP and fsdp % _GROUP == 0 and waits and more < memory.free:
        data = plan.mesh[DATA] * fsdp // _GROUP
        yield (
            f"mesh.data {data}, mesh.fsdp {_GROUP}: communication takes longest; {more / 2**30:.2f} GiB more"
        )
