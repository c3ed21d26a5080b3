"""Several processes of one run: how they meet, and how they end together."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator

import jax

from dpo.outcomes import PEER_LOST, PeerLostError, outcome_of, text_of
from dpo.parallel.cluster import Cluster, Meeting, find_cluster
from dpo.parallel.distributed import is_main
from dpo.parallel.lost import (
    describe_absence,
    describe_loss,
    end_with_the_others,
    heard_failure,
    listening,
    meeting,
    say_outcome,
)

LEAVE_SECONDS = 20
"""How long a process that has finished waits for the others to finish too."""
LAST_WORDS_SECONDS = 3
"""How long the main process outlives its failure: JAX aborts the others when it, the coordinator, is gone."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Hosts of a coordinator that only processes of the same machine reach."""


@contextlib.contextmanager
def joined(given: Meeting) -> Iterator[None]:
    """Meet the other processes, if there are any, and end with them.

    A process that fails says so and leaves at once, so that the others notice and do not wait. Its exit code
    is that of the cause (`dpo.outcomes`), in each of them.

    Raises:
      PeerLostError: when the processes do not find one another in time, or one of them is lost later.
      what another process said that it ended by, where it did.
    """
    cluster = None if jax.distributed.is_initialized() else find_cluster(given, os.environ)
    if cluster is None:
        yield
        return
    _meet(cluster, given)
    last = is_main()
    try:
        with listening(given.heartbeat_timeout):
            yield
    except BaseException as error:
        failure = _cause_of(error)
        outcome = outcome_of(failure)
        say_outcome(outcome, text_of(failure))
        atexit.register(_leave, outcome.code, last=last)
        if failure is error:
            raise
        raise failure from error
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # who is lost now is lost after the end
        jax.distributed.shutdown()


def _cause_of(error: BaseException) -> BaseException:
    """The error itself, or where it says that another process was lost, why that one has ended."""
    if outcome_of(error) is not PEER_LOST:
        return error
    failure = heard_failure()
    if failure is not None or isinstance(error, PeerLostError):
        return failure or error
    return PeerLostError(describe_loss(text_of(error).splitlines()[0]))


def _meet(cluster: Cluster, given: Meeting) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # signals are ours (dpo.training.interrupt)
    end_with_the_others()
    who = f"process {cluster.process_id} of {cluster.num_processes} ({cluster.found_in})"
    absence = describe_absence(who, cluster.coordinator, given.start_timeout)
    try:
        with meeting(absence):
            jax.distributed.initialize(
                coordinator_address=cluster.coordinator,
                num_processes=cluster.num_processes,
                process_id=cluster.process_id,
                local_device_ids=cluster.local_device,
                cluster_detection_method=None if cluster.coordinator is None else "deactivate",
                initialization_timeout=int(given.start_timeout),
                heartbeat_timeout_seconds=int(given.heartbeat_timeout),
                shutdown_timeout_seconds=LEAVE_SECONDS,
                coordinator_bind_address=bind_address(cluster.coordinator),
            )
    except jax.errors.JaxRuntimeError as error:
        atexit.register(_leave, PEER_LOST.code)
        raise PeerLostError(f"{absence} ({str(error).splitlines()[0]})") from error


def bind_address(coordinator: str | None) -> str | None:
    """Where process 0 listens: on the loopback alone where all processes meet there, else JAX's choice.

    That is JAX_COORDINATOR_BIND_ADDRESS, or every interface, since the name by which the others reach this
    host need not be one of its own.
    """
    if coordinator is None or coordinator.rpartition(":")[0] not in LOOPBACK:
        return None
    return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)


def _leave(code: int, *, last: bool = False) -> None:
    """End without the farewell that waits for all: the others see closed connections at once."""
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()
        sys.stderr.flush()
    if last:
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(code)
