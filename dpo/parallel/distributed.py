"""Several processes of one run: how they find one another, agree before they start, and stop together.

The engine is JAX's distributed runtime. Every process runs the same program on the same global arrays; what
differs is who writes (the main process) and which rows and parameters a process places (its devices').
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo.outcomes import UserError

PEER_LOST = 75
"""Exit code when another process has gone or hangs: the same command goes on from the newest checkpoint."""
COMPILE_SECONDS = 1800.0
"""What a step of a new shape may take longer, since it is compiled."""
LEAVE_SECONDS = 20
"""How long a process that has finished waits for the others to finish too."""
LAST_WORDS_SECONDS = 3
"""How long the main process outlives its failure: JAX aborts the others when it, the coordinator, is gone."""
_EXCHANGE_BYTES = 1 << 26
"""What `from_all` puts on a device at a time."""
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


# ---- start and end ----


@contextlib.contextmanager
def joined(given: Meeting) -> Iterator[None]:
    """Meet the other processes, if there are any, and end with them.

    A process that fails leaves at once, so that the others notice and do not wait.

    Raises:
      ValueError: when the processes do not find one another in time, or one of them is lost later.
    """
    cluster = None if jax.distributed.is_initialized() else find_cluster(given, os.environ)
    if cluster is None:
        yield
        return
    _start(cluster, given)
    last = is_main()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        atexit.register(_leave, PEER_LOST, last=last)
        raise UserError(
            f"process {jax.process_index()} of {jax.process_count()} can't go on: another process has ended "
            "or is out of reach. The same command goes on from the newest checkpoint, when all processes are "
            f"started again. ({str(error).splitlines()[0]})"
        ) from error
    except (ValueError, OSError):
        atexit.register(_leave, 2, last=last)
        raise
    except BaseException:
        atexit.register(_leave, 1, last=last)
        raise
    jax.distributed.shutdown()


def find_cluster(given: Meeting, environment: Mapping[str, str]) -> Cluster | None:
    """Who starts this process says where the others are: settings first, then the launcher's variables.

    None: this is the only process.

    Raises:
      ValueError: when it is one of several but where they meet, their number or its own is not known.
    """
    if given.cluster == "none":
        return None
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
                f"here are auto, none, or distributed.coordinator with num_processes and process_id"
            )
    if address is None and given.num_processes in (None, 1):
        return None
    return _complete(Cluster(None, None, None, "settings"), given, address)


def _complete(found: Cluster, given: Meeting, coordinator: str | None) -> Cluster | None:
    """What was found, with the settings in the place of what was not; None for a single process."""
    if found.found_in == "tpu":
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
            + " (JAX_COORDINATOR_ADDRESS=host:port for the coordinator)"
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


def _start(cluster: Cluster, given: Meeting) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # signals are ours (dpo.training.interrupt)
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.num_processes,
            process_id=cluster.process_id,
            local_device_ids=cluster.local_device,
            cluster_detection_method=None if cluster.coordinator is None else "deactivate",
            initialization_timeout=int(given.start_timeout),
            heartbeat_timeout_seconds=int(given.heartbeat_timeout),
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        atexit.register(_leave, PEER_LOST)
        raise UserError(
            f"process {cluster.process_id} of {cluster.num_processes} ({cluster.found_in}) did not meet the "
            f"others at {cluster.coordinator} within {given.start_timeout:g} s (distributed.start_timeout): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _leave(code: int, *, last: bool = False) -> None:
    """End without the farewell that waits for all: the others see closed connections at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    if last:
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(code)


def _port(job: str) -> int:
    return _PORTS[int(re.sub(r"\D", "", job) or 0) % len(_PORTS)]


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


# ---- together ----


def is_main() -> bool:
    """Whether this process writes logs, metrics and exports."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process in the run."""
    return jax.process_count() == 1


def from_main(arrays: Any) -> Any:
    """The main process's arrays on every process; all give arrays of the same shapes."""
    return arrays if is_alone() else multihost_utils.broadcast_one_to_all(arrays)


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` gives in the main process, which alone calls it, on every process; plain JSON.

    Raises:
      ValueError: on the others, with the text of what it raised there.
    """
    if is_alone():
        return function()
    answer, failure = b"", None
    if is_main():
        try:
            answer = json.dumps({"value": function()}, default=lambda _: None).encode()
        except (ValueError, OSError) as error:
            answer, failure = json.dumps({"error": str(error)}).encode(), error
    size = int(from_main(np.asarray(len(answer))))
    mine = np.frombuffer(answer or bytes(size), np.uint8)
    shared = json.loads(from_main(mine).tobytes())
    if failure is not None:
        raise failure
    if "error" in shared:
        raise UserError(f"process 0 stopped: {shared['error']}")
    return shared["value"]


def from_all(function: Callable[[], bytes]) -> list[bytes]:
    """What `function` gives in each process, in their order, on all of them.

    Raises:
      ValueError: on all of them, with the text of what it raised in the first where it did.
    """
    if is_alone():
        return [function()]
    failure = None
    try:
        mine = function()
    except (ValueError, OSError) as error:
        mine, failure = str(error).encode(), error
    header = np.asarray([len(mine), failure is not None], np.int64)
    headers = _gather(header.view(np.uint32)).view(np.int64)
    block = _EXCHANGE_BYTES // len(headers)
    received = [bytearray() for _ in headers]
    for start in range(0, int(headers[:, 0].max()), block):
        sent = np.frombuffer(mine[start : start + block], np.uint8)
        size = min(block, int(headers[:, 0].max()) - start)
        for whole, piece, length in zip(received, _gather(np.resize(sent, size)), headers[:, 0], strict=True):
            whole += piece[: max(0, length - start)].tobytes()
    for process, (_, failed) in enumerate(headers):
        if failed:
            raise UserError(received[process].decode()) from failure
    return [bytes(whole) for whole in received]


def _gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which are alike in shape, one after the other."""
    return np.asarray(multihost_utils.process_allgather(array))


def fetch(array: Any) -> np.ndarray:
    """An array on this host, whole; all processes call this together."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def on_this_host(tree: Any) -> Any:
    """A tree whose arrays this host has whole; all processes call this together."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else jnp.asarray(fetch(x)), tree)


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what all processes must have in common before they compute together.

    Raises:
      ValueError: on every process, naming the facts that differ and the processes that differ from the main.
    """
    if is_alone():
        return
    names = list(facts)
    digests = [hashlib.sha256(repr(facts[name]).encode()).digest()[:8] for name in names]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(names), 2)
    everyone = multihost_utils.process_allgather(mine)
    differs = (everyone != everyone[:1]).any(-1)
    if differs.any():
        what = "; ".join(
            f"{name} of process {', '.join(map(str, np.flatnonzero(differs[:, i])))}"
            for i, name in enumerate(names)
            if differs[:, i].any()
        )
        raise UserError(
            f"the processes of this run do not agree: {what} differs from process 0's; allowed is the same "
            "version, settings, weights, data and run directory everywhere"
        )


def shared_vote(requested: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """Whether any process was asked to stop, with the same answer on all of them.

    Of several processes, each call sends this one's answer and returns the outcome of the call before: the
    vote is computed on the devices, between steps, and no step waits for it.
    """
    if is_alone():
        return requested
    everyone = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    any_of = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    outcome: list[jax.Array] = []

    def vote() -> bool:
        mine = np.full(mesh.size, requested(), np.int32)
        votes = jax.make_array_from_callback(mine.shape, everyone, lambda index: mine[index])
        outcome.append(any_of(votes))
        return len(outcome) > 1 and bool(outcome.pop(0))

    return vote


# ---- steps that hang ----


class Deadline:
    """Ends the process when a step takes too long, and says where every thread was."""

    def __init__(self, timeout: float | None):
        """`timeout` in seconds; None never ends anything."""
        self._timeout = timeout
        self._seen: set[Hashable] = set()
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    def __enter__(self) -> Deadline:
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def step(self, shape: Hashable) -> None:
        """A step begins; one of a new shape may take `COMPILE_SECONDS` longer."""
        if self._timeout is not None:
            extra = 0.0 if shape in self._seen else COMPILE_SECONDS
            self._seen.add(shape)
            self._set(time.monotonic() + self._timeout + extra)

    def pause(self) -> None:
        """What comes now may take as long as it likes."""
        self._set(None)

    def _set(self, deadline: float | None) -> None:
        with self._changed:
            self._deadline = deadline
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if self._ended:
                return
        print(
            f"dpo train: error: process {jax.process_index()} of {jax.process_count()}: a step took longer "
            f"than {self._timeout:g} s (distributed.step_timeout). Another process may hang or have gone; "
            "the same command goes on from the newest checkpoint. Stacks of all threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(PEER_LOST)
