"""One run at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dpo.files import is_named, require_writable, without_locks, writing
from dpo.outcomes import BUG, ENVIRONMENT, USER, EnvironmentFailure, UserError, outcome_of, text_of
from dpo.runs import LOCK_FILE


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run directory. The operating system lets go when the process ends, however it ends.

    One that is made here, and has nothing in it when the run ends by an error, is taken away again.

    Raises:
      ValueError: when another live process holds it, with its number.
      WriteError: when nothing can be written there.
      EnvironmentFailure: when its file system has no locks, or can't rename directories.
    """
    made = [directory for directory in (run_dir, *run_dir.parents) if not directory.exists()]
    try:
        lock = _locked(run_dir)
    except EnvironmentFailure:
        _take_away(run_dir, made)
        raise
    with lock as file:
        try:
            with writing("the lock", run_dir / LOCK_FILE):
                file.truncate(0)
                file.write(f"{os.getpid()} of {socket.gethostname()}\n")
                file.flush()
            with standing(run_dir):
                yield
        except BaseException:
            _take_away(run_dir, made)
            raise


def _locked(run_dir: Path) -> TextIO:
    """The lock, open and held; whoever held it before may have taken it away with its directory."""
    while True:
        require_writable(run_dir, "a run")
        with writing("the lock", run_dir / LOCK_FILE):
            file = (run_dir / LOCK_FILE).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_named(file, run_dir / LOCK_FILE):
                return file
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "(unknown)"
            file.close()
            raise UserError(
                f"{run_dir} is in use by process {holder}; wait for it, stop it, or give another run_dir"
            ) from error
        except OSError as error:
            file.close()
            raise without_locks(run_dir, error) or error from error
        file.close()


def _take_away(run_dir: Path, made: Sequence[Path]) -> None:
    """Remove the directories that were made, innermost first, where they hold no more than the lock."""
    if run_dir not in made:
        return
    with suppress(OSError):  # something is in one of them, or it is gone already
        for path in run_dir.iterdir():
            if path.name != LOCK_FILE:
                path.rmdir()
        (run_dir / LOCK_FILE).unlink(missing_ok=True)
        for directory in made:
            directory.rmdir()


@contextmanager
def standing(run_dir: Path) -> Iterator[None]:
    """Name the run directory where something fails because it was deleted or renamed meanwhile.

    Raises:
      EnvironmentFailure: in place of an error that has no other cause outside of the run.
    """
    try:
        yield
    except Exception as error:
        if outcome_of(error) in (USER, ENVIRONMENT, BUG):
            require_standing(run_dir, cause=error)
        raise


def require_standing(run_dir: Path, *, cause: Exception | None = None) -> None:
    """That a run directory is the one that this process has locked: by its lock, which nothing removes.

    Raises:
      EnvironmentFailure: saying what is lost.
    """
    try:
        (run_dir / LOCK_FILE).stat()
    except (FileNotFoundError, NotADirectoryError) as missing:
        said = "" if cause is None else f" ({text_of(cause)})"
        raise EnvironmentFailure(
            f"the run directory {run_dir} was deleted or renamed while the run went on: its settings, "
            "metrics, checkpoints and export are lost where it was deleted; where it was renamed, give it "
            f"its name again, and the same command goes on from the newest checkpoint{said}"
        ) from cause or missing
    except OSError:  # what can't be looked at now is not gone
        pass


def is_held(run_dir: Path) -> bool:
    """Whether a live process holds the run directory, as far as the file system passes locks on."""
    path = run_dir / LOCK_FILE
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
