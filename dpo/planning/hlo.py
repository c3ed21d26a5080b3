"""What a compiled program does, read from its text: collectives, memory traffic, the largest arrays.

The text is XLA's optimised HLO of one device. A computation that a loop calls counts as often as the loop
runs; XLA's own cost analysis counts it once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from dpo.outcomes import UserError

BITS = {
    "pred": 8,
    "token": 0,
    "bf16": 16,
    **{f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)},
}
"""Bits an element; the many 8-bit floats are told by their name."""

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "iota",
        "async-start",
    ]
)
"""Instructions that move no bytes themselves."""


class Collective(NamedTuple):
    """One kind and size of collective, and how often a device takes part in it."""

    kind: str
    arrays: str
    """What a device gives, such as f32[576,96]."""
    size: int
    """Bytes of what it gives, of an all-gather of what it gets."""
    group: int
    """Devices that take part together."""
    count: int
    """Times a step."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step, by the ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.count * self.size * factor.get(self.kind, share)


class Program(NamedTuple):
    """What one device does in one run of a program."""

    collectives: list[Collective]
    """Largest traffic first."""
    bytes_accessed: float
    """Read from and written to memory by all fusions and other instructions."""
    unknown_loops: int
    """Loops of unknown length, whose bodies count once."""


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    arguments: str
    """What is between its brackets."""
    attributes: str
    is_root: bool


def read_program(text: str, num_devices: int) -> Program:
    """Count everything in the text of an optimised module for so many devices."""
    computations, entry = parse_computations(text)
    counts, unknown = _call_counts(computations, entry)
    fused = _fused(computations)
    shapes = {i.name: i.shape for body in computations.values() for i in body}
    total = sum(
        counts[name] * _traffic(instruction, shapes, computations)
        for name, body in computations.items()
        if counts[name] and name not in fused
        for instruction in body
    )
    return Program(_collectives(computations, counts, fused, shapes, num_devices), float(total), unknown)


def parse_computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of every computation, and the name of the one that is run."""
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and " = " in line:
            body.append(_parse_instruction(line.strip()))
    if not entry:
        raise UserError("the text has no ENTRY computation; allowed is the text of an HLO module")
    return computations, entry


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, such as (f32[8,128]{1,0}, s32[])."""
    bits = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        width = BITS.get(dtype, 8 if dtype.startswith("f8") else 32)
        bits += width * math.prod(int(d) for d in dims.split(",") if d)
    return bits // 8


def _parse_instruction(line: str) -> _Instruction:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    start = rest.index("(")
    end = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start:end])
    return _Instruction(
        name.lstrip("%"),
        shape,
        rest[:start],
        operands,
        rest[start + 1 : end],
        rest[end + 1 :],
        line.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise UserError(f"no bracket closes {text[start : start + 60]!r}")


def _called(instruction: _Instruction) -> Iterator[tuple[str, bool]]:
    """Computations that an instruction calls, and whether as the body of a loop."""
    for key, one, many in re.findall(
        r"(calls|body|condition|to_apply|branch_computations|called_computations|true_computation|"
        r"false_computation)=(?:%([\w.\-]+)|\{([^}]*)\})",
        instruction.attributes,
    ):
        for name in [one] if one else re.findall(r"%([\w.\-]+)", many):
            yield name, key in ("body", "condition")


def _call_counts(computations: dict[str, list[_Instruction]], entry: str) -> tuple[dict[str, int], int]:
    """How often each computation runs, and how many loops have no known length."""
    counts: dict[str, int] = defaultdict(int)
    unknown: set[str] = set()

    def call(name: str, times: int) -> None:
        counts[name] += times
        for instruction in computations.get(name, ()):
            for callee, is_loop in _called(instruction):
                trips = _trip_count(instruction, computations) if is_loop else 1
                if trips is None:
                    unknown.add(instruction.name)
                call(callee, times * (trips or 1))

    call(entry, 1)
    return counts, len(unknown)


def _trip_count(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """What the compiler says, or the one number that the condition compares its counter with."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
    if found:
        return int(found[1])
    condition = re.search(r"condition=%([\w.\-]+)", instruction.attributes)
    body = computations.get(condition[1], []) if condition else []
    limits = [i.arguments for i in body if i.opcode == "constant" and i.arguments.isdecimal()]
    is_counted = any(i.opcode == "compare" and "direction=LT" in i.attributes for i in body)
    return int(limits[0]) if is_counted and len(limits) == 1 else None


def _fused(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Computations whose instructions keep their values in registers."""
    inner = (
        "fusion",
        "reduce",
        "reduce-window",
        "scatter",
        "sort",
        "map",
        "select-and-scatter",
        "all-reduce",
    )
    direct = {
        callee
        for body in computations.values()
        for instruction in body
        if instruction.opcode in (*inner, "reduce-scatter", "all-reduce-start")
        for callee, _ in _called(instruction)
    }
    reached, todo = set(), list(direct)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [callee for i in computations.get(name, ()) for callee, _ in _called(i)]
    return reached


def _traffic(
    instruction: _Instruction, shapes: dict[str, str], computations: dict[str, list[_Instruction]]
) -> float:
    """Bytes that an instruction reads and writes: of a slice what it takes, of an update what it writes.

    What begins here and ends elsewhere gives a tuple that has its operands too, then what it writes.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or '"AllocateBuffer"' in instruction.attributes:
        return 0.0
    operands = [_memory_bytes(shapes.get(name, "")) for name in instruction.operands]
    result = _memory_bytes(instruction.shape)
    if opcode == "slice-start":
        part = shape_bytes(instruction.shape) - shape_bytes(shapes[instruction.operands[0]])
        return float(min(part, operands[0]) + result - operands[0])
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return float(result)
    if opcode in ("dynamic-slice", "gather", "slice"):
        return float(min(shape_bytes(instruction.shape), operands[0]) + result)
    if opcode == "dynamic-update-slice":
        return float(operands[1] + min(shape_bytes(shapes[instruction.operands[1]]), result))
    if opcode != "fusion":
        return float(sum(operands) + result)
    body = next((computations.get(name, []) for name, _ in _called(instruction)), [])
    return _fusion_reads(body, operands) + _fusion_writes(body, result)


def _fusion_reads(body: list[_Instruction], operands: list[int]) -> float:
    total = 0.0
    for parameter in (i for i in body if i.opcode == "parameter"):
        users = [i for i in body if parameter.name in i.operands]
        whole = _memory_bytes(parameter.shape)
        if whole and users and all(_takes_part(user, parameter.name) for user in users):
            parts = (
                0 if user.opcode == "dynamic-update-slice" else shape_bytes(user.shape) for user in users
            )
            whole = min(whole, sum(parts))
        total += whole
    return total if body else float(sum(operands))


def _memory_bytes(shape: str) -> int:
    """Bytes of the arrays that are in the chip's memory; S(1) and so on is memory beside its cores."""
    return shape_bytes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\)[^}]*\}", "", shape))


def _takes_part(user: _Instruction, name: str) -> bool:
    """Whether an instruction reads only a part of its first operand."""
    return user.opcode in ("dynamic-slice", "gather", "slice", "dynamic-update-slice") and (
        user.operands[0] == name
    )


def _fusion_writes(body: list[_Instruction], result: int) -> float:
    inner = {i.name: i for i in body}
    root = next((i for i in body if i.is_root), None)
    while root is not None and root.opcode in ("bitcast", "convert", "copy") and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root is None or root.opcode != "dynamic-update-slice" or not result:
        return float(result)
    return float(shape_bytes(inner[root.operands[1]].shape))


def _collectives(
    computations: dict[str, list[_Instruction]],
    counts: dict[str, int],
    fused: set[str],
    shapes: dict[str, str],
    num_devices: int,
) -> list[Collective]:
    found: dict[tuple[str, str, int, int], int] = defaultdict(int)
    pieces: dict[tuple[tuple[str, str, int, int], str], int] = {}
    for name, body in computations.items():
        for instruction in body if counts[name] else ():
            kind = _collective_kind(instruction, name)
            if kind is None:
                continue
            given = ", ".join(shapes.get(operand, "") for operand in instruction.operands)
            arrays = re.sub(r"\{[^}]*\}", "", given)
            group = _group_size(instruction.attributes) or num_devices
            size = shape_bytes(arrays) * (group if kind == "all-gather" else 1)
            size = min(size, shape_bytes(instruction.shape)) if kind == "all-reduce" else size
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = kind, arrays, size, group
            if name in fused and channel is not None:  # a TPU does one in pieces, beside several products
                times = pieces.get((key, channel[1]), counts[name])
                pieces[key, channel[1]] = min(times, counts[name])
            else:
                found[key] += counts[name]
    for (key, _), times in pieces.items():
        found[key] += times
    collectives = [Collective(*key, count=count) for key, count in found.items()]
    return sorted(collectives, key=lambda c: -c.wire_bytes)


def _collective_kind(instruction: _Instruction, computation: str) -> str | None:
    """Its kind, without -start; an all-reduce that is fused with taking a slice is a reduce-scatter."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    return "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in computation else kind


def _group_size(attributes: str) -> int:
    """Devices in one group; 2 where pairs are named, 0 where the text means all of them."""
    if "source_target_pairs=" in attributes:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1])) if named else {}
    axes = re.findall(r"'([^']+)'", named[2]) if named else []
    return math.prod(int(sizes[axis]) for axis in axes) if axes else 0
