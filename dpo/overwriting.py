"""What a command may write over: what its like wrote before, and nothing of anybody else's.

Asked before anything is computed, and again before it is written where much lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo.files import CHECKSUMS_FILE, unlisted_files
from dpo.outcomes import UserError


def require_own(directory: Path, names: Sequence[str], *, is_own: bool, setting: str, kind: str) -> None:
    """Refuse a directory that is none of a `kind` and holds a file which one would write over.

    Raises:
      UserError: naming the files, before anything is written.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{setting} is {str(directory)!r}, a file; allowed: a directory, there or not yet")
    there = [name for name in names if (directory / name).exists()]
    if there and not is_own:
        raise UserError(
            f"{setting} is {str(directory)!r}, which is no {kind} and holds {', '.join(there)}, which a "
            f"{kind} would write over; allowed: a directory of its own"
        )


def require_replaceable(output: Path, *, name: str = "output") -> None:
    """An export takes the place of an earlier one, and of nothing else.

    Raises:
      UserError: naming what it would delete.
    """
    if output.is_file() and output.suffix != ".gguf":
        raise UserError(f"{name} is {output}, which is a file; allowed: a directory")
    if output.is_dir() and any(output.iterdir()):
        whole = (output / CHECKSUMS_FILE).is_file()
        others = unlisted_files(output) if whole else [f"{CHECKSUMS_FILE}: is not there"]
        if others or output.suffix == ".gguf":
            raise UserError(
                f"{name} is {output}, which holds what no export wrote ({'; '.join(others[:3])}) and would "
                "be deleted; allowed: a new or empty directory, or an earlier export"
            )
