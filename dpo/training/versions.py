"""What a run's numbers depend on besides its settings, weights and data: software and machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import jax

from dpo import distribution
from dpo.terminal import plural

PACKAGES = (
    *("dpo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain"),
    *("transformers", "tokenizers", "jinja2"),
)
"""Packages whose version can change a number."""


def versions() -> dict[str, str]:
    """Python, the platform, the devices, and the packages that decide numbers."""
    devices = jax.devices()
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
    return found | {name: _version(name) for name in PACKAGES}


def processor() -> str:
    """The CPU's make, and the cores of it that this process may use: XLA compiles for the one and splits its
    sums over the others, so that results on another CPU agree to rounding only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    makes = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{next(makes, platform.machine())}, {plural(cores, 'core')}"


def _version(package: str) -> str:
    if package == "dpo":
        return distribution.version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
