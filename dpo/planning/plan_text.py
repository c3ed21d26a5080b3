"""A plan as lines of text, and as plain numbers."""

from __future__ import annotations

from collections import defaultdict

from dpo.planning.chips import FRACTIONS, GIB, memory_fraction
from dpo.planning.plan import Plan
from dpo.planning.targets import Target
from dpo.planning.travel import Travel
from dpo.terminal import plural

_LISTED = 6
"""Collectives that are listed one by one."""


def plan_as_text(plan: Plan, target: Target, *, compute_dtype: str) -> str:
    """What a step needs and how long it takes, in about twenty lines."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    shape, work = plan.workload.shape, plan.workload.work
    fill = work.tokens / (shape.rows * shape.row_length)
    lines = [
        f"{target.topology.text}: {target.topology.num_devices} x {target.chip.name}, mesh {mesh}; "
        f"{target.compiler} in {plan.compile_seconds:.0f} s",
        f"lengths {plan.workload.source}",
        f"step    {plural(plan.workload.prompts, 'prompt')} in {plural(shape.rows, 'row')} of "
        f"{shape.row_length} tokens "
        f"({shape.scored} scored), {fill:.0%} filled; {compute_dtype}",
        "",
        *_memory_lines(plan, target),
    ]
    if plan.program is not None:
        unknown = ["how long a step takes is not known: of this GPU only the memory was given"]
        times = unknown if plan.times is None else _time_lines(plan, target)
        lines += ["", *times, "", *_collective_lines(plan)]
    if plan.advice:
        lines += ["", "to change:", *(f"  {what}" for what in plan.advice)]
    return "\n".join(lines)


def plan_as_numbers(plan: Plan, target: Target) -> dict[str, object]:
    """All of a plan as a tree of plain numbers and texts."""
    program = plan.program
    return {
        "topology": target.topology.text,
        "chip": target.chip._asdict(),
        "compiler": target.compiler,
        "mesh": plan.mesh,
        "workload": {
            **plan.workload._asdict(),
            "shape": plan.workload.shape._asdict(),
            "work": plan.workload.work._asdict(),
        },
        "memory": {**plan.memory._asdict(), "total": plan.memory.total, "free": plan.memory.free},
        "fits": plan.fits,
        "flops": plan.flops,
        "useful_flops": plan.useful_flops,
        "bytes_accessed": None if program is None else program.bytes_accessed,
        "collectives": []
        if program is None
        else [{**c._asdict(), "wire_bytes": c.wire_bytes} for c in program.collectives],
        "unknown_loops": None if program is None else program.unknown_loops,
        "travel": None if plan.travel is None else _travel_as_numbers(plan.travel),
        "seconds": None
        if plan.times is None
        else {**plan.times._asdict(), "hidden": plan.times.hidden, "exposed": plan.times.exposed},
        "compile_seconds": plan.compile_seconds,
        "advice": plan.advice,
    }


def _travel_as_numbers(travel: Travel) -> dict[str, object]:
    gather, logits = travel.largest_gather, travel.logits
    return {
        "largest_gather": None if gather is None else gather._asdict(),
        "parameters": travel.parameters,
        "logits": None if logits is None else [collective._asdict() for collective in logits],
    }


def _memory_lines(plan: Plan, target: Target) -> list[str]:
    memory = plan.memory
    parts = memory._asdict() | {"expected peak": memory.total}
    here = ("process", "checkpoint") if memory.process else ()
    names = ("parameters", "optimizer", "batch", "temporaries", *here, "expected peak", "limit")
    verdict = "fits" if plan.fits else f"does not fit: {-memory.free / GIB:.2f} GiB too much"
    after = "" if memory.saves_between_steps or not here else " (after the last step)"
    return [
        f"memory of a device: {verdict}",
        *(
            f"  {name:<13}{parts[name] / GIB:8.3f} GiB" + (after if name == "checkpoint" else "")
            for name in names
        ),
        *_reserved(plan, target),
    ]


def _reserved(plan: Plan, target: Target) -> list[str]:
    """What part of a GPU's memory the limit is, where JAX and not a setting has set it."""
    chip, fraction = target.chip, memory_fraction(target.chip)
    if fraction == 1 or plan.memory.limit != chip.memory * fraction:
        return []
    return [
        f"  (JAX reserves {fraction:.0%} of the {chip.memory / GIB:.1f} GiB and gives a program no more; "
        f"{FRACTIONS[0]}=0.92 in the environment of the run, and of this command, raises it)"
    ]


def _time_lines(plan: Plan, target: Target) -> list[str]:
    assert plan.times is not None
    assert plan.program is not None
    times, devices = plan.times, target.topology.num_devices
    tokens = plan.workload.work.sequence_tokens
    quick, slow = times.hidden, times.exposed
    useful = times.compute * plan.useful_flops / plan.flops
    return [
        "a device and step:",
        f"  arithmetic   {plan.flops / devices / 1e12:8.3f} TFLOP  {1e3 * times.compute:9.2f} ms "
        f"({plan.useful_flops / plan.flops:.0%} of it must be done; the rest is padding and computed again)",
        f"  memory       {plan.program.bytes_accessed / 1e9:8.3f} GB     {1e3 * times.memory:9.2f} ms",
        f"  collectives  {_sent(plan) / 1e9:8.3f} GB     {1e3 * times.communication:9.2f} ms",
        f"a step takes at least {1e3 * quick:.2f} ms, or {1e3 * slow:.2f} ms with no communication hidden",
        f"  tokens/s {tokens / quick:,.0f} to {tokens / slow:,.0f}; "
        f"MFU {useful / quick:.1%} to {useful / slow:.1%}",
    ]


def _collective_lines(plan: Plan) -> list[str]:
    assert plan.program is not None
    by_kind: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for c in plan.program.collectives:
        sent, count = by_kind[c.kind]
        by_kind[c.kind] = sent + c.wire_bytes, count + c.count
    lines = [
        f"  {kind:<19}{sent / 1e6:10.2f} MB sent in {count}"
        for kind, (sent, count) in sorted(by_kind.items(), key=lambda item: -item[1][0])
    ]
    largest = [
        f"  {c.wire_bytes / 1e6:10.2f} MB  {c.count} x {c.kind} of {c.arrays[:60]} among {c.group}"
        for c in plan.program.collectives[:_LISTED]
    ]
    return [
        "collectives of a device and step:",
        *(lines or ["  none"]),
        *(["the largest:", *largest] if largest else []),
        *(_travel_lines(plan.travel) if plan.travel is not None and largest else []),
    ]


def _travel_lines(travel: Travel) -> list[str]:
    gather, logits = travel.largest_gather, travel.logits
    largest = "none" if gather is None else f"{gather.size / 1e6:.2f} MB, of {gather.arrays[:60]}"
    away = "not told by shapes" if logits is None else "no"
    return [
        f"largest all-gather    {largest}",
        f"parameters made whole {', '.join(travel.parameters) or 'none'}",
        f"logits travel         {f'yes, {logits[0].kind} of {logits[0].arrays[:60]}' if logits else away}",
    ]


def _sent(plan: Plan) -> float:
    return sum(c.wire_bytes for c in plan.program.collectives) if plan.program else 0.0
