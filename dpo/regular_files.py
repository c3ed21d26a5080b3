"""What a name that came from outside stands for: a file that ends, and one below its own directory."""

from __future__ import annotations

import os
import stat
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePosixPath

from dpo.outcomes import UserError


def require_regular(path: Path, *, name: str | None = None) -> Path:
    """The path of a file that ends; a pipe or a device may not.

    Raises:
      UserError: naming what is no regular file, or is not there, by its path where it has no other `name`.
    """
    if (problem := why_no_file(path)) is not None:
        raise UserError(f"{name or path}: {problem}")
    return path


def is_there(path: Path) -> bool:
    """Whether there is a file of this name; one that is no regular file is not left aside in silence.

    Raises:
      UserError: naming it.
    """
    return os.path.lexists(path) and require_regular(path) is path


def why_no_file(path: Path) -> str | None:
    """Why what has a name is no file that can be read to its end, in words; None where it is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no such file{near_name(path)}"
    except (OSError, ValueError) as error:  # a loop of links, a name that no file can have
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    kinds = (kind for is_of, kind in _KINDS if is_of(mode))
    return None if stat.S_ISREG(mode) else f"must be a regular file, and is a {next(kinds, 'device')}"


def near_name(path: Path) -> str:
    """Words that ask for the path which differs in one name and is there, for a path that is not; or none."""
    try:
        there = next(parent for parent in path.parents if parent.is_dir())
        wrong, *rest = path.relative_to(there).parts
        names = [entry.name for entry in islice(there.iterdir(), 1000)]
        near = [there.joinpath(name, *rest) for name in get_close_matches(wrong, names)]
        meant = next((one for one in near if one.exists() and str(one).isprintable()), None)
    except (OSError, ValueError, StopIteration):  # what may not be listed, or is no name
        return ""
    return f"; did you mean {meant}?" if meant is not None else ""


_KINDS = ((stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))


def is_inside(name: str) -> bool:
    """Whether a name that came with a directory can only mean something below it, links left aside."""
    pure = PurePosixPath(name)
    parts = [len(part.encode("utf-8", "replace")) for part in pure.parts]
    readable = name.isprintable() and "\\" not in name and max(parts, default=0) <= 255 and sum(parts) < 1000
    return readable and not pure.is_absolute() and ".." not in pure.parts and pure.parts != ()
