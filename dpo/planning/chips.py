"""Accelerators: what one chip has, and how many a topology has.

v5e:4x4      16 TPU v5e chips          compiled for the TPU
rtx4090:1    a card in a workstation   compiled by the CPU's compiler
gpu:2        2 GPUs of which only the memory is known (--memory)
h100:8       8 GPUs in one host        partitioned for 8 devices, compiled by the CPU's compiler
cpu:2        2 devices of this machine compiled for the CPU
"""

from __future__ import annotations

import math
import os
import re
from itertools import pairwise
from math import nan
from typing import Literal, NamedTuple

from dpo.outcomes import UserError

GIB = 2**30
MIB = 2**20
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that say which part of a GPU's memory JAX reserves, the first that is set."""
FRACTION = 0.75
"""What it reserves where none is set; a program gets no more."""


Platform = Literal["tpu", "gpu", "cpu"]
"""What JAX calls a kind of device."""


class Chip(NamedTuple):
    """One device, by its maker's figures."""

    name: str
    platform: Platform
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
# six bfloat16 passes (`jax.lax.Precision.HIGHEST`). GPU: NVIDIA's data sheets of A100, H100, H200, L4 and
# L40S, and its white papers "Ampere GA102" (RTX 3090), "Ada GPU Architecture" (RTX 4090) and "RTX Blackwell
# GPU Architecture" (RTX 5090): dense, bfloat16 with sums in float32; float32 is their FP32, not their TF32.
# H100 PCIe: the H100's data sheet while it named that card (BFLOAT16 1,513 TFLOP/s with sparsity, FP32 51,
# 2 TB/s); H100 NVL: the present one (1,671, 60, 94 GB, 3.9 TB/s); A100 40GB: the A100's (1,555 GB/s).
# The memory of L4 and L40S is what the driver lists with ECC on. Links without a switch are PCIe 4.0 x16
# (RTX 5090, H100 PCIe and NVL: 5.0; a bridge joins two of the latter, which a ring of more does not gain by).
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", "tpu", 1.97e14, 1.97e14 / 6, 16 * GIB, 8.1e11, 4.5e10, 1e-6),
    "v5p": Chip("TPU v5p", "tpu", 4.59e14, 4.59e14 / 6, 95 * GIB, 2.8e12, 9e10, 1e-6),
    "v6e": Chip("TPU v6e", "tpu", 9.2e14, 9.2e14 / 6, 32 * GIB, 1.6e12, 9e10, 1e-6),
    "v4": Chip("TPU v4", "tpu", 2.75e14, 2.75e14 / 6, 32 * GIB, 1.2e12, 4.5e10, 1e-6),
    "a100": Chip("A100 80GB SXM", "gpu", 3.12e14, 1.95e13, 80e9, 2.0e12, 3.0e11, 3e-6),
    "a100_40gb": Chip("A100 40GB SXM", "gpu", 3.12e14, 1.95e13, 40e9, 1.555e12, 3.0e11, 3e-6),
    "h100": Chip("H100 SXM", "gpu", 9.89e14, 6.7e13, 80e9, 3.35e12, 4.5e11, 3e-6),
    "h100pcie": Chip("H100 PCIe", "gpu", 7.565e14, 5.1e13, 80e9, 2.0e12, 6.4e10, 5e-6),
    "h100nvl": Chip("H100 NVL", "gpu", 8.355e14, 6.0e13, 94e9, 3.9e12, 6.4e10, 5e-6),
    "h200": Chip("H200 SXM", "gpu", 9.89e14, 6.7e13, 141e9, 4.8e12, 4.5e11, 3e-6),
    "l4": Chip("L4", "gpu", 1.21e14, 3.03e13, 23034 * MIB, 3.0e11, 3.2e10, 5e-6),
    "l40s": Chip("L40S", "gpu", 3.62e14, 9.16e13, 46068 * MIB, 8.64e11, 3.2e10, 5e-6),
    "rtx3090": Chip("RTX 3090", "gpu", 7.1e13, 3.56e13, 24 * GIB, 9.36e11, 3.2e10, 5e-6),
    "rtx4090": Chip("RTX 4090", "gpu", 1.652e14, 8.26e13, 24 * GIB, 1.008e12, 3.2e10, 5e-6),
    "rtx5090": Chip("RTX 5090", "gpu", 2.095e14, 1.048e14, 32 * GIB, 1.792e12, 6.4e10, 5e-6),
}

_LITE = {"v5lite": "v5e", "v6lite": "v6e"}
"""What JAX calls TPUs whose names here are shorter."""
_VARIANTS = {"pcie", "nvl", "40gb", "mig", "laptop", "ti", "d"}
"""Words in the names of cards that have other rates than those of the same name without them."""
_WITH_VARIANT = {"a100_40gb": ("a100", "40gb"), "h100pcie": ("h100", "pcie"), "h100nvl": ("h100", "nvl")}
"""Of such cards those that `CHIPS` has, and the words of their names."""


def chip_named(device: str) -> str | None:
    """The key of `CHIPS` for a device as its driver or JAX names it ("NVIDIA L40S", "TPU v5 lite"), or None.

    By whole words, since L4 is a part of L40S.
    """
    words = re.split(r"[^a-z0-9]+", device.lower())
    joined = [a + b for a, b in pairwise(words)]
    named = {_LITE.get(name, name) for name in (*joined, *words)}
    variants = _VARIANTS & named
    fitting = [
        kind
        for kind in CHIPS
        if named.issuperset(of_kind := _WITH_VARIANT.get(kind, (kind,))) and variants.issubset(of_kind)
    ]
    return fitting[0] if fitting else None


ANY_GPU = "gpu"
"""The kind of a topology of GPUs of which nothing but the memory is known."""
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


def memory_fraction(chip: Chip) -> float:
    """The part of a device's memory that programs can have: of a GPU what JAX reserves at its start."""
    said = [os.environ[name] for name in FRACTIONS if os.environ.get(name)]
    if chip.platform != "gpu":
        return 1.0
    try:
        return float(said[0]) if said else FRACTION
    except ValueError as error:
        raise UserError(f"{' or '.join(FRACTIONS)} is {said[0]!r}; allowed: a number such as 0.9") from error


def chip_of(topology: Topology, memory: float | None) -> Chip:
    """The chip of a topology of accelerators; `memory`, in GiB, stands in for its own where it is given."""
    if topology.kind == ANY_GPU:
        assert memory is not None, "parse_topology has seen to it"
        return Chip(f"GPU with {memory:g} GiB", "gpu", nan, nan, memory * GIB, nan, nan, nan)
    chip = CHIPS[topology.kind]
    return chip if memory is None else chip._replace(memory=memory * GIB)


def parse_topology(text: str, memory: float | None = None) -> Topology:
    """Read v5e:4x4, h100:8 or cpu:2; gpu:1 where the memory is given.

    Raises:
      ValueError: with what is allowed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.lower())
    allowed = [*CHIPS, "cpu", ANY_GPU]
    kinds = ", ".join(allowed)
    if found is not None and found[1] == ANY_GPU and memory is None:
        raise UserError(f"topology is {text!r} and memory is not given; allowed: both, as in --memory=24")
    if found is not None and found[1] == "cpu" and memory is not None:
        raise UserError(
            f"topology is {text!r} and memory is {memory:g}; allowed: training.memory_limit for this "
            "machine, or memory with accelerators"
        )
    if found is None or found[1] not in allowed:
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
