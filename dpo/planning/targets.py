"""Devices to compile for, which need not be there: who compiles, and what stands in for them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dpo.huggingface.embedded import cache_directory
from dpo.models.attention import REQUIRED_PLATFORM, Implementation
from dpo.outcomes import UserError
from dpo.planning.chips import CHIPS, GPUS_A_HOST, Chip, Topology, chip_of


def install_command() -> str:
    """The command that puts the TPU's compiler where only `dpo plan` looks for it."""
    return f"{sys.executable} -m pip install --no-deps --target {cache_directory() / 'libtpu'} libtpu"


class Target(NamedTuple):
    """Devices to compile for."""

    topology: Topology
    chip: Chip
    devices: list[Any]
    attention: Implementation
    """Of the settings where it is `auto`; else what stands in for it."""
    compiler: str


def attention_on(target: Target, setting: Implementation, *, has_key_bias: bool) -> Implementation:
    """The settings' attention, or the target's where its devices stand in for others'; a bias of keys (ALiBi)
    is in none but `plain`, which `auto` is then.

    Raises:
      UserError: where the devices that are stood in for have no such attention.
    """
    if target.attention == "auto" or setting == "plain" or has_key_bias:
        return setting
    platform = REQUIRED_PLATFORM.get(setting, target.chip.platform)
    if platform != target.chip.platform:
        raise UserError(
            f"attention {setting} needs a {platform} and {target.topology.text} is a {target.chip.platform}"
        )
    return target.attention


def open_target(topology: Topology, memory: float | None = None) -> Target:
    """Devices of a topology to compile for, each with `memory` GiB where that is given.

    Raises:
      ValueError: when the TPU's compiler is not there, or there are too few CPU devices to stand for others.
    """
    num_devices = topology.num_devices
    if topology.kind in CHIPS and CHIPS[topology.kind].platform == "tpu":
        chip = chip_of(topology, memory)
        return Target(topology, chip, _tpu_devices(topology), "auto", f"compiled for {chip.name} by libtpu")
    devices = jax.devices("cpu")[:num_devices]
    if len(devices) < num_devices:
        raise UserError(
            f"{topology.text} needs {num_devices} CPU devices and there are {len(devices)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
        )
    if topology.kind == "cpu":
        chip = measure_cpu(num_devices)
        return Target(
            topology, chip, devices, "auto", "compiled for this machine's CPU, whose rates were measured"
        )
    chip = chip_of(topology, memory)
    how = f"no compiler for {chip.name} here: split as for it, compiled for CPU devices in its place"
    if num_devices > GPUS_A_HOST:
        how += f"; all as if in one host: the network between hosts of {GPUS_A_HOST} is not counted"
    return Target(topology, chip, devices, "blocked", how)  # a loop over tiles, as `ranges` is


def _tpu_devices(topology: Topology) -> list[Any]:
    size = "x".join(map(str, topology.axes))
    options = {}
    if topology.num_devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(f"{topology.kind}:{size}", platform="tpu", **options)
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        if "TPU support not installed" in str(error):
            raise UserError(
                f"topology {topology.text} needs the TPU's compiler, which is not there. Install it apart "
                f"from this environment, where JAX would look for a TPU at every start: {install_command()} "
                "(or set TPU_LIBRARY_PATH to a libtpu.so)"
            ) from error
        raise UserError(f"topology {topology.text}: {error}") from error
    return list(described.devices)


def measure_cpu(num_devices: int) -> Chip:
    """Rates of this machine's CPU, measured for half a second, and its memory; each device has its share."""
    left, right = jnp.ones((2048, 1024), jnp.float32), jnp.ones((1024, 2048), jnp.float32)
    product = jax.jit(jnp.matmul)
    rate = 2 * 2048 * 1024 * 2048 / _least_seconds(lambda: product(left, right))
    array = jnp.ones(2**25, jnp.float32)
    double = jax.jit(lambda x: 2 * x)
    bandwidth = 2 * array.nbytes / _least_seconds(lambda: double(array))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shares = (x / num_devices for x in (rate, rate, memory, bandwidth, bandwidth))
    return Chip("this CPU", "cpu", *shares, hop_seconds=1e-5)


def _least_seconds(run: Callable[[], jax.Array]) -> float:
    run().block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)
