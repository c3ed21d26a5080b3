"""Plans of several choices: what a memory limit leaves, and the best of the meshes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from dpo.config import Config, MeshConfig
from dpo.models.decoder_config import DecoderConfig
from dpo.parallel.sharding import (
    make_mesh,
    row_multiple,
)
from dpo.planning.plan import Plan, describe_time
from dpo.planning.planner import make_plan
from dpo.planning.targets import Target
from dpo.planning.workloads import Lengths
from dpo.training.memory_choices import Choice, candidates


def make_plan_within_limit(
    config: Config, target: Target, *, decoder: DecoderConfig, lengths: Lengths, log: Callable[[str], None]
) -> Plan:
    """The plan of the settings, or of what `training.memory_limit` chooses in their place.

    Where nothing fits, the plan of the choice with the least memory.
    """
    if config.training.memory_limit is None:
        return make_plan(config, target, decoder=decoder, lengths=lengths)
    plans = []
    for choice in choices_of(config, target, lengths):
        plan = make_plan(choice.apply(config), target, decoder=decoder, lengths=lengths)
        log(f"training.memory_limit: {choice.text}: {plan.memory.total / 2**30:.2f} GiB")
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.memory.total)


def choices_of(config: Config, target: Target, lengths: Lengths) -> Iterator[Choice]:
    """The settings that are traded for memory, in the order in which a run tries them."""
    mesh = make_mesh(config.mesh, target.devices)

    def scored(micro_batches: int) -> int:
        training = replace(config.training, micro_batches=micro_batches)
        shape = lengths(replace(config, training=training), mesh, target.chip.platform).shape
        return shape.rows * shape.scored // micro_batches // row_multiple(mesh)

    return candidates(config, scored)


def search_meshes(
    config: Config, target: Target, *, decoder: DecoderConfig, lengths: Lengths, log: Callable[[str], None]
) -> list[tuple[MeshConfig, Plan]]:
    """A plan of every mesh worth trying, the best first: what fits, by time with no communication hidden."""
    found = []
    for mesh in candidate_meshes(target.topology.num_devices, decoder):
        mesh = replace(mesh, rules=config.mesh.rules)
        plan = make_plan(replace(config, mesh=mesh), target, decoder=decoder, lengths=lengths)
        log(f"tried mesh {plan.mesh}: {describe_time(plan)}, compiled in {plan.compile_seconds:.0f} s")
        found.append((mesh, plan))
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].times.exposed if pair[1].times else 0.0))


def candidate_meshes(num_devices: int, decoder: DecoderConfig) -> Iterator[MeshConfig]:
    """All fsdp, all data, both; the same with heads split in 2, 4 and 8 where they can be."""
    for tensor in (1, 2, 4, 8):
        heads = (decoder.num_heads, *decoder.kv_head_counts)
        if any(count % tensor for count in (num_devices, *heads)):
            continue
        rest = num_devices // tensor
        middle = 2 ** (max(0, rest.bit_length() - 1) // 2)
        sizes = {1, rest} if tensor == 1 else {1}
        sizes |= {middle} if rest % middle == 0 else set()
        for data in sorted(sizes):
            yield MeshConfig(data=data, fsdp=rest // data, tensor=tensor)
