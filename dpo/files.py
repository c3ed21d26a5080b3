"""Files that are whole or not there: written beside and renamed, with checksums; errors name the path.

The checksums of a directory are a file `SHA256SUMS` in it, which `sha256sum -c SHA256SUMS` reads too. It is
written last, so a directory that has one was complete when it got its name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import safetensors

from dpo.outcomes import EnvironmentFailure
from dpo.regular_files import is_inside, why_no_file

CHECKSUMS_FILE = "SHA256SUMS"
UNFINISHED = ".writing"
"""Ending of what is being written; what has it belongs to nobody once its writer is gone."""
MAX_CHECKSUMS = 1 << 24
"""Bytes of a list of checksums that is read."""
MAX_HOLES = 1 << 36
"""Bytes of a file with a checksum that are not stored, as file systems say, which some compress."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
REPLACED = ".replaced"
"""Ending of a directory that is making room for its successor."""


class WriteError(EnvironmentFailure):
    """Something could not be written: the message says what, where and why."""


@contextmanager
def writing(what: str, path: str | Path, *, note: str = "") -> Iterator[None]:
    """Turn a failure to write `path` (disk full, read-only, no permission) into one error that names it.

    Raises:
      WriteError: what, the path, the reason, and `note`.
    """
    try:
        yield
    except EnvironmentFailure:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(
            f"{what} could not be written to {path}: {reason}{f'; {note}' if note else ''}"
        ) from error


def require_writable(directory: Path, what: str, *, note: str = "") -> None:
    """Write, lock, rename and remove a directory with a file in it before much is computed for what goes
    there.

    Raises:
      WriteError: where nothing can be written.
      EnvironmentFailure: where there are no locks, or directories can't be renamed, as in most buckets that
        are mounted.
    """
    with writing(what, directory, note=note):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, suffix=UNFINISHED) as probe:
            before, after = Path(probe) / "before", Path(probe) / "after"
            before.mkdir()
            with (before / "file").open("wb") as file:
                file.write(b"whole")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise without_locks(directory, error) or error from error
            try:
                before.rename(after)
            except OSError as error:
                raise _without_renames(directory, error) from error


def _without_renames(directory: Path, error: OSError) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"the file system of {directory} can't rename a directory ({error.strerror}), by which all that is "
        f"written here gets its name once it is whole; {_WHERE_INSTEAD}"
    )


def require_same_file(what: str, file: IO[str], path: Path) -> None:
    """That an open file still has its name: what is written to one that was deleted is lost without an error.

    Raises:
      WriteError: naming the file, or what of its directories is gone.
    """
    with writing(what, path):
        if is_named(file, path):
            return
    gone = next((parent for parent in reversed(path.parents) if not parent.exists()), path)
    raise WriteError(
        f"{what} could not be written to {path}: {gone} was deleted, renamed or replaced meanwhile; what "
        "stood there is lost where it was deleted"
    )


def is_named(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def new_file(what: str, path: Path) -> Iterator[Path]:
    """Where to write a file that takes the name `path` when it is whole; a reader finds the old or the new.

    Raises:
      WriteError: with the path and the reason; the old file is still there.
    """
    beside = path.with_name(path.name + UNFINISHED)
    with writing(what, path):
        try:
            make_anew(beside)
            yield beside
            sync(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def make_anew(path: Path) -> None:
    """An empty file of this name: what stands there, be it a link elsewhere, is taken away first."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))


def replace_text(path: Path, text: str, *, what: str) -> None:
    """Write a small file whole or not at all; raises as `new_file` does."""
    with new_file(what, path) as beside:
        beside.write_text(text, encoding="utf-8")


LOCKED = f"{UNFINISHED}.lock"
"""Ending of the file that is held while the directory of its name is written, by `alone`: who holds a lock
of its own for that directory meanwhile (`NAME.lock`) must not wait for itself."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without locks answers: some network file systems, and buckets that are mounted."""


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process writes `path`, and hold it: a file beside it, which the last one removes.

    Directories can't be locked on every network file system; the operating system lets go of a file when
    its process ends, however it ends.

    Raises:
      EnvironmentFailure: where the file system has no locks.
    """
    lock = path.with_name(path.name + LOCKED)
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_named(file, lock):
                break
        except OSError as error:
            file.close()
            raise without_locks(path.parent, error) or error from error
        file.close()  # who held it before has removed it: another file has its name by now
    with file:
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} of {socket.gethostname()}\n")
            file.flush()
            yield
        finally:
            lock.unlink(missing_ok=True)


def without_locks(directory: Path, error: OSError) -> EnvironmentFailure | None:
    """What to say where a file system has no locks; None for any other error."""
    if error.errno not in NO_LOCKS:
        return None
    return EnvironmentFailure(
        f"the file system of {directory} has no locks ({error.strerror}), so that two processes there could "
        f"overwrite each other; {_WHERE_INSTEAD}"
    )


_WHERE_INSTEAD = (
    "allowed: a directory on a local disk, NFS or Lustre with flock; no bucket that is mounted (gcsfuse, "
    "mountpoint-s3)"
)


@contextmanager
def new_directory(what: str, path: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` when it is whole; an older one there is replaced.

    A failure leaves `path` as it was. A process that is killed leaves the name with `UNFINISHED` behind,
    which the next one removes. Of several that write the same directory one waits for the other.

    Raises:
      WriteError: with the path and the reason.
    """
    beside, replaced = (path.with_name(path.name + ending) for ending in (UNFINISHED, REPLACED))
    with writing(what, path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(what, path), alone(path):
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        for leftover in (beside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            write_checksums(beside)
            if path.exists():
                path.rename(replaced)
            beside.rename(path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        sync(path.parent)


def write_checksums(directory: Path) -> None:
    """Write `SHA256SUMS` over all files of a directory, to the disk itself."""
    lines = [f"{_sha256(directory / name)}  {name}\n" for name in _files(directory)]
    (directory / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
    for name in [*_files(directory), CHECKSUMS_FILE]:
        sync(directory / name)
    sync(directory)


def damaged_files(directory: Path, *, but_for: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the files that `SHA256SUMS` lists: each as "name: what"; empty when nothing is.

    Missing or other bytes are damage. Files whose names end in one of `but_for` are not looked at.

    Raises:
      EnvironmentFailure: when a file is there but can't be read (a permission, a broken disk or connection).
    """
    try:
        expected = _read_checksums(directory / CHECKSUMS_FILE)
    except FileNotFoundError:
        return [f"{CHECKSUMS_FILE}: is not there"]
    except ValueError as error:
        return [f"{CHECKSUMS_FILE}: is not a list of checksums{f': {error}' if str(error) else ''}"]
    except OSError as error:
        raise _unreadable(directory / CHECKSUMS_FILE, error) from error
    if not expected:
        return [f"{CHECKSUMS_FILE}: is empty"]
    problems = []
    for name, digest in expected.items():
        if name.endswith(but_for):
            continue
        try:
            if (directory / name).exists() and (problem := why_no_file(directory / name)) is not None:
                problems.append(f"{name}: {problem}")
            elif (holes := _holes(directory / name)) > MAX_HOLES:
                problems.append(f"{name}: {holes} of its bytes are holes; allowed are {MAX_HOLES}")
            elif _sha256(directory / name) != digest:
                problems.append(f"{name}: its checksum does not match")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            problems.append(f"{name}: {error.strerror}")
        except ValueError as error:  # a name that no file can have
            problems.append(f"{name}: {error}")
        except OSError as error:
            raise _unreadable(directory / name, error) from error
    return problems


def _holes(path: Path) -> int:
    """Bytes of a file that nothing was stored for: reading terabytes of them takes hours."""
    found = path.stat()
    return found.st_size - 512 * found.st_blocks


def _read_checksums(path: Path) -> dict[str, str]:
    """Names of files below the directory, with their checksums.

    Raises:
      ValueError: for anything else in it, such as a name that leads out.
    """
    if path.exists() and (problem := why_no_file(path)) is not None:
        raise _NoChecksumsError(problem)
    if path.exists() and path.stat().st_size > MAX_CHECKSUMS:
        raise _NoChecksumsError(f"it has more than {MAX_CHECKSUMS} bytes")
    expected: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        digest, _, name = line.partition("  ")
        if not _DIGEST.fullmatch(digest):
            raise _NoChecksumsError(f"line {number} does not begin with a SHA-256")
        if name in expected or not is_inside(name):
            raise _NoChecksumsError(
                f"line {number} names {name[:200]!r}; allowed is each file of the directory once, "
                "relative to it"
            )
        expected[name] = digest
    return expected


class _NoChecksumsError(ValueError):
    """A file that should list checksums does not; says why."""


def _unreadable(path: Path, error: OSError) -> EnvironmentFailure:
    """Bytes that could not be read now are no proof of damage: another time they may be there."""
    return EnvironmentFailure(f"{path} could not be read: {error.strerror or error}; nothing was changed")


def unlisted_files(directory: Path) -> list[str]:
    """Files that `SHA256SUMS` does not list, each as "name: what": a list that lost lines shows by them."""
    try:
        lines = (directory / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    listed = {line.partition("  ")[2] for line in lines}
    return [f"{name}: is not in {CHECKSUMS_FILE}" for name in _files(directory) if name not in listed]


def sync(path: Path) -> None:
    """Make what a file holds, or the names in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> list[str]:
    """Names of all files below, with / between folders, but for the checksums'."""
    files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if path.as_posix() != CHECKSUMS_FILE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
