"""The plan that docs/scaling.md prints is what `dpo plan` prints of those numbers, and they fit together.

Compiling it takes a TPU's compiler ten minutes; what that found (bytes, counts, operations) is read from the
page. All else is computed: shapes from the settings, times from a chip's rates, sums, and how it is written.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from dpo.command_line import load_config
from dpo.huggingface.shapes import read_shape
from dpo.parallel.sharding import make_mesh
from dpo.planning.chips import CHIPS, GIB, Chip, parse_topology
from dpo.planning.hlo import Collective, Program
from dpo.planning.plan import Memory, Plan
from dpo.planning.plan_text import plan_as_text
from dpo.planning.roofline import Times
from dpo.planning.targets import Target
from dpo.planning.travel import Travel
from dpo.planning.workloads import Workload, assumed_lengths

ROOT = Path(__file__).resolve().parents[2]
COMMAND, _, PRINTED = (
    (ROOT / "docs" / "scaling.md").read_text().split("\n$ ")[1].split("\n```")[0].partition("\n")
)
CHIP: Chip = CHIPS["v5e"]
FILLER = "(those that are not listed)"


def number(pattern: str) -> float:
    """A number of the printed plan, where the brackets of a pattern are."""
    found = re.search(pattern, PRINTED)
    assert found is not None, pattern
    return float(found[1].replace(",", ""))


def size_of(array: str) -> int:
    """Bytes of bf16[2,3]."""
    kind, dims = re.fullmatch(r"(b?f\d+)\[([\d,]*)\]", array).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return {"bf16": 2, "f32": 4}[kind] * math.prod(map(int, dims.split(",")))


def listed_collectives() -> list[Collective]:
    rows = re.findall(r"^ +[\d.]+ MB  (\d+) x ([\w-]+) of (\S+) among (\d+)$", PRINTED, re.MULTILINE)
    return [Collective(kind, of, size_of(of), int(group), int(count)) for count, kind, of, group in rows]


def all_collectives() -> list[Collective]:
    """Those listed, and one of each kind for what the sums have besides."""
    listed = listed_collectives()
    rest = []
    for kind, sent, count in re.findall(r"^  ([a-z-]+) +([\d.]+) MB sent in (\d+)$", PRINTED, re.MULTILINE):
        same = [collective for collective in listed if collective.kind == kind]
        missing = 1e6 * float(sent) - sum(collective.wire_bytes for collective in same)
        left = int(count) - sum(collective.count for collective in same)
        share = {"collective-permute": 1.0, "all-reduce": 30 / 16}.get(kind, 15 / 16)
        rest.append(Collective(kind, FILLER, 0, 16, left)._replace(size=missing / share / left))  # pyright: ignore[reportArgumentType]
    return listed + rest


def workload() -> Workload:
    """Of the settings and options of the command; on 8 devices, which split 256 rows evenly too."""
    prompt, response = (int(found) for found in re.findall(r"_tokens=(\d+)", COMMAND))
    config = load_config(ROOT / COMMAND.split()[2])
    mesh = make_mesh(replace(config.mesh, fsdp=8), jax.devices()[:8])
    return assumed_lengths(prompt=prompt, response=response, responses=2)(config, mesh, "tpu")


def test_the_printed_plan_is_what_its_numbers_print() -> None:
    names = ("parameters", "optimizer", "batch", "temporaries", "limit")
    sizes: dict[str, Any] = {name: number(rf"{name} +([\d.]+) GiB") * GIB for name in names}
    memory = Memory(**sizes, process=0.0, checkpoint=0.0)
    flops, accessed = 16e12 * number(r"([\d.]+) TFLOP"), 1e9 * number(r"memory +([\d.]+) GB")
    times = Times(
        flops / 16 / CHIP.flops, accessed / CHIP.bandwidth, number(r"collectives .* ([\d.]+) ms") / 1e3
    )
    plan = Plan(
        mesh={"data": 1, "fsdp": 16, "tensor": 1},
        workload=workload(),
        memory=memory,
        fits=memory.free > 0,
        flops=flops,
        useful_flops=flops * number(r"MFU ([\d.]+)%") / 100 * times.hidden / times.compute,
        program=Program(all_collectives(), accessed, 0),
        travel=Travel(
            Collective(
                "all-gather", "bf16[1,1024,1024]", round(1e6 * number(r"largest all-gather +([\d.]+)")), 16, 1
            ),
            parameters=[],
            logits=[],
        ),
        times=times,
        compile_seconds=number(r"libtpu in (\d+) s"),
        advice=[],
    )
    target = Target(parse_topology("v5e:4x4"), CHIP, [], "auto", "compiled for TPU v5e by libtpu")
    printed = f"plan of {COMMAND.split('--model.source ')[1].split()[0]}\n"
    printed += plan_as_text(plan, target, compute_dtype="bfloat16")
    ours, theirs = printed.splitlines(), PRINTED.splitlines()
    rounded = [line for line, found in zip(ours, theirs, strict=True) if line != found]
    for line, found in zip(ours, theirs, strict=True):
        assert re.sub(r"[\d.,]+", "#", line) == re.sub(r"[\d.,]+", "#", found)
        assert [float(n.replace(",", "")) for n in re.findall(r"\d[\d.,]*\d|\d", line)] == pytest.approx(
            [float(n.replace(",", "")) for n in re.findall(r"\d[\d.,]*\d|\d", found)], rel=2e-4, abs=1e-3
        ), (line, found)
    assert len(rounded) <= 3, rounded


def test_every_row_of_the_plans_has_a_command() -> None:
    """Its model is one whose shape is known, its topology and mesh go with each other."""
    table = (ROOT / "docs" / "scaling.md").read_text().split("## Plans")[1].split("## ")[0]
    rows = re.findall(
        r"^\| ([\w.-]+) \| (v\w+:[\dx]+) \| ((?:data|fsdp)[^|]+) \| (\d+) \|", table, re.MULTILINE
    )
    assert len(rows) == 12
    for model, topology, mesh, parts in rows:
        assert read_shape(f"shape:{model}")
        sizes = [int(size) for size in re.findall(r"(?:data|fsdp|tensor) (\d+)", mesh)]
        assert math.prod(sizes) == parse_topology(topology).num_devices
        assert 256 % int(parts) == 0
