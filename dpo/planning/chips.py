"""Accelerators: what one chip has, and how many a topology has.

v5e:4x4      16 TPU v5e chips          compiled for the TPU
h100:8       8 GPUs in one host        partitioned for 8 devices, compiled by the CPU's compiler
cpu:2        2 devices of this machine compiled for the CPU
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from dpo.outcomes import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One device, by its maker's figures."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    flops: float
    """Dense bfloat16 products, FLOP/s."""
    float32_flops: float
    """Dense float32 products in full precision (`dpo/models/precision.py`), FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of memory, bytes/s."""
    link: float
    """To its neighbours in one direction of one axis (TPU), or to its host's switch (GPU), bytes/s."""
    hop_seconds: float
    """Latency from one neighbour to the next."""


# TPU: "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter "TPUs"; a float32 product in full is
# six bfloat16 passes (`jax.lax.Precision.HIGHEST`). GPU: NVIDIA's data sheets, dense; float32 is their FP32,
# not their TF32.
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", "tpu", 1.97e14, 1.97e14 / 6, 16 * GIB, 8.1e11, 4.5e10, 1e-6),
    "v5p": Chip("TPU v5p", "tpu", 4.59e14, 4.59e14 / 6, 95 * GIB, 2.8e12, 9e10, 1e-6),
    "v6e": Chip("TPU v6e", "tpu", 9.2e14, 9.2e14 / 6, 32 * GIB, 1.6e12, 9e10, 1e-6),
    "v4": Chip("TPU v4", "tpu", 2.75e14, 2.75e14 / 6, 32 * GIB, 1.2e12, 4.5e10, 1e-6),
    "a100": Chip("A100 80GB SXM", "gpu", 3.12e14, 1.95e13, 80e9, 2.0e12, 3.0e11, 3e-6),
    "h100": Chip("H100 SXM", "gpu", 9.89e14, 6.7e13, 80e9, 3.35e12, 4.5e11, 3e-6),
    "h200": Chip("H200 SXM", "gpu", 9.89e14, 6.7e13, 141e9, 4.8e12, 4.5e11, 3e-6),
}

GPUS_A_HOST = 8
"""How many GPUs a host's switch connects at most."""


class Topology(NamedTuple):
    """Chips and how they lie."""

    kind: str
    """Key of `CHIPS`, or cpu."""
    axes: tuple[int, ...]
    """Of the torus; one axis for GPUs and CPUs."""

    @property
    def num_devices(self) -> int:
        return math.prod(self.axes)

    @property
    def text(self) -> str:
        """As it is given."""
        return f"{self.kind}:{'x'.join(map(str, self.axes))}"


def parse_topology(text: str) -> Topology:
    """Read v5e:4x4, h100:8 or cpu:2.

    Raises:
      ValueError: with what is allowed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.lower())
    kinds = ", ".join([*CHIPS, "cpu"])
    if found is None or found[1] not in (*CHIPS, "cpu"):
        raise UserError(f"topology is {text!r}; allowed is KIND:SIZE with {kinds}, such as v5e:4x4 or h100:8")
    axes = tuple(int(size) for size in found[2].split("x"))
    tpu = found[1] in CHIPS and CHIPS[found[1]].platform == "tpu"
    if min(axes) < 1 or (not tpu and len(axes) > 1):
        raise UserError(f"topology is {text!r}; allowed is {found[1]}:N, or AxB and AxBxC chips of a TPU")
    return Topology(found[1], axes)


def ring_bandwidth(chip: Chip) -> float:
    """Bytes/s that a chip sends in a ring: of a TPU's neighbours in both directions, through a GPU's switch.

    A torus has more links than a ring uses; that several axes carry one collective is not counted on.
    """
    return chip.link * (2 if chip.platform == "tpu" else 1)
