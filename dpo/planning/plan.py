"""What is known of a step on one mesh: memory of a device, work, time, and what to change."""

from __future__ import annotations

from typing import NamedTuple

from dpo.planning.hlo import Program
from dpo.planning.roofline import Times
from dpo.planning.travel import Travel
from dpo.planning.workloads import Workload


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


def describe_time(plan: Plan) -> str:
    """One phrase about how long a step takes."""
    if plan.times is None:
        return f"does not fit by {-plan.memory.free / 2**30:.2f} GiB"
    return f"{1e3 * plan.times.hidden:.1f} to {1e3 * plan.times.exposed:.1f} ms a step"
