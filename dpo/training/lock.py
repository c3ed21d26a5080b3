"""One run at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo.files import writing
from dpo.outcomes import EnvironmentFailure, UserError
from dpo.runs import LOCK_FILE


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run directory. The operating system lets go when the process ends, however it ends.

    Raises:
      ValueError: when another live process holds it, with its number.
      WriteError: when nothing can be written there.
    """
    with writing("the lock", run_dir / LOCK_FILE):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK_FILE).open("a+")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by process {file.read().strip() or '(unknown)'}; "
                "wait for it, stop it, or give another run_dir"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise EnvironmentFailure(
                f"the file system of {run_dir} has no locks ({error.strerror}), so that two runs there could "
                "overwrite each other; allowed: a run_dir on one that has them (NFS 4 or Lustre with flock, "
                "no bucket)"
            ) from error
        with writing("the lock", run_dir / LOCK_FILE):
            file.truncate(0)
            file.write(f"{os.getpid()} of {socket.gethostname()}\n")
            file.flush()
        yield


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
