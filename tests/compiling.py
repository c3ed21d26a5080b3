"""How XLA compiles under test: lightly, or as it does for users.

Compiling is most of what the tests do, and most of it goes into passes that make a program of a tiny model
quicker by nothing that one would notice. The laws hold without them; what is said of programs themselves
(their bits, memory, collectives) is tested again in the stage that compiles as users do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

LIGHTLY = "--xla_cpu_use_fusion_emitters=false"
"""Each operation's loops are written by themselves: with fusions' code LLVM takes twice as long."""

DEVICES = "--xla_force_host_platform_device_count"


def lightly(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles with XLA's dear passes off."""
    flags = [flag for flag in environment.get("XLA_FLAGS", "").split() if flag != LIGHTLY]
    return {
        **environment,
        "XLA_FLAGS": " ".join([*flags, LIGHTLY]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def compile_lightly() -> None:
    """Here, before the first program, and in all processes that are started from here."""
    os.environ.update(lightly(os.environ))
    jax.config.update("jax_disable_most_optimizations", True)


def with_devices(count: int) -> str:
    """XLA's flags for a process that sees so many devices and compiles as this one."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if DEVICES not in flag]
    return " ".join([f"{DEVICES}={count}", *others])
