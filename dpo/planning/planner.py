"""What a step of a run's settings needs on devices that need not be there: memory, traffic, time.

The training program of the settings is compiled ahead of time with shapes in place of weights: for a TPU by
the TPU's own compiler, for CPU devices by this machine's. For GPUs the CPU's compiler stands in: how arrays
are split and what is communicated is the same, memory is near, and time is the roofline's.
"""

from __future__ import annotations

import math
import re
import time

import jax

from dpo.config import Config, ModelConfig
from dpo.losses import make_objective, reward_scale
from dpo.models.attention import choose_implementation
from dpo.models.decoder_config import DecoderConfig
from dpo.parallel.partition import Partition
from dpo.parallel.sharding import (
    make_mesh,
    parameter_rules,
)
from dpo.planning.advice import advise
from dpo.planning.hlo import Program, read_program
from dpo.planning.plan import Plan
from dpo.planning.roofline import Times, count_flops, forward_flops, looped_flops, step_times
from dpo.planning.targets import Target, attention_on
from dpo.planning.tracing import trace_step
from dpo.planning.travel import read_travel, split_parameters
from dpo.planning.workloads import Lengths
from dpo.runs import specification
from dpo.training.device_memory import temporary_bytes


def make_plan(config: Config, target: Target, *, decoder: DecoderConfig, lengths: Lengths) -> Plan:
    """Compile the step of the settings for the target and read what came out.

    Raises:
      ValueError: when the mesh does not fit the devices, or the lengths no row.
    """
    objective, beta = make_objective(specification(config)), reward_scale(specification(config))
    mesh = make_mesh(config.mesh, target.devices)
    workload = lengths(config, mesh, target.chip.platform)
    traced, memory = trace_step(
        config, objective, decoder, beta=beta, mesh=mesh, workload=workload, target=target
    )
    attention, body = forward_flops(decoder, workload.work)
    flops = count_flops(traced.jaxpr)
    how = choose_implementation(
        attention_on(target, config.model.attention, has_key_bias=decoder.alibi is not None),
        partition=Partition(mesh),
        length=workload.shape.row_length,
        has_key_bias=decoder.alibi is not None,
    )
    flops += looped_flops(how, attention)
    began = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries = _refused_temporaries(str(error), arguments=memory.total)
        if temporaries is None:
            raise
        program, travel, times = None, None, None
        memory = memory._replace(temporaries=temporaries)
    else:
        memory = memory._replace(temporaries=temporary_bytes(compiled))
        program = read_program(compiled.as_text() or "", target.topology.num_devices)
        state, frozen, *_ = traced.args_info[0]
        rules = parameter_rules(config.mesh.rules)
        split = split_parameters(mesh, state.params, rules) | split_parameters(mesh, frozen, rules)
        travel = read_travel(program, split, decoder, mesh.shape)
        times = _times(config, program, flops, target)
    plan = Plan(
        mesh=dict(mesh.shape),
        workload=workload,
        memory=memory,
        fits=program is not None and memory.free >= 0,
        flops=flops,
        useful_flops=3 * attention + (2 if config.lora.is_on else 3) * body,  # frozen: no weight gradients
        program=program,
        travel=travel,
        times=times,
        compile_seconds=time.perf_counter() - began,
        advice=[],
    )
    return plan._replace(advice=list(advise(config, plan, decoder)))


def _times(config: Config, program: Program, flops: float, target: Target) -> Times | None:
    """None where of the chip nothing is known but its memory."""
    if math.isnan(target.chip.flops):
        return None
    products = _dtype_of_products(config.model)
    return step_times(program, flops, chip=target.chip, topology=target.topology, products=products)


def _dtype_of_products(model: ModelConfig) -> str:
    """What most operands of products are in; float32 where only the backward pass rounds them."""
    return "bfloat16" if model.round_products == "both" else model.compute_dtype


def _refused_temporaries(message: str, *, arguments: float) -> float | None:
    """Bytes of temporaries with which the TPU's compiler refuses a program, or None for another error.

    It says either how much they need, or how much the program does in all.
    """
    alone = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    found = alone or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    if found is None:
        return None
    size = float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " "))
    return size if alone else max(0.0, size - arguments)
