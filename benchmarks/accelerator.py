"""One table of this project beside TRL on one accelerator, in minutes.

    python -m benchmarks.accelerator --out DIR [--minutes 8] [--only PART,PART] [--rehearse]

Cells stand in order of worth. Each runs in a process of its own within a limit; its line is printed and
appended to DIR/cells.jsonl at once, so that a run that is cut off anywhere keeps what it has. What the
programs said is in DIR/logs.txt. Models and pairs are made on the spot (`benchmarks.accelerator_inputs`);
nothing is fetched. On a machine without network, install what `benchmarks/accelerator_wheels.sh` gathered.

`--rehearse` runs the same cells on a CPU with a tiny model and one step, so that no minute of an accelerator
is spent on a typo.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accelerator_cells import CELLS, TINY, Cell
from benchmarks.programs import run_program
from dpo.planning.chips import CHIPS, FRACTIONS, chip_named

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
    "torch",
    "trl",
    "peft",
)
OF_THEIR_OWN = ("benchmarks.check_attention", "benchmarks.profile_loop")
"""Programs that are given their steps and device by their cells, or have none."""
LOOKED_AT = ("disagree", "failed", "device's share of the loop", "median seconds a step", "tokens/s")
"""Of their results."""
NO_CARD = "none"
STEPS = "steps"
"""Name of the check that is no cell."""
LEAST_SECONDS = 25
"""A cell that has less left does not begin."""
MEMORY_FRACTION = "0.92"
"""Of the card's memory for JAX, whose default is three quarters: nobody else is there while a cell runs."""
ONE_CARD = {"CUDA_VISIBLE_DEVICES": "0"}
"""Of a machine that has more, unless it is told otherwise: all figures are of one."""
REHEARSAL_SLOWNESS = 10
"""How many times as long a cell may take on a CPU that others use too."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    open_results(options.out)
    stop = time.monotonic() + 60 * options.minutes
    begin = facts()
    record(options.out, begin)
    if begin["card"] == NO_CARD and not options.rehearse:
        raise SystemExit("nvidia-smi names no card; --rehearse runs the cells on a CPU")
    prepare_inputs(options)
    if options.only is None or any(part in STEPS for part in options.only.split(",")):
        for line in check_steps(options, stop):
            record(options.out, line)
    for cell in CELLS:
        if options.only and not any(part in cell.name for part in options.only.split(",")):
            continue
        if missing := [package for package in needed(cell) if _version(package) is None]:
            record(options.out, {"cell": cell.name, "left out": f"not installed: {', '.join(missing)}"})
            continue
        left = stop - time.monotonic()
        if left < LEAST_SECONDS:
            record(options.out, {"cell": cell.name, "left out": "no time"})
            continue
        record(options.out, run(cell, options, min(cell.seconds, left)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument(
        "--inputs", type=Path, default=Path("/tmp/accelerator_inputs"), help="models and pairs"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="no cell begins later")
    parser.add_argument("--only", default=None, help="parts of names, with commas; steps is a check")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU: a tiny model, one step a cell")
    options = parser.parse_args(arguments)
    for part in [] if options.only is None else options.only.split(","):
        if not part or not any(part in name for name in (STEPS, *(cell.name for cell in CELLS))):
            names = ", ".join((STEPS, *(cell.name for cell in CELLS)))
            parser.error(f"--only has {part!r}; allowed are parts of these names: {names}")
    return options


def open_results(out: Path) -> None:
    """See that lines can be kept before anything is computed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cells.jsonl").open("a").close()
    except OSError as error:
        raise SystemExit(f"--out is {out}: {error}; allowed: a directory that can be written") from error


def prepare_inputs(options: argparse.Namespace) -> None:
    """Make models and pairs that are not there yet."""
    from benchmarks.accelerator_inputs import REHEARSED, SHAPES, make_inputs

    names = REHEARSED if options.rehearse else ("tiny", *SHAPES)
    make_inputs(options.inputs, names, rows=24 if options.rehearse else 512)


def needed(cell: Cell) -> tuple[str, ...]:
    """Packages that a cell needs and a machine may lack."""
    if not cell.name.startswith("trl"):
        return requirements()
    return ("trl", "torch", *(("peft",) if "--lora-rank" in cell.arguments else ()))


@cache
def requirements() -> tuple[str, ...]:
    """Packages without which nothing of the project runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return tuple(re.split(r"[^\w.-]", text)[0] for text in project["dependencies"])


def facts() -> dict[str, Any]:
    """The card, the versions, and what is missing for some cells."""
    versions = {package: _version(package) for package in PACKAGES}
    missing = [
        package for package in dict.fromkeys((*PACKAGES, *requirements())) if _version(package) is None
    ]
    return {"card": card(), "python": sys.version.split()[0], "versions": versions, "missing": missing}


def check_steps(options: argparse.Namespace, stop: float) -> Iterator[dict[str, Any]]:
    """Ten float32 steps of the tiny model on the accelerator and on the CPU have the same curves."""
    curves = {}
    for kind in ("cpu",) if options.rehearse else ("cpu", "cuda"):
        left = stop - time.monotonic()
        if left < LEAST_SECONDS:
            yield {"check": f"steps {kind}", "left out": "no time"}
            continue
        target = options.out / f"steps_{kind}"
        shutil.rmtree(target, ignore_errors=True)  # a finished run of before would stand, with its numbers
        arguments = [
            *("-m", "dpo", "train", "--model.source", str(options.inputs / "tiny"), "--run_dir", str(target)),
            *("--data.train", str(options.inputs / "hh.jsonl"), "--training.batch_size", "2"),
            *("--training.steps", "10", "--optimizer.learning_rate", "1e-3"),
        ]
        limit = min(150, left) * (REHEARSAL_SLOWNESS if options.rehearse else 1)
        code, _, errors = _python(arguments, options.out, f"steps {kind}", limit, {"JAX_PLATFORMS": kind})
        lines = (target / "metrics.jsonl").read_text().splitlines() if code == 0 else []
        rows = [row for row in map(json.loads, lines) if "grad_norm" in row]
        curves[kind] = curves_of(rows)
        if not rows:
            yield {"check": f"steps {kind}", "failed": code, "last": errors.strip().splitlines()[-3:]}
    for kind in list(curves)[1:]:
        worst = [_worst(a, b) for a, b in zip(curves["cpu"], curves[kind], strict=True)]
        yield {
            "check": f"steps {kind} against cpu",
            "loss, relative": worst[0],
            "gradient norm, relative": worst[1],
        }


def curves_of(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of metric lines."""
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows]


def _worst(expected: list[float], found: list[float]) -> float | None:
    pairs = list(zip(expected, found, strict=False))
    return max((abs(a - b) / abs(a) for a, b in pairs), default=None)


def run(cell: Cell, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """The line of one cell: its figures, or how it failed."""
    began = time.monotonic()
    arguments = [argument.replace("{inputs}", str(options.inputs)) for argument in cell.arguments]
    if cell.arguments[1] not in OF_THEIR_OWN:
        arguments += ["--steps", "6", "--warmup", "2", "--device", "gpu"]
    if options.rehearse:
        arguments, limit = rehearsed(arguments), limit * REHEARSAL_SLOWNESS
    platform = {"JAX_PLATFORMS": "cpu" if options.rehearse else "cuda"}  # else a GPU that fails is a CPU
    code, output, errors = _python(arguments, options.out, cell.name, limit, platform)
    line: dict[str, Any] = {"cell": cell.name, "seconds": round(time.monotonic() - began)}
    result, said = last_result(output), errors if code != 0 else output
    if code != 0 or result is None:
        last = [text for text in said.splitlines() if text.strip()][-3:]
        so_far = {} if result is None else {"all": result}
        return line | {"failed": code if code != 0 else "no result", "last": last} | so_far
    return line | short(result) | {"all": result}


def last_result(output: str) -> dict[str, Any] | None:
    """The last line of a program's output, where it is a JSON object."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def rehearsed(arguments: list[str]) -> list[str]:
    """The same command for a CPU: the tiny model, two prompts, one step, attention as the CPU has it."""
    steps = "3" if "benchmarks.profile_loop" in arguments else "1"  # the fewest that have one between them
    small = {"--steps": steps, "--warmup": "1", "--device": "cpu", "--batch": "2", "--chunk": "64"}
    changed = list(arguments)
    for flag, value in small.items():
        if flag in changed:
            changed[changed.index(flag) + 1] = value
    for flag in ("--source", "--model"):
        if flag in changed:
            place = changed.index(flag) + 1
            source = Path(changed[place])
            changed[place] = str(source.with_name(TINY.get(source.name, "tiny")))
    if "--micro-batches" in changed:
        place = changed.index("--micro-batches") + 1
        changed[place] = str(min(2, int(changed[place])))
    if "--attention" in changed:
        changed[changed.index("--attention") + 1] = "auto"
    if "benchmarks.check_attention" in changed:
        changed += ["--tokens", "80", "--heads", "2", "1", "16", "--repeats", "1"]
    return changed


def short(result: dict[str, Any]) -> dict[str, Any]:
    """What one looks at first."""
    if "seconds_per_step" not in result:
        return {name: value for name, value in result.items() if name in LOOKED_AT}
    seconds = result["seconds_per_step"]
    found = {
        "pairs/s": round(result["pairs_per_step"] / seconds, 2),
        "tokens/s, prompt twice": round(result["tokens_per_second"]),
        "forecast GiB": result.get("program_gib") and round(result["program_gib"], 2),
        "peak GiB": result.get("device_peak_gib") and round(result["device_peak_gib"], 2),
        "first loss": result["first_loss"],
        "last loss": result["last_loss"],
    }
    if "useful_flops_per_step" in result:
        found |= {
            "tokens/s, computed once": round(result["tokens_computed_per_step"] / seconds),
            "compile s": {key: round(value, 1) for key, value in result["compile_seconds"].items()},
            "device's share": result.get("device_share"),
            "forecast s": result.get("forecast_seconds"),
            "step s": seconds,
        }
        peak = peak_flops(card())
        if peak is not None:
            found["MFU of the card's peak"] = round(result["useful_flops_per_step"] / seconds / peak, 4)
    return found


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the card that nvidia-smi names so."""
    kind = chip_named(name)
    return None if kind is None else CHIPS[kind].flops


def card() -> str:
    """Name and driver of the first GPU, or none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return NO_CARD
    return done.stdout.strip().splitlines()[0]


def record(out: Path, line: dict[str, Any]) -> None:
    """Print a line without its details, and keep it whole, at once."""
    with (out / "cells.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({key: value for key, value in line.items() if key != "all"}), flush=True)


def _python(
    arguments: list[str], out: Path, name: str, limit: float, variables: dict[str, str]
) -> tuple[int | str, str, str]:
    """Exit code (or "time"), output and errors of a program, which are kept in the log."""
    command = [sys.executable, *arguments]
    environment = ONE_CARD | os.environ | variables | {"HF_HUB_OFFLINE": "1"}
    if not any(os.environ.get(name) for name in FRACTIONS):
        environment |= {FRACTIONS[0]: MEMORY_FRACTION}
    code, output, errors = run_program(command, limit=limit, environment=environment, directory=ROOT)
    with (out / "logs.txt").open("a") as log:
        log.write(f"### {name}\n$ {' '.join(command)}\n{errors[-6000:]}\n{output[-6000:]}\n")
    return code, output, errors


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the cell's process, too
    main()
