"""A short run of `dpo train`'s own loop under JAX's profiler; prints one JSON line.

    python -m benchmarks.profile_loop --source DIR --data pairs.jsonl --batch 8 --dtype bfloat16

For how much of its steps' time the device works, with the run's data, packing, prefetch, metrics and logs:
what `training.profiler_steps` says. The run directory is a temporary one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.device != "default":
        os.environ["JAX_PLATFORMS"] = "cuda" if options.device == "gpu" else str(options.device)
    with tempfile.TemporaryDirectory(prefix="profile_loop_") as directory:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(options, Path(directory))
        print(json.dumps(found))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="preferences, JSONL")
    parser.add_argument("--source", default="embedded:smollm2-135m-instruct", help="model")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--steps", type=int, default=10, help="traced steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--chunk", type=int, default=1024, help="scored tokens that meet the vocabulary at a time"
    )
    parser.add_argument("--device", choices=("default", "cpu", "gpu", "tpu"), default="default")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train for as long as the trace needs, and read it."""
    import jax

    from dpo.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
    from dpo.runs import METRICS_FILE, PROFILE_DIRECTORY, read_metrics
    from dpo.training.loop import train
    from dpo.training.profile import device_share

    result = train(
        Config(
            run_dir=str(directory / "run"),
            model=ModelConfig(
                source=options.source,
                compute_dtype=options.dtype,
                log_prob_chunk=options.chunk,
                reference_store=str(directory / "reference"),
            ),
            data=DataConfig(train=str(options.data), eval=None, max_length=options.max_length),
            optimizer=OptimizerConfig(learning_rate=5e-7),
            training=TrainingConfig(
                batch_size=options.batch,
                steps=options.warmup + options.steps,
                profiler_skip=options.warmup,
                profiler_steps=options.steps,
            ),
        )
    )
    share, seconds = device_share(result.run_dir / PROFILE_DIRECTORY)
    lines = read_metrics(result.run_dir / METRICS_FILE)[options.warmup :]
    return {
        "tool": "dpo train",
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "steps": options.steps,
        "device's share of the loop": share,
        "profiled seconds": seconds,
        "median seconds a step": statistics.median(line["seconds"] for line in lines),
        "tokens/s": statistics.median(line["tokens/s"] for line in lines),
    }


if __name__ == "__main__":
    main()
