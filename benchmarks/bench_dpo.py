"""Our side: the first training steps of an epoch over a file, timed; prints one JSON line.

    python -m benchmarks.bench_dpo --data pairs.jsonl --batch 8 --steps 6 --dtype float32

The reference's log-probs of the steps' rows are computed first, as a run does, and their time is reported per
prompt, so that an epoch's rate can include it. Shapes are planned over the whole file. Compilation is timed
apart. Data order is the file's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROFILED_STEPS = 4


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.device != "default":
        os.environ["JAX_PLATFORMS"] = "cuda" if options.device == "gpu" else str(options.device)
    print(json.dumps(measure(options)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="preferences, JSONL")
    parser.add_argument("--source", default="embedded:smollm2-135m-instruct", help="model")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("--round-products", choices=("neither", "backward", "both"), default=None)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--layout", choices=("padded", "packed", "shared"), default="shared")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--row-length", type=int, default=None)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--chunk", type=int, default=1024, help="scored tokens that meet the vocabulary at a time"
    )
    parser.add_argument(
        "--lora-rank", type=int, default=None, help="train adapters of this rank, not the model"
    )
    parser.add_argument("--dora", action="store_true", help="adapters are DoRA's")
    parser.add_argument("--base-dtype", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--attention", default="auto", help="as model.attention")
    parser.add_argument("--scan-unroll", type=int, default=1, help="as model.scan_unroll")
    parser.add_argument("--first-moment", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the device's share of one step's time, of steps not waited for",
    )
    parser.add_argument("--device", choices=("default", "cpu", "gpu", "tpu"), default="default")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build a run as `dpo.training.loop` does, take its steps, and say what they took."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.work import count_work, matmul_rate, num_pairs, pair_tokens
    from dpo.config import (
        Config,
        DataConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        TrainingConfig,
    )
    from dpo.losses import make_objective
    from dpo.models.attention import choose_implementation
    from dpo.parallel.partition import Partition
    from dpo.parallel.sharding import make_mesh
    from dpo.planning.roofline import looped_flops
    from dpo.training.adapted import open_policy
    from dpo.training.datasets import make_loader, scoring_loader
    from dpo.training.optimizer import make_optimizer, make_schedule
    from dpo.training.placement import place_batch
    from dpo.training.policy import make_score
    from dpo.training.program import enable_compilation_cache
    from dpo.training.reading import read_dataset
    from dpo.training.reference import ReferenceStore, score_rows
    from dpo.training.step import init_state, make_train_step

    enable_compilation_cache()
    num_steps = options.warmup + options.steps
    model = ModelConfig(
        source=options.source,
        compute_dtype=options.dtype,
        round_products=options.round_products,
        remat=options.remat,
        log_prob_chunk=options.chunk,
        attention=options.attention,
        scan_unroll=options.scan_unroll,
    )
    data = DataConfig(
        train=str(options.data),
        max_length=options.max_length,
        layout=options.layout,
        row_length=options.row_length,
        shuffle=False,
    )
    training = TrainingConfig(batch_size=options.batch, micro_batches=options.micro_batches)
    optimizer_config = OptimizerConfig(
        learning_rate=5e-7, schedule="constant", warmup_fraction=0.0, first_moment=options.first_moment
    )

    mesh = make_mesh(MeshConfig())
    lora = LoraConfig(rank=options.lora_rank, use_dora=options.dora, base_dtype=options.base_dtype)
    policy = open_policy(Config(model=model, lora=lora), mesh)
    num_trained, num_frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (policy.params, policy.frozen)
    )
    config = policy.pretrained.model.config
    read = read_dataset(data, policy.pretrained.tokenizer)
    dataset = read.tokens
    epoch = len(dataset) // options.batch
    if epoch < num_steps:
        raise SystemExit(f"{options.data} has {len(dataset)} rows; {num_steps * options.batch} are needed")
    loader = make_loader(data, training, dataset, mesh, num_steps=epoch)
    batches = [loader.batch(step) for step in range(num_steps)]

    # Reference: the steps' rows once, without a gradient. The first batch of each shape compiles.
    reference_policy = policy.base or policy
    score = make_score(reference_policy, mesh, chunk=options.chunk)(reference_policy.params)
    scoring = scoring_loader(data, dataset, mesh)
    scored = range(-(-num_steps * options.batch // len(scoring.indices(0))))
    compiling = time.perf_counter()
    for step in {scoring.shape(step): step for step in scored}.values():
        score(scoring.batch(step))
    scoring_compile = time.perf_counter() - compiling
    began = _clock()
    rows = score_rows(
        score,
        scoring.batches(0, scored.stop),
        num_rows=len(dataset),
        num_responses=dataset.max_responses,
        locate=read.location,
    )
    reference_time = _since(began)
    num_scored = sum(int((scoring.indices(step) >= 0).sum()) for step in scored)
    reference = ReferenceStore(rows)

    # Step.
    optimizer = make_optimizer(optimizer_config, make_schedule(optimizer_config, num_steps))
    train_step = make_train_step(
        policy.graphdef,
        make_objective({"name": "dpo", "beta": 0.1}),
        optimizer=optimizer,
        beta=0.1,
        micro_batches=options.micro_batches,
        chunk=options.chunk,
    )
    state = jax.jit(lambda params: init_state(params, optimizer), donate_argnums=0)(policy.params)
    frozen, policy = policy.frozen, policy._replace(params=None)
    compiling = time.perf_counter()
    compiled, memory, forecasts = {}, {}, {}
    for step, batch in enumerate(batches):
        shape = loader.shape(step)
        if shape not in compiled:
            sums = reference.lookup(np.asarray(batch.index))
            traced = train_step.trace(state, frozen, place_batch(mesh, batch), sums)  # type: ignore[attr-defined]
            compiled[shape] = traced.lower().compile()
            memory[shape] = _program_bytes(compiled[shape])
            how = choose_implementation(
                options.attention,
                partition=Partition(mesh),
                length=shape.row_length,
                has_key_bias=config.alibi is not None,
            )
            unseen = looped_flops(how, count_work(config, batch).attention)
            forecasts[shape] = _forecast(traced, compiled[shape], options.dtype, jax.devices(), unseen)
    step_compile = time.perf_counter() - compiling

    times, cpu_times, losses = [], [], []
    for step, batch in enumerate(batches):
        began = _clock()
        sums = reference.lookup(np.asarray(batch.index))
        state, metrics = compiled[loader.shape(step)](state, frozen, place_batch(mesh, batch), sums)
        losses.append(float(jax.block_until_ready(metrics)["loss"]))
        wall, cpu = _since(began)
        print(f"step {step + 1} {wall:.2f} s, cpu {cpu:.2f} s, loss {losses[-1]:.4f}", file=sys.stderr)
        times.append(wall)
        cpu_times.append(cpu)
    share = None
    if options.profile:  # the last batch again, which has been compiled
        again = compiled[loader.shape(num_steps - 1)]
        state, share = _profile(again, state, frozen, place_batch(mesh, batches[-1]), sums)
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    timed = range(options.warmup, num_steps)
    indices = [np.asarray(batches[step].index) for step in timed]
    shapes = [loader.shape(step) for step in timed]
    tokens = sum(pair_tokens(dataset, rows) for rows in indices)
    seconds, cpu_seconds = sum(times[options.warmup :]), sum(cpu_times[options.warmup :])
    reference_seconds = reference_time[0] / num_scored * options.batch * options.steps
    reference_cpu = reference_time[1] / num_scored * options.batch * options.steps
    work = [count_work(config, batches[step]) for step in timed]
    rate = matmul_rate(config, shapes[0].rows * shapes[0].row_length)
    useful = sum(one.training if lora.rank is None else one.adapter_training for one in work)
    device = jax.devices()[0]
    return {
        "tool": "dpo",
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "jax": jax.__version__,
        "dtype": options.dtype,
        "remat": options.remat,
        "layout": options.layout,
        "lora_rank": options.lora_rank,
        "base_dtype": options.base_dtype,
        "trained_parameters": num_trained,
        "frozen_parameters": num_frozen,
        "micro_batches": options.micro_batches,
        "batch": options.batch,
        "pairs_per_step": sum(num_pairs(dataset, rows) for rows in indices) / options.steps,
        "step_seconds": times[options.warmup :],
        "seconds_per_step": statistics.median(times[options.warmup :]),
        "cpu_seconds_per_step": cpu_seconds / options.steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_with_reference": tokens / (seconds + reference_seconds),
        "tokens_per_cpu_second_with_reference": tokens / (cpu_seconds + reference_cpu),
        "reference_seconds_per_step": reference_seconds / options.steps,
        "pair_tokens": tokens,
        "fill": sum(int((batches[s].group != 0).sum()) for s in timed)
        / sum(shape.rows * shape.row_length for shape in shapes),
        "shapes": [list(shape) for shape in sorted(set(shapes))],
        "tokens_computed_per_step": sum(int((batches[s].group != 0).sum()) for s in timed) / options.steps,
        "forecast_seconds": forecasts[shapes[-1]],
        "device_share": share,
        "useful_flops_per_step": useful / options.steps,
        "work_parts": {
            part: sum(getattr(one, part) for one in work) / sum(one.forward for one in work)
            for part in work[0]._fields
        },
        "matmul_flops_per_second": rate,
        "mfu": useful / seconds / rate / len(jax.devices()),
        "mfu_with_reference": (useful + sum(one.forward for one in work))
        / (seconds + reference_seconds)
        / rate
        / len(jax.devices()),
        "peak_rss_gib": peak_rss,
        "device_peak_gib": _device_peak(device),
        "program_gib": max(memory.values()) / 2**30,
        "compile_seconds": {"reference": scoring_compile, "step": step_compile},
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "loadavg": os.getloadavg()[0],
        "parameters_dtype": str(jnp.dtype(jax.tree.leaves(state.params)[0].dtype)),
    }


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _program_bytes(compiled: Any) -> int:
    """What a compiled step needs: arguments, results that do not reuse them, and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _forecast(
    traced: Any, compiled: Any, dtype: str, devices: list[Any], unseen_flops: float
) -> float | None:
    """Seconds of a step, reckoned from its program as `dpo plan` does; None for an unknown device.

    `unseen_flops` are those of attention that are in no product of the program.
    """
    from dpo.planning.chips import CHIPS, Topology, chip_named
    from dpo.planning.hlo import read_program
    from dpo.planning.roofline import count_flops, step_times

    kind = chip_named(devices[0].device_kind)
    if kind is None:
        return None
    program, topology = read_program(compiled.as_text() or "", len(devices)), Topology(kind, (len(devices),))
    flops = count_flops(traced.jaxpr) + unseen_flops
    return step_times(program, flops, chip=CHIPS[kind], topology=topology, products=dtype).hidden


def _profile(step: Any, state: Any, frozen: Any, batch: Any, sums: Any) -> tuple[Any, float | None]:
    """A few steps that nobody waits for: the state after them, and the device's share of their time."""
    import jax

    from dpo.training.profile import device_share

    with tempfile.TemporaryDirectory(prefix="bench_dpo_") as directory:
        with jax.profiler.trace(directory):
            for _ in range(PROFILED_STEPS):
                state, metrics = step(state, frozen, batch, sums)
            jax.block_until_ready(metrics)
        return state, device_share(Path(directory), between_steps=False).share


def _device_peak(device: Any) -> float | None:
    """Peak bytes that the device's allocator handed out, where it counts them (not on a CPU)."""
    statistics_of_device = device.memory_stats()
    return None if statistics_of_device is None else statistics_of_device["peak_bytes_in_use"] / 2**30


if __name__ == "__main__":
    main()
