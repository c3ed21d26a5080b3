"""Checkpoints: the training state by Orbax, what it belongs to, and checksums over it all.

    checkpoints/
      40/                 the state after 40 updates
        state/            (Orbax) parameters, optimiser state, step, a moved reference, a running mean
        identity.json     what the run was: settings, data, versions, … (dpo/training/identity.py)
        SHA256SUMS        of every file above, written last
      60.writing/         being written; it gets its name when it is whole
      20.damaged/         failed its checksums when a run resumed

The state is copied to the host by `save` and written by threads behind it.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo.files import (
    UNFINISHED,
    WriteError,
    damaged_files,
    sync,
    unlisted_files,
    write_checksums,
    writing,
)
from dpo.outcomes import OUT_OF_MEMORY, PEER_LOST, StopRequested, UserError, chain_of, outcome_of
from dpo.runs import Identity
from dpo.training.step import Params, TrainState
from dpo.typed_json import read_typed

DAMAGED = ".damaged"
STATE, IDENTITY_FILE = "state", "identity.json"
_STATUS = re.compile(r"\s*[A-Z]+(_[A-Z]+)*: ")
"""How the errors of TensorStore begin, which are `ValueError`s: NOT_FOUND: …, DATA_LOSS: …."""
CENTURY = 100 * 365 * 24 * 3600
"""Seconds."""


class Checkpoints:
    """The checkpoints of a run under `directory`; leaving the context waits for saves."""

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False):
        """Keep the newest `keep`. `read_only` leaves alone what a run may be writing there at this moment.

        Raises:
          WriteError: when the directory can't be made or written.
        """
        self._directory, self._keep = directory.absolute(), keep
        self._orbax = ocp.StandardCheckpointer(async_options=_async_options())
        self._finisher: threading.Thread | None = None
        self._failure: Exception | None = None
        self._newest = self.latest
        if not read_only and jax.process_index() == 0:
            with writing("checkpoints", self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
                for leftover in self._directory.glob(f"*{UNFINISHED}"):
                    shutil.rmtree(leftover)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if error is None or issubclass(error, StopRequested):  # stopped, and what was to be saved is not
                raise
        finally:
            # What Orbax still holds of a save that failed, `wait` has said; a save is whole by its checksums.
            with suppress(OSError, ValueError, RuntimeError):
                self._orbax.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first, damaged or not."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self._directory / str(step)

    def damage(self, step: int) -> list[str]:
        """What is wrong with the files of a checkpoint; empty when all have their checksums."""
        return damaged_files(self.path(step)) + unlisted_files(self.path(step))

    def newest_whole(self) -> tuple[int | None, dict[int, list[str]]]:
        """The newest step whose files are all intact, and what is wrong with each newer one."""
        damage: dict[int, list[str]] = {}
        for step in reversed(self.steps):
            problems = self.damage(step)
            if not problems:
                return step, damage
            damage[step] = problems
        return None, damage

    def is_saved(self, step: int) -> bool:
        """Whether a step is saved, or being saved; remembered, as processes may not see a file at once."""
        return self._newest is not None and step <= self._newest

    def go_on_from(self, step: int) -> None:
        """Take the checkpoint of `step` for the newest; what comes after it will be saved again."""
        self._newest = step

    def set_aside(self, step: int) -> Path:
        """Give a damaged checkpoint a name under which it is never read; returns where it is."""
        target = self._directory / f"{step}{DAMAGED}"
        if jax.process_index() == 0:
            with writing("a damaged checkpoint's new name", target):
                shutil.rmtree(target, ignore_errors=True)
                self.path(step).rename(target)
        return target

    def save(
        self, step: int, state: TrainState, identity: Mapping[str, object], *, protect: Collection[int] = ()
    ) -> None:
        """Save the state after `step` updates and what it belongs to: copied now, written behind.

        When it is whole, all but the newest `keep` and those of the steps in `protect` are deleted.

        Raises:
          WriteError: when this save can't begin, or the one before it failed.
        """
        self.wait()
        if self.is_saved(step):
            return
        if jax.process_index() == 0:
            self._require_there(step)
        self._newest = step
        beside = self._directory / f"{step}{UNFINISHED}"
        try:
            with self._writing(step):
                self._orbax.save(beside / STATE, state._asdict(), force=True)
        except WriteError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        self._finisher = threading.Thread(
            target=self._finish,
            args=(step, beside, {**identity, "state": _shapes(state)}, frozenset(protect)),
            name="checkpoint",
        )
        self._finisher.start()

    def wait(self) -> None:
        """Return when every save is on disk.

        Raises:
          WriteError: when one could not be written: the path, the reason, and what is left.
        """
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def identity(self, step: int) -> Identity:
        """What the checkpoint of `step` belongs to.

        Raises:
          UserError: naming the file, when it is not what a run writes.
        """
        return cast(Identity, read_typed(self.path(step) / IDENTITY_FILE, _Identity))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` updates, with the shapes, dtypes and shardings of `like`.

        Raises:
          ValueError: when the checkpoint holds another tree or other shapes.
        """
        self._require_shapes(step, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        try:
            return TrainState(**self._orbax.restore(self.path(step) / STATE, abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path(step)} could not be restored: {error}") from error

    def stored_params(self, step: int, like: Params) -> Params:
        """The parameters alone after `step` updates, each of which is read when it is asked for (`Stored`);
        neither optimiser nor reference is.

        Raises:
          ValueError: when the checkpoint holds other parameters.
        """
        saved, now = self.identity(step)["state"], _shapes({"params": like})
        if {name: text for name, text in saved.items() if name in now} != now:
            raise UserError(f"{self.path(step)} does not fit these settings: another model?")
        return jax.tree_util.tree_map_with_path(partial(_InCheckpoint, self.path(step) / STATE), like)

    def restore_params(self, step: int, like: Params) -> Params:
        """The same as numpy's arrays."""
        return jax.tree.map(lambda stored: stored.load(), self.stored_params(step, like))

    def _require_there(self, step: int) -> None:
        """Orbax would make the directory anew, and what is left of the run would look like all of it."""
        if not self._directory.is_dir():
            raise WriteError(
                f"the checkpoint of step {step} could not be written to {self.path(step)}: {self._directory} "
                "was deleted or renamed while the run went on; the checkpoints in it are lost where it was "
                "deleted"
            )

    def _require_shapes(self, step: int, like: TrainState) -> None:
        saved, now = self.identity(step)["state"], _shapes(like)
        names = [name for name in dict.fromkeys([*saved, *now]) if saved.get(name) != now.get(name)]
        if names:
            listed = "; ".join(f"{name}: {saved.get(name)} → {now.get(name)}" for name in names[:3])
            raise UserError(
                f"{self.path(step)} does not fit these settings (another model or optimiser?): {len(names)} "
                f"arrays differ, the first of them {listed}"
            )

    def _finish(
        self, step: int, beside: Path, identity: Mapping[str, object], protect: frozenset[int]
    ) -> None:
        """Wait for Orbax, add identity and checksums, give the checkpoint its name, delete old ones."""
        try:
            with self._writing(step):
                self._orbax.wait_until_finished()
                if jax.process_index() != 0:
                    return
                content = json.dumps(identity, indent=1, sort_keys=True)
                (beside / IDENTITY_FILE).write_text(content, encoding="utf-8")
                write_checksums(beside)
                beside.rename(self.path(step))
                sync(self._directory)
            self._delete_old(protect)
        except Exception as failure:  # a thread's own would be printed, and the run go on without saving
            shutil.rmtree(beside, ignore_errors=True)
            self._failure = failure

    def _delete_old(self, protect: frozenset[int]) -> None:
        for step in self.steps[: -self._keep]:
            if step not in protect:
                # Renamed first: a half-deleted checkpoint must not look like one.
                doomed = self._directory / f"{step}{UNFINISHED}"
                try:
                    self.path(step).rename(doomed)
                    shutil.rmtree(doomed)
                except OSError as error:  # the new one is whole all the same; the next save tries again
                    warnings.warn(f"{self.path(step)}, an old checkpoint, stays: {error}", stacklevel=1)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Name the checkpoint and what is left in whatever a disk refuses; a bug stays what it is."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if outcome_of(error) in (PEER_LOST, OUT_OF_MEMORY) or not _is_of_files(error):
                raise
            latest = self.latest
            left = "there is none before it" if latest is None else f"the newest there is step {latest}"
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise WriteError(
                f"the checkpoint of step {step} could not be written to {self.path(step)}: {reason}; {left}"
            ) from error


def _is_of_files(error: BaseException) -> bool:
    """Whether an error is the system's, or one that Orbax made of it or TensorStore says by its status."""
    links = [link for one in chain_of(error) for link in (one, one.__context__)]
    return any(isinstance(link, OSError) or _STATUS.match(str(link)) for link in links if link is not None)


class _Identity(TypedDict):
    """What a checkpoint says of itself beside what its run was."""

    state: dict[str, str]
    """Type and shape of each of its arrays, by its place."""


class _InCheckpoint:
    """A parameter that stays in a checkpoint until it is asked for."""

    def __init__(self, state: Path, path: tuple[Any, ...], like: Any):
        self.shape, self.dtype, self.size = like.shape, like.dtype, like.size
        self._state, self._path = state, path

    def load(self) -> np.ndarray:
        """Read it, on the host.

        Raises:
          UserError: naming the checkpoint, when it holds something else.
        """
        wanted = _nested(self._path, jax.ShapeDtypeStruct(self.shape, self.dtype))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        part = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                (values,) = jax.tree.leaves(checkpointer.restore(self._state, part))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{self._state} could not be read: {error}") from error
        return values


def _shapes(state: TrainState | dict[str, Params]) -> dict[str, str]:
    """Type and shape of every array of a state, by its place."""
    tree = state._asdict() if isinstance(state, TrainState) else state
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _nested(path: tuple[Any, ...], leaf: Any) -> dict[str, Params]:
    """A state that has nothing but this leaf of its parameters."""
    for key in reversed(path):
        leaf = {key.key: leaf}
    return {"params": leaf}


def _async_options() -> ocp.options.AsyncOptions:
    """Orbax measures how long it waited on the wall clock, which may be set: one process waits for ever."""
    if jax.process_count() > 1:
        return ocp.options.AsyncOptions()
    return ocp.options.AsyncOptions(timeout_secs=CENTURY, create_directories_asynchronously=False)
