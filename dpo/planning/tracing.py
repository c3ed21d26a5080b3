"""The training step traced with shapes in place of weights, and the memory of its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dpo.config import Config
from dpo.data.batch import ROW_FIELDS, Batch
from dpo.huggingface.adapters import add_adapters
from dpo.losses import Objective
from dpo.models.decoder import Decoder
from dpo.models.decoder_config import DecoderConfig
from dpo.models.linear import round_products
from dpo.models.quantized import hold
from dpo.parallel.partition import Partition
from dpo.parallel.sharding import (
    parameter_rules,
    parameter_sharding,
    replicated,
    with_sharding,
)
from dpo.planning.chips import memory_fraction
from dpo.planning.plan import Memory
from dpo.planning.targets import Target, attention_on
from dpo.planning.workloads import Workload, read_hf_config
from dpo.training.adapted import starting_adapters
from dpo.training.device_memory import (
    device_bytes,
    limit_bytes,
    other_bytes,
    saves_between_steps,
    saving_bytes,
)
from dpo.training.placement import batch_sharding
from dpo.training.program import make_program


def trace_step(
    config: Config,
    objective: Objective,
    decoder: DecoderConfig,
    *,
    beta: float,
    mesh: Mesh,
    workload: Workload,
    target: Target,
) -> tuple[Any, Memory]:
    """The step traced with shapes and shardings alone, and the memory of its arguments on one device."""
    trained = nnx.LoRAParam if config.lora.is_on else nnx.Param
    model = _abstract_model(config, decoder, mesh=mesh, target=target)
    graphdef, params, frozen = nnx.split(model, trained, ...)
    params, frozen = nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)
    rules = parameter_rules(config.mesh.rules)
    frozen = with_sharding(frozen, parameter_sharding(mesh, frozen, rules))
    program = make_program(
        config, objective, beta=beta, graphdef=graphdef, params=params, mesh=mesh, num_steps=1000
    )
    state = program.state
    batch = with_sharding(abstract_batch(workload), batch_sharding(mesh))
    sums = jax.ShapeDtypeStruct(
        (workload.prompts, workload.responses), jnp.float32, sharding=replicated(mesh)
    )
    reference = dict.fromkeys(["logps", *objective.reference_sums], sums)
    traced = program.step.trace(state, frozen, batch, reference)  # type: ignore[attr-defined]
    parameters, here = device_bytes((state.params, frozen)), target.topology.kind == "cpu"
    memory = Memory(
        parameters=parameters,
        optimizer=device_bytes(state) - device_bytes(state.params),
        batch=device_bytes((batch, reference)),
        temporaries=0.0,
        process=other_bytes(mesh) if here else 0.0,
        checkpoint=saving_bytes(state, "cpu") if here else 0.0,
        limit=limit_bytes(config.training.memory_limit, target.chip.memory * memory_fraction(target.chip)),
        saves_between_steps=saves_between_steps(config.training),
    )
    return traced, memory


def _abstract_model(config: Config, decoder: DecoderConfig, *, mesh: Mesh, target: Target) -> Decoder:
    """The policy that the settings train, in shapes."""

    def make() -> Decoder:
        model = Decoder(
            decoder,
            rngs=nnx.Rngs(0),
            compute_dtype=jnp.dtype(config.model.compute_dtype),
            remat=config.model.remat,
            attention=attention_on(target, config.model.attention, has_key_bias=decoder.alibi is not None),
            partition=Partition(mesh),
        )
        model.scan_unroll = config.model.scan_unroll
        if config.model.round_products is not None:
            round_products(model, config.model.round_products)
        if config.lora.is_on:
            hold(model, config.lora.base_dtype)
            add_adapters(model, *starting_adapters(config.lora, read_hf_config(config.model.source), seed=0))
        return model

    return nnx.eval_shape(make)


def abstract_batch(workload: Workload) -> Batch:
    """Shapes and dtypes of a step's batch."""
    R, T, N = workload.shape
    P, K = workload.prompts, workload.responses
    shapes = {
        **dict.fromkeys(ROW_FIELDS, (R, T)),
        **dict.fromkeys(("source", "target", "owner"), (R, N)),
        "index": (P,),
    }
    dtypes = {"present": jnp.bool_, "scores": jnp.float32}
    return Batch(
        **{
            name: jax.ShapeDtypeStruct(shapes.get(name, (P, K)), dtypes.get(name, jnp.int32))
            for name in Batch._fields
        }  # type: ignore[arg-type]
    )
