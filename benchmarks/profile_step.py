"""Where one training step goes: each part alone, forward and backward, at the shapes of a real batch.

    python -m benchmarks.profile_step --data pairs.jsonl --remat dots

Prints wall and CPU seconds (the least of several runs) and GFLOP/s of useful arithmetic; on a busy machine
only the CPU seconds mean something. Parts do not overlap; what the whole step takes beyond their sum is
rematerialisation and what XLA moves between them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.bench import SHARED_PAIRS, SHIPPED_PAIRS
from benchmarks.work import count_work, matmul_rate
from dpo.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dpo.losses import make_objective
from dpo.models.attention import attend
from dpo.models.layers import GatedMLP
from dpo.models.log_probs import token_log_probs
from dpo.models.rotary import cos_sin
from dpo.parallel.sharding import make_mesh
from dpo.training.datasets import make_loader
from dpo.training.optimizer import make_optimizer, make_schedule
from dpo.training.policy import load_policy
from dpo.training.program import enable_compilation_cache
from dpo.training.reading import read_dataset
from dpo.training.step import init_state, make_train_step


def main() -> None:
    default = SHARED_PAIRS if SHARED_PAIRS.exists() else SHIPPED_PAIRS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default, help="preferences, JSONL")
    parser.add_argument("--source", default="embedded:smollm2-135m-instruct", help="model")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("--round-products", choices=("neither", "backward", "both"), default=None)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument(
        "--chunk", type=int, default=1024, help="scored tokens that meet the vocabulary at a time"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of every part; the least counts")
    profile(parser.parse_args())


def profile(options: argparse.Namespace) -> None:
    """Build a run, take its first batch, and time its parts."""
    enable_compilation_cache()
    mesh = make_mesh(MeshConfig())
    policy = load_policy(
        ModelConfig(
            source=options.source,
            compute_dtype=options.dtype,
            round_products=options.round_products,
            remat=options.remat,
        ),
        mesh,
    )
    model = policy.merge(policy.params)
    config = model.config
    dtype, layers = jnp.dtype(options.dtype), config.num_layers
    data = DataConfig(train=str(options.data), max_train=options.batch, shuffle=False)
    dataset = read_dataset(data, policy.pretrained.tokenizer).tokens
    loader = make_loader(data, TrainingConfig(batch_size=options.batch), dataset, mesh, num_steps=1)
    host = _measure(lambda: loader.batch(0), options.repeats)
    batch = jax.tree.map(jnp.asarray, loader.batch(0))
    work = count_work(config, batch)
    R, T = batch.tokens.shape
    D, H, G, C = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape).astype(dtype)

    layout = {name: getattr(batch, name) for name in ("positions", "group", "branch")}
    mask = (batch.group != 0)[:, :, None, None].astype(dtype)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(mask * attend(q, k, v, **layout, scale=config.attention_scale))

    graphdef, state = nnx.split(jax.tree.map(lambda leaf: leaf[0], model.layers))

    def mlp(state: Any, x: jax.Array) -> jax.Array:
        block = nnx.merge(graphdef, state)
        assert isinstance(block.mlp, GatedMLP)
        return jnp.sum(block.mlp(x).astype(jnp.float32))

    rope = cos_sin(config.ropes[0], batch.positions, batch.group) if config.ropes else None

    def projections(state: Any, x: jax.Array) -> jax.Array:
        def core(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return q + jnp.repeat(k + v, H // G, axis=2), None

        return jnp.sum(nnx.merge(graphdef, state).self_attn(x, rope, core)[0].astype(jnp.float32))

    def norms(state: Any, x: jax.Array) -> jax.Array:
        block = nnx.merge(graphdef, state)
        return jnp.sum((x + block.post_attention_layernorm(block.input_layernorm(x))).astype(jnp.float32))

    def output(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        return token_log_probs(
            hidden, embedding, batch.target, chunk=options.chunk, rounds_backward=model.rounds != "neither"
        ).sum()

    x, hidden = normal(R, T, D), normal(R, batch.target.shape[1], D)
    heads = normal(R, T, H, C), normal(R, T, G, C), normal(R, T, G, C)
    embedding = model.output_embedding.astype(dtype)
    kernel = 2.0 * D * (2 * H * C + 2 * G * C) * R * T
    parts: list[tuple[str, float, Callable[[], Any], float]] = [
        ("attention", layers, _gradient(attention, (0, 1, 2), *heads), 3 * work.attention / layers),
        ("MLP", layers, _gradient(mlp, (0, 1), state, x), 18.0 * D * config.intermediate_size * R * T),
        ("q, k, v, o projections and rope", layers, _gradient(projections, (0, 1), state, x), 3 * kernel),
        ("norms and residuals", layers, _gradient(norms, (0, 1), state, x), 0.0),
        ("output projection", 1, _gradient(output, (0, 1), hidden, embedding), 3 * work.output),
    ]
    rate = matmul_rate(config, R * T)
    print(f"rows {R} x {T}, {batch.target.shape[1]} scored; float32 products reach {rate / 1e9:.0f} GFLOP/s")
    for name, times, run, flops in parts:
        wall, cpu = _measure(run, options.repeats)
        _report(name, wall * times, cpu * times, flops * times)

    optimizer_config = OptimizerConfig(learning_rate=5e-7, schedule="constant", warmup_fraction=0.0)
    optimizer = make_optimizer(optimizer_config, make_schedule(optimizer_config, 1))
    opt_state = optimizer.init(policy.params)
    gradient = jax.tree.map(jnp.ones_like, policy.params)
    update = jax.jit(optimizer.update)
    _report("optimiser", *_measure(lambda: update(gradient, opt_state, policy.params), options.repeats), 0.0)
    del opt_state, gradient
    _report("host: packing", *host, 0.0)

    train_step = make_train_step(
        policy.graphdef,
        make_objective({"name": "dpo", "beta": 0.1}),
        optimizer=optimizer,
        beta=0.1,
        micro_batches=1,
        chunk=options.chunk,
    )
    held = [init_state(jax.tree.map(jnp.copy, policy.params), optimizer)]
    sums = {"logps": np.zeros(batch.present.shape, np.float32)}

    def step() -> Any:
        held[0], metrics = train_step(held[0], policy.frozen, batch, sums)
        return metrics

    _report("whole step", *_measure(step, options.repeats), work.training)


def _gradient(function: Callable, arguments: tuple[int, ...], *values: Any) -> Callable[[], Any]:
    compiled = jax.jit(jax.value_and_grad(function, arguments))
    return lambda: compiled(*values)


def _measure(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least wall and CPU seconds; the first run compiles and does not count."""
    jax.block_until_ready(run())
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        taken = time.perf_counter() - began[0], time.process_time() - began[1]
        best = [min(pair) for pair in zip(best, taken, strict=True)]
    return best[0], best[1]


def _report(name: str, wall: float, cpu: float, flops: float) -> None:
    rates = f"{flops / wall / 1e9:8.0f} {flops / cpu / 1e9:8.0f}" if flops else f"{'':8} {'':8}"
    print(f"{name:34} {wall:8.3f} s  cpu {cpu:8.3f} s  GFLOP/s by wall, by cpu {rates}", flush=True)


if __name__ == "__main__":
    main()
