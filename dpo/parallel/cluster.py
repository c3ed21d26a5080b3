"""How the processes of one run find one another: by settings, or by the variables of who started them."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from dpo.outcomes import UserError

_PORTS = range(61440, 65536)
"""Ports that a job's number is mapped to, as JAX does."""


@runtime_checkable
class Meeting(Protocol):
    """Where the processes of a run meet, as far as it was said, and how long each waits for the others.

    The settings `distributed` are one; `DistributedConfig` describes the fields.
    """

    @property
    def cluster(self) -> str: ...
    @property
    def coordinator(self) -> str | None: ...
    @property
    def num_processes(self) -> int | None: ...
    @property
    def process_id(self) -> int | None: ...
    @property
    def start_timeout(self) -> float: ...
    @property
    def heartbeat_timeout(self) -> float: ...


class Cluster(NamedTuple):
    """Where the processes of a run meet, and which of them this is. None: JAX finds out (Cloud TPU)."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    found_in: str
    local_device: int | None = None
    """The one GPU of this process, where a host runs several."""


def find_cluster(given: Meeting, environment: Mapping[str, str]) -> Cluster | None:
    """Who starts this process says where the others are: settings first, then the launcher's variables.

    None: this is the only process. Where `cluster` is none, settings alone are asked.

    Raises:
      ValueError: when it is one of several but where they meet, their number or its own is not known.
    """
    environment = {} if given.cluster == "none" else environment
    address = given.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    for launcher, find in _LAUNCHERS.items():
        if given.cluster not in ("auto", launcher):
            continue
        found = find(environment)
        if found is not None:
            return _complete(found, given, address)
        if given.cluster == launcher:
            raise UserError(
                f"distributed.cluster is {launcher}, but its variables are not in the environment; allowed "
                "here are auto and none, for one of several processes with distributed.coordinator, "
                "num_processes and process_id"
            )
    if address is None and given.num_processes in (None, 1):
        return None
    return _complete(Cluster(None, None, None, "settings"), given, address)


def _complete(found: Cluster, given: Meeting, coordinator: str | None) -> Cluster | None:
    """What was found, with the settings in its place where they say something; None for a single process.

    On a Cloud TPU, where JAX finds out all, they say all of it or nothing.
    """
    if found.found_in == "tpu" and given.coordinator is given.num_processes is given.process_id is None:
        return found
    cluster = found._replace(
        coordinator=coordinator or found.coordinator,
        num_processes=_first(given.num_processes, found.num_processes),
        process_id=_first(given.process_id, found.process_id),
    )
    if cluster.num_processes == 1:
        return None
    missing = [
        name for name in ("coordinator", "num_processes", "process_id") if getattr(cluster, name) is None
    ]
    if missing:
        raise UserError(
            f"one of several processes ({found.found_in}), but {', '.join(missing)} is not known; allowed: "
            + ", ".join(f"--distributed.{name}" for name in missing)
            + ("" if given.cluster == "none" else " (JAX_COORDINATOR_ADDRESS=host:port for the coordinator)")
        )
    assert cluster.num_processes is not None
    assert cluster.process_id is not None
    if not 0 <= cluster.process_id < cluster.num_processes or ":" not in str(cluster.coordinator):
        raise UserError(
            f"process {cluster.process_id} of {cluster.num_processes} at {cluster.coordinator}; allowed are "
            "processes from 0 to one less than their number, and a coordinator host:port"
        )
    return cluster


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """A step started by srun; not the batch script itself, nor a single task."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    hosts = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)
    assert first is not None
    a_host = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return Cluster(
        f"{first[1]}{first[2] or ''}:{_port(environment['SLURM_JOB_ID'])}",
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_PROCID"]),
        "slurm",
        int(environment["SLURM_LOCALID"]) if a_host is not None and int(a_host[0]) > 1 else None,
    )


def _openmpi(environment: Mapping[str, str]) -> Cluster | None:
    """A process of mpirun. Where it started is known on one host, or from Open MPI 4."""
    size = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if size == 1:
        return None
    local_size = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or "0"
    launcher = re.search(r"tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    host = "127.0.0.1" if local_size == size else launcher[1] if launcher else None
    return Cluster(
        None if host is None else f"{host}:{_port(str(zlib.crc32(job.encode())))}",
        size,
        int(environment["OMPI_COMM_WORLD_RANK"]),
        "openmpi",
        int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]) if local_size > 1 else None,
    )


def _gke_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """A worker of a TPU slice on Kubernetes, which names the slice's hosts; also of several slices."""
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices <= 1:
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    slice_id = int(environment.get("MEGASCALE_SLICE_ID") or 0)
    worker = slice_id * len(hosts) + int(environment["TPU_WORKER_ID"])
    return Cluster(f"{first.partition(':')[0]}:8482", len(hosts) * slices, worker, "gke-tpu")


def _kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    """A pod of an Indexed Job; its manifest gives the coordinator and the number of pods."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    return Cluster(None, None, int(environment["JOB_COMPLETION_INDEX"]), "kubernetes")


def _cloud_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """A Cloud TPU virtual machine: JAX asks its metadata server."""
    chips = list(Path("/dev").glob("accel[0-9]*")) + list(Path("/dev/vfio").glob("[0-9]*"))
    wanted = environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    there = bool(chips) and wanted and importlib.util.find_spec("libtpu") is not None
    return Cluster(None, None, None, "tpu") if there and "TPU_WORKER_HOSTNAMES" not in environment else None


_LAUNCHERS: dict[str, Callable[[Mapping[str, str]], Cluster | None]] = {
    "slurm": _slurm,
    "openmpi": _openmpi,
    "gke-tpu": _gke_tpu,
    "kubernetes": _kubernetes,
    "tpu": _cloud_tpu,
}
"""The order is important: SLURM may start mpirun or run on Kubernetes, and knows most."""


def _port(job: str) -> int:
    return _PORTS[int(re.sub(r"\D", "", job) or 0) % len(_PORTS)]


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
