"""What a run's numbers depend on besides its settings, weights and data: software and machine."""

from __future__ import annotations

import platform
from importlib import metadata

import jax

from dpo import distribution

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


def _version(package: str) -> str:
    if package == "dpo":
        return distribution.version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
