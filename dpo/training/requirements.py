"""What a run needs only later, looked at before anything is computed: room, its card, a shared directory."""

from __future__ import annotations

import resource
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dpo.config import TrainingConfig
from dpo.huggingface.saving import SHARD_BYTES
from dpo.outcomes import EnvironmentFailure, UserError
from dpo.overwriting import require_replaceable
from dpo.parallel.distributed import from_all, is_alone, is_main, on_main
from dpo.runs import ADAPTER_DIRECTORY, CHECKPOINTS_DIRECTORY, EXPORT_DIRECTORY, LOCK_FILE
from dpo.training.lock import is_held, standing
from dpo.training.model_card import model_card
from dpo.training.policy import Policy
from dpo.training.preparation import Run
from dpo.training.profile import require_profiled_steps
from dpo.training.program import Program

SEEN_SECONDS = 30.0
"""How long a network file system may take to show one host what another has written."""
FLOAT32 = 4
"""Bytes of a number in what a run exports."""
SMALL_FILES = 64 * 2**20
"""Bytes for metrics, log-probs, report and what else is small."""


def require_what_comes_later(run: Run, program: Program, *, first_step: int) -> None:
    """Refuse a run that could not be saved or exported, while nothing is computed yet.

    It goes on from the checkpoint of `first_step`, 0 where it begins.

    Raises:
      EnvironmentFailure: naming the place and how much room is missing.
      UserError: for steps to trace that the run does not have.
    """
    require_profiled_steps(run.config.training, run.num_steps)

    def look() -> None:
        policy = run.policy
        require_replaceable_exports(run.run_dir)
        with standing(run.run_dir):
            require_room(
                run.run_dir,
                num_checkpoints(
                    run.config.training,
                    run.num_steps,
                    first_step=first_step,
                    there=len(saved_steps(run.run_dir / CHECKPOINTS_DIRECTORY)),
                ),
                checkpoint=tree_bytes(program.state),
                export=export_bytes(policy, of_adapters_alone=run.config.lora.is_all_there_is),
            )
        model_card(
            run.config,
            policy.pretrained,
            num_steps=run.num_steps,
            num_parameters=0,
            dtype="float32",
            metrics=None,
        )

    on_main(look)


def require_replaceable_exports(run_dir: Path) -> None:
    """Refuse to delete what somebody has put into the directories of the policy or the adapters.

    Raises:
      UserError: naming it.
    """
    for name in (EXPORT_DIRECTORY, ADAPTER_DIRECTORY):
        require_replaceable(run_dir / name, name=f"the place of the run's {name}")


def require_room(
    run_dir: Path,
    count: int,
    *,
    checkpoint: int,
    export: int,
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    largest: Callable[[], int] = lambda: resource.getrlimit(resource.RLIMIT_FSIZE)[0],
) -> None:
    """Room for so many checkpoints and the export, each of so many bytes, whose weights may be one file.

    What checkpoints of an earlier start take counts as room, since they are among the many or deleted for
    them. An export of an earlier start does not: it stays until the new one is whole.

    Raises:
      EnvironmentFailure: with the figures.
    """
    limit, file = largest(), min(export, SHARD_BYTES)
    if limit != resource.RLIM_INFINITY and limit < file:
        raise EnvironmentFailure(
            f"a file of this process may have {limit / 1e9:.2f} GB (ulimit -f), and the export's weights are "
            f"a file of {file / 1e9:.2f} GB; allowed: a larger limit, as `ulimit -f unlimited` sets it"
        )
    needed = count * checkpoint + export + SMALL_FILES
    checkpoints = run_dir / CHECKPOINTS_DIRECTORY
    there = free(run_dir) + sum(held_bytes(checkpoints / str(step)) for step in saved_steps(checkpoints))
    if there < needed:
        raise EnvironmentFailure(
            f"{run_dir} has room for {there / 1e9:.2f} GB, and the run needs {needed / 1e9:.2f} GB: "
            f"{count} checkpoints of {checkpoint / 1e9:.2f} GB (training.keep_checkpoints, and the one that "
            f"is being written) and {export / 1e9:.2f} GB for the export; allowed: a run_dir with more room, "
            "or fewer training.keep_checkpoints"
        )


def num_checkpoints(training: TrainingConfig, num_steps: int, *, first_step: int = 0, there: int = 0) -> int:
    """How many there are at a time, at most: those that are kept, the best, and the one being written.

    Fewer where a run that goes on after `first_step`, with so many `there`, saves fewer.
    """
    if first_step >= num_steps:
        return there
    most = training.keep_checkpoints + (training.keep_best is not None) + 1
    if training.save_minutes is None and training.keep_best is None:
        every = training.save_every or num_steps
        most = min(most, there + -(-num_steps // every) - first_step // every)
    return max(most, there + 1)


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a directory that may not be there, without what is set aside."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def tree_bytes(tree: Any) -> int:
    """Of all arrays together, whole."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def export_bytes(policy: Policy, *, of_adapters_alone: bool) -> int:
    """Of what a run leaves of its policy: all in float32, whatever a base is held in, and what is carried."""
    if of_adapters_alone:
        return FLOAT32 * count_elements(policy.params)
    carried = policy.pretrained.carried
    beside = 0 if carried is None else sum(map(carried.num_bytes, carried.names))
    return FLOAT32 * count_elements((policy.params, policy.frozen)) + beside


def count_elements(tree: Any) -> int:
    """Of all arrays together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def held_bytes(directory: Path) -> int:
    """Of all files below a directory that may not be there."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def require_shared(run_dir: Path, *, seconds: float = SEEN_SECONDS) -> None:
    """Refuse a run directory that some process of the run does not see: hosts with a disk each.

    The lock that the main process holds has its name and its host's. It must be held on every host, since a
    run that somebody starts on another one asks there.

    Raises:
      UserError: in every process, where some have another directory.
      EnvironmentFailure: in every process, where its file system keeps locks to each host.
    """
    if is_alone():
        return
    lock = run_dir / LOCK_FILE
    written = on_main(lambda: lock.read_text(encoding="utf-8"))

    def see() -> bytes:
        deadline = time.monotonic() + seconds
        while not is_main() and not (lock.is_file() and lock.read_text(encoding="utf-8") == written):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{run_dir} is not the directory that process 0 writes to ({written.strip()}): what it "
                    f"wrote was not there after {seconds:g} s; allowed is a run_dir that all hosts share"
                )
            time.sleep(0.1)
        if not is_main() and not is_held(run_dir):
            raise EnvironmentFailure(
                f"the lock of {run_dir}, which process 0 holds ({written.strip()}), is none on "
                f"{socket.gethostname()}: its file system keeps locks to each host, so that two runs could "
                "overwrite each other; allowed: a run_dir on NFS or Lustre with flock (not local_lock, nor "
                "localflock), no bucket that is mounted"
            )
        return b""

    from_all(see)
