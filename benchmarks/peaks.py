"""Peaks of memory: of training, of going on from a checkpoint, and of an export, full and with adapters.

    python -m benchmarks.peaks [--model SOURCE] [--length 128]

Each is a process of its own on the first rows of data/sentiment_train.jsonl: training is stopped after two
updates, as by a signal, and goes on for two more. Printed are, above what the process holds before it reads
a model: the peak of its resident memory, the most bytes of JAX's arrays at any time (looked at every 10 ms),
and the device's own peak where its allocator says one; beside them the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

MODEL = "embedded:smollm2-135m-instruct"
SHIPPED = Path(__file__).parents[1] / "data" / "sentiment_train.jsonl"
PARTS = ("training", "going on", "export", "export, bfloat16")
KINDS = ("full", "lora")
MB = 1e6


def main() -> None:
    """Measure, and print a table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--length", type=int, default=128, help="data.max_length")
    parser.add_argument("--child", nargs=3, metavar=("PART", "KIND", "DIRECTORY"), help="(of a child)")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child, model=options.model, length=options.length)))
        return
    print("| weights | part | host, MB | arrays, MB | device, MB |", "|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory(prefix="peaks_") as scratch:
        for kind in KINDS:
            for part in PARTS:
                print(row(kind, part, ask(part, kind, scratch, options)), flush=True)


def ask(part: str, kind: str, scratch: str, options: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peaks", "--model", options.model]
    command += ["--length", str(options.length), "--child", part, kind, scratch]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(kind: str, part: str, found: dict[str, float]) -> str:
    """A line of the table."""
    device = f"{found['device'] / MB:.0f}" if found["device"] else "–"
    return f"| {kind} | {part} | {found['host'] / MB:.0f} | {found['arrays'] / MB:.0f} | {device} |"


def measure(part: str, kind: str, directory: str, *, model: str, length: int) -> dict[str, float]:
    """Do one part, and say what it took."""
    from dpo.training.device_memory import resident_bytes
    from dpo.training.export import export_checkpoint  # with all libraries

    work = work_of(part, kind, Path(directory), model=model, length=length, export=export_checkpoint)
    before = resident_bytes()
    arrays = most_array_bytes(work)
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"host": peak - before, "arrays": arrays, "device": stats.get("peak_bytes_in_use", 0)}


def work_of(
    part: str, kind: str, directory: Path, *, model: str, length: int, export: Callable[..., object]
) -> Callable[[], object]:
    """What is measured."""
    from dpo.config import Config, DataConfig, ExportConfig, LoraConfig, ModelConfig, TrainingConfig
    from dpo.training.loop import train

    rows = directory / "rows.jsonl"
    with SHIPPED.open(encoding="utf-8") as given:
        rows.write_text("".join(islice(given, 8)), encoding="utf-8")
    config = Config(
        run_dir=str(directory / kind),
        model=ModelConfig(source=model, remat="full"),
        data=DataConfig(train=str(rows), eval=str(rows), max_length=length),
        training=TrainingConfig(steps=4, batch_size=4, eval_every=2),
        lora=LoraConfig(rank=16) if kind == "lora" else LoraConfig(),
    )
    if part == "training":
        return lambda: train(config, observe=stop_at_two)
    if part == "going on":
        return lambda: train(config)
    dtype = "bfloat16" if "bfloat16" in part else "float32"
    given = ExportConfig(run=config.run_dir, output=str(directory / "export"), dtype=dtype)
    return lambda: export(given, replace(config))


def stop_at_two(step: int, _: object) -> dict[str, float]:
    """As a scheduler does it."""
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return {}


def most_array_bytes(work: Callable[[], object]) -> float:
    """Do the work, and look at the arrays there are meanwhile."""
    import jax

    from dpo.training.device_memory import array_bytes

    most, done = 0.0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.01):
            with suppress(RuntimeError):  # an array was deleted meanwhile
                most = max(most, array_bytes(jax.local_devices()))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most


if __name__ == "__main__":
    main()
