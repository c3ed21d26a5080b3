"""What a step of a run's settings needs on devices that need not be there: memory, traffic, time.

The training program of the settings is compiled ahead of time with shapes in place of weights: for a TPU by
the TPU's own compiler, for CPU devices by this machine's. For GPUs the CPU's compiler stands in: how arrays
are split and what is communicated is the same, memory is near, and time is the roofline's.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from dpo.config import Config, MeshConfig, ModelConfig
from dpo.data.batch import ROW_FIELDS, Batch
from dpo.data.packing import Shape
from dpo.data.shapes import Step, plan_shapes
from dpo.data.tokenized import TokenizedDataset
from dpo.huggingface.adapters import add_adapters
from dpo.huggingface.embedded import cache_directory
from dpo.huggingface.pretrained import load_tokenizer, open_checkpoint, read_config
from dpo.huggingface.shapes import SHAPE_PREFIX, read_shape
from dpo.losses import Objective, make_objective, reward_scale
from dpo.models.attention import Implementation, choose_implementation
from dpo.models.decoder import Decoder
from dpo.models.decoder_config import DecoderConfig
from dpo.models.linear import round_products
from dpo.models.quantized import hold
from dpo.outcomes import UserError
from dpo.parallel.partition import DATA, FSDP, ROWS, TENSOR, Partition
from dpo.parallel.sharding import (
    make_mesh,
    parameter_rules,
    parameter_sharding,
    replicated,
    row_multiple,
    with_sharding,
)
from dpo.planning.chips import CHIPS, GPUS_A_HOST, Chip, Topology
from dpo.planning.hlo import Program, read_program
from dpo.planning.roofline import Times, Work, count_flops, forward_flops, step_times
from dpo.planning.travel import Travel, read_travel, split_parameters
from dpo.runs import specification
from dpo.training.adapted import starting_adapters
from dpo.training.datasets import fit_to_objective, make_loader
from dpo.training.memory import (
    candidates,
    device_bytes,
    limit_bytes,
    other_bytes,
    saves_between_steps,
    saving_bytes,
    temporary_bytes,
)
from dpo.training.placement import batch_sharding
from dpo.training.program import count_steps, make_program
from dpo.training.reading import read_dataset


def install_command() -> str:
    """The command that puts the TPU's compiler where only `dpo plan` looks for it."""
    return f"{sys.executable} -m pip install --no-deps --target {cache_directory() / 'libtpu'} libtpu"


class Workload(NamedTuple):
    """The shapes and the work of one step."""

    prompts: int
    responses: int
    """Largest number of responses of a prompt."""
    shape: Shape
    work: Work
    source: str
    """Words that say where the lengths of the sequences come from."""


class Memory(NamedTuple):
    """Memory of one device while a step runs, in bytes, by what it is for."""

    parameters: float
    optimizer: float
    """State of the optimiser, and all else of the training state."""
    batch: float
    temporaries: float
    """Gradient, activations and whatever else the compiler needs."""
    process: float
    """Python and its libraries, where the devices are this machine's CPU; 0 elsewhere."""
    checkpoint: float
    """Copy of the state that is being written, where the devices are this machine's CPU; 0 elsewhere."""
    limit: float
    """Memory that the device has, or that the settings allow."""
    saves_between_steps: bool = False
    """True where the copy for a checkpoint is there while steps run, false where only after the last one."""

    @property
    def total(self) -> float:
        """Most memory that the device is expected to hold at a time, in bytes."""
        step, copy = self.batch + self.temporaries, self.checkpoint
        most = step + copy if self.saves_between_steps else max(step, copy)
        return self.parameters + self.optimizer + self.process + most

    @property
    def free(self) -> float:
        """Bytes that are left below the limit; negative where the step does not fit."""
        return self.limit - self.total


class Plan(NamedTuple):
    """Memory, work and time of one step on one mesh."""

    mesh: dict[str, int]
    workload: Workload
    memory: Memory
    fits: bool
    flops: float
    """Floating-point operations of all devices, those that are done again in the backward pass included."""
    useful_flops: float
    """Floating-point operations of all devices that have to be done once."""
    program: Program | None
    """The compiled program; None (as `travel` and `times`) where the compiler stopped for want of memory."""
    travel: Travel | None
    """Parameters or logits that travel between devices as a whole."""
    times: Times | None
    """Seconds that a step takes at best, by what bounds it."""
    compile_seconds: float
    advice: list[str]
    """Sentences about settings to change, where the step does not fit or is split badly."""


class Target(NamedTuple):
    """Devices to compile for."""

    topology: Topology
    chip: Chip
    devices: list[Any]
    attention: Implementation
    """Of the settings where it is `auto`; else what stands in for it."""
    compiler: str


Lengths = Callable[[Config, Mesh, bool], Workload]
"""The step's shapes on a mesh, with or without long rows."""


def make_plan(config: Config, target: Target, *, decoder: DecoderConfig, lengths: Lengths) -> Plan:
    """Compile the step of the settings for the target and read what came out.

    Raises:
      ValueError: when the mesh does not fit the devices, or the lengths no row.
    """
    objective, beta = make_objective(specification(config)), reward_scale(specification(config))
    mesh = make_mesh(config.mesh, target.devices)
    workload = lengths(config, mesh, target.chip.platform == "cpu")
    traced, memory = trace_step(
        config, objective, decoder, beta=beta, mesh=mesh, workload=workload, target=target
    )
    attention, body = forward_flops(decoder, workload.work)
    flops = count_flops(traced.jaxpr)
    how = choose_implementation(
        attention_on(target, config.model.attention),
        partition=Partition(mesh),
        length=workload.shape.row_length,
        has_key_bias=decoder.alibi is not None,
    )
    if how in ("blocked", "ranges", "splash"):  # a loop over as many blocks as some query sees
        flops += _ATTENTION_PASSES * attention
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
        times = step_times(
            program,
            flops,
            chip=target.chip,
            topology=target.topology,
            products=_dtype_of_products(config.model),
        )
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
    return plan._replace(advice=list(_advice(config, plan, decoder)))


def attention_on(target: Target, setting: Implementation) -> Implementation:
    """The settings' attention, or the target's where its devices stand in for others."""
    return setting if target.attention == "auto" else target.attention


def _dtype_of_products(model: ModelConfig) -> str:
    """What most operands of products are in; float32 where only the backward pass rounds them."""
    return "bfloat16" if model.round_products == "both" else model.compute_dtype


_ATTENTION_PASSES = 3.5
"""Two products forward, five backward (scores are made again): 7 / 2 forward passes."""


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
        limit=limit_bytes(config.training.memory_limit, target.chip.memory),
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
            attention=attention_on(target, config.model.attention),
            partition=Partition(mesh),
        )
        if config.model.round_products is not None:
            round_products(model, config.model.round_products)
        if config.lora.is_on:
            hold(model, config.lora.base_dtype)
            add_adapters(model, *starting_adapters(config.lora, _read_hf_config(config.model.source), seed=0))
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


def make_plan_within_limit(
    config: Config, target: Target, *, decoder: DecoderConfig, lengths: Lengths, log: Callable[[str], None]
) -> Plan:
    """The plan of the settings, or of what `training.memory_limit` chooses in their place.

    Where nothing fits, the plan of the choice with the least memory.
    """
    if config.training.memory_limit is None:
        return make_plan(config, target, decoder=decoder, lengths=lengths)
    mesh = make_mesh(config.mesh, target.devices)

    def scored(micro_batches: int) -> int:
        training = replace(config.training, micro_batches=micro_batches)
        shape = lengths(replace(config, training=training), mesh, target.chip.platform == "cpu").shape
        return shape.rows * shape.scored // micro_batches // row_multiple(mesh)

    plans = []
    for choice in candidates(config, scored):
        plan = make_plan(choice.apply(config), target, decoder=decoder, lengths=lengths)
        log(f"training.memory_limit: {choice.text}: {plan.memory.total / 2**30:.2f} GiB")
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.memory.total)


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
        if num_devices % tensor or decoder.num_heads % tensor or decoder.num_kv_heads % tensor:
            continue
        rest = num_devices // tensor
        middle = 2 ** (max(0, rest.bit_length() - 1) // 2)
        sizes = {1, rest} if tensor == 1 else {1}
        sizes |= {middle} if rest % middle == 0 else set()
        for data in sorted(sizes):
            yield MeshConfig(data=data, fsdp=rest // data, tensor=tensor)


def describe_time(plan: Plan) -> str:
    """One phrase about how long a step takes."""
    if plan.times is None:
        return f"does not fit by {-plan.memory.free / 2**30:.2f} GiB"
    return f"{1e3 * plan.times.hidden:.1f} to {1e3 * plan.times.exposed:.1f} ms a step"


# ---- targets ----


def open_target(topology: Topology) -> Target:
    """Devices of a topology to compile for.

    Raises:
      ValueError: when the TPU's compiler is not there, or there are too few CPU devices to stand for others.
    """
    num_devices = topology.num_devices
    if topology.kind != "cpu" and CHIPS[topology.kind].platform == "tpu":
        chip = CHIPS[topology.kind]
        return Target(topology, chip, _tpu_devices(topology), "auto", f"compiled for {chip.name} by libtpu")
    devices = jax.devices("cpu")[:num_devices]
    if len(devices) < num_devices:
        raise UserError(
            f"{topology.text} needs {num_devices} CPU devices and there are {len(devices)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
        )
    if topology.kind == "cpu":
        chip = measure_cpu(num_devices)
        return Target(
            topology, chip, devices, "auto", "compiled for this machine's CPU, whose rates were measured"
        )
    chip = CHIPS[topology.kind]
    how = f"no compiler for {chip.name} here: split as for it, compiled for CPU devices in its place"
    if num_devices > GPUS_A_HOST:
        how += f"; all as if in one host: the network between hosts of {GPUS_A_HOST} is not counted"
    return Target(topology, chip, devices, "plain", how)


def _tpu_devices(topology: Topology) -> list[Any]:
    size = "x".join(map(str, topology.axes))
    options = {}
    if topology.num_devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(f"{topology.kind}:{size}", platform="tpu", **options)
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        if "TPU support not installed" in str(error):
            raise UserError(
                f"topology {topology.text} needs the TPU's compiler, which is not there. Install it apart "
                f"from this environment, where JAX would look for a TPU at every start: {install_command()} "
                "(or set TPU_LIBRARY_PATH to a libtpu.so)"
            ) from error
        raise UserError(f"topology {topology.text}: {error}") from error
    return list(described.devices)


def measure_cpu(num_devices: int) -> Chip:
    """Rates of this machine's CPU, measured for half a second, and its memory; each device has its share."""
    left, right = jnp.ones((2048, 1024), jnp.float32), jnp.ones((1024, 2048), jnp.float32)
    product = jax.jit(jnp.matmul)
    rate = 2 * 2048 * 1024 * 2048 / _least_seconds(lambda: product(left, right))
    array = jnp.ones(2**25, jnp.float32)
    double = jax.jit(lambda x: 2 * x)
    bandwidth = 2 * array.nbytes / _least_seconds(lambda: double(array))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shares = (x / num_devices for x in (rate, rate, memory, bandwidth, bandwidth))
    return Chip("this CPU", "cpu", *shares, hop_seconds=1e-5)


def _least_seconds(run: Callable[[], jax.Array]) -> float:
    run().block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


# ---- shapes ----


def read_decoder(source: str) -> DecoderConfig:
    """The decoder of a shipped shape (shape:NAME) or of any model source; weights are not read."""
    return read_config(_read_hf_config(source))[1]


def _read_hf_config(source: str) -> dict[str, Any]:
    """What config.json says."""
    return read_shape(source) if source.startswith(SHAPE_PREFIX) else open_checkpoint(source).config


def assumed_lengths(*, prompt: int, response: int, responses: int) -> Lengths:
    """Every prompt and every response of the same length."""

    def lengths(config: Config, mesh: Mesh, long_rows: bool) -> Workload:
        P = config.training.batch_size
        plan = plan_shapes(
            [Step([prompt] * P, [[response] * responses] * P)],
            layout=config.data.layout,
            row_length=config.data.row_length,
            micro_batches=config.training.micro_batches,
            rows_multiple=row_multiple(mesh),
            long_rows=long_rows,
        )
        sequences = P * responses * (prompt + response)
        work = Work(
            tokens=float(plan.tokens[0]),
            sequence_tokens=sequences,
            visible=P
            * _visible(np.asarray([prompt]), np.asarray([[response] * responses]), config.data.layout),
            scored=P * responses * response,
        )
        source = f"assumed: prompts of {prompt} tokens, {responses} responses of {response}"
        return Workload(P, responses, plan.shapes[-1], work, source)

    return lengths


def data_lengths(tokens: TokenizedDataset) -> Lengths:
    """The largest shape of a run over the data, and the mean work of its prompts."""

    def lengths(config: Config, mesh: Mesh, long_rows: bool) -> Workload:
        loader = make_loader(
            config.data, config.training, tokens, mesh, num_steps=count_steps(config.training, len(tokens))
        )
        P, report = config.training.batch_size, loader.report()
        responses = tokens.response_lengths
        work = Work(
            tokens=report["tokens"] / report["steps"],
            sequence_tokens=report["tokens_unshared"] / report["steps"],
            visible=P * _visible(tokens.prompt_lengths, responses, config.data.layout),
            scored=P * float(tokens.scored_lengths.sum(1).mean()),
        )
        source = f"{config.data.train}, the largest of {len(loader.shapes)} shapes"
        return Workload(P, tokens.max_responses, loader.shapes[-1], work, source)

    return lengths


def choose_lengths(config: Config, *, prompt: int | None, response: int | None, responses: int) -> Lengths:
    """Assumed lengths where they are given, else those of the training data.

    Raises:
      ValueError: when only one is given, or none and the model is a shape without a tokenizer, or when the
        data do not fit the objective.
    """
    if prompt is not None and response is not None:
        return assumed_lengths(prompt=prompt, response=response, responses=responses)
    if prompt is not None or response is not None or config.model.source.startswith(SHAPE_PREFIX):
        raise UserError(
            f"prompt_tokens is {prompt} and response_tokens is {response}; both are needed for a model that "
            f"is a shape (model.source is {config.model.source!r}), or neither: then the data's lengths count"
        )
    dataset = read_dataset(config.data, load_tokenizer(config.model.source))
    objective = make_objective(specification(config))
    return data_lengths(fit_to_objective(dataset, objective, seed=config.training.seed).tokens)


def _visible(prompts: np.ndarray, responses: np.ndarray, layout: str) -> float:
    """Mean number of (query, key) pairs of a prompt and its responses."""
    prompts = prompts.astype(np.float64)[:, None]
    own = np.where(responses > 0, prompts * responses + responses * (responses + 1) / 2, 0).sum(1)
    repeats = 1 if layout == "shared" else (responses > 0).sum(1)
    return float((own + repeats * (prompts * (prompts + 1) / 2)[:, 0]).mean())


# ---- reading ----


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


def _advice(config: Config, plan: Plan, decoder: DecoderConfig) -> Iterator[str]:
    """What to change, the most useful first."""
    partition = {axis: plan.mesh[axis] for axis in (*ROWS, TENSOR)}
    tensor = partition[TENSOR]
    if decoder.num_heads % tensor or decoder.num_kv_heads % tensor:
        yield (
            f"mesh.tensor {tensor} does not divide {decoder.num_heads} query and {decoder.num_kv_heads} key "
            "heads: attention is computed by every device of the axis"
        )
    if plan.fits:
        yield from _smaller_groups(plan)
        return
    memory, parts = plan.memory, partition["data"] * partition["fsdp"]
    held = memory.parameters + memory.optimizer
    if held > 0.5 * memory.limit and partition["data"] > 1:
        yield f"mesh.fsdp {parts} instead of {partition['fsdp']}: the state takes {held / 2**30:.2f} GiB"
    if plan.workload.shape.rows > parts * config.training.micro_batches:
        yield f"training.micro_batches {2 * config.training.micro_batches}: half the rows at a time"
    if config.model.remat != "full":
        yield "model.remat full: only a layer's input is kept"
    if config.model.compute_dtype == "float32":
        yield "model.compute_dtype bfloat16: half the activations"
    chunk = min(config.model.log_prob_chunk, plan.workload.shape.rows * plan.workload.shape.scored)
    if chunk * decoder.vocab_size * 8 / tensor > 0.1 * memory.limit:
        yield f"model.log_prob_chunk {config.model.log_prob_chunk // 2}: half the logits at a time"
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
