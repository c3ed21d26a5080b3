"""A look at a stranger's file in a process of its own, before this one opens it with a library.

A library that takes a file's word for a size, an offset or a pattern can fill the memory, read beyond the
file's end or abort, and no handler in the same process helps. So a script of this package opens the file
first, in a process that the kernel holds to limits of memory and time and that knows none of the
environment's secrets. It says in one line of JSON what it found; whatever becomes of it, this one goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEMORY = 3 << 30
"""Bytes of address space of such a process, beside four times those of the files."""
SECONDS = 60
"""Seconds of CPU time of such a process, beside those for the files."""
BYTES_A_SECOND = 10_000_000
"""Of a file, for each of which one more second is given."""
_PATIENCE = 10
"""Times the CPU time that it may take by the clock: other programs may want the machine, too."""
_LONGEST = 7 * 24 * 3600
"""Seconds by the clock that none takes: a file may be terabytes."""
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL", "HOME")
_ENVIRONMENT += ("TMPDIR", "TEMP", "TMP")
_ALONE = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
}

Said = dict[str, Any]
"""What a script said in a line of JSON."""


def look(script: Path, request: Mapping[str, Any], *, size: int, writes: int = 0) -> Said:
    """What a script says of a request about files of `size` bytes; {"error": …} where it could not.

    The script gets the limits, the size and the request as one JSON object on its input, and holds itself to
    them. What it says last is the answer; where that is {"at": a file's name}, the process ended at that
    file. It may write files of at most `writes` bytes.
    """
    memory, seconds = MEMORY + 4 * size, SECONDS + size // BYTES_A_SECOND
    limits = {"memory": memory, "seconds": seconds, "writes": writes, "size": size}
    environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ} | _ALONE
    patience = min(_PATIENCE * seconds, _LONGEST)
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script)],
            input=json.dumps({**limits, **request}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            timeout=patience,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        how = f"the process that looks at it does not end within {patience} s"
        return {"error": f"{_where(_last(error.stdout))}{how}"}
    said = _last(done.stdout)
    if said is not None and "at" not in said:
        return said
    return {"error": f"{_where(said)}{_how(done.returncode, seconds, memory)}"}


def _last(output: bytes | None) -> Said | None:
    """The last whole line that a script said."""
    with contextlib.suppress(ValueError, IndexError):
        said = json.loads((output or b"").splitlines()[-1])
        return said if isinstance(said, dict) else None
    return None


def _where(said: Said | None) -> str:
    return "" if said is None or "at" not in said else f"{said['at']}: "


def stored_bytes(path: Path) -> int:
    """The size of a file, of which holes count for nothing, where its file system tells of them."""
    found = path.stat()
    return min(found.st_size, found.st_blocks * 512) if found.st_blocks else found.st_size


def _how(code: int, seconds: int, memory: int) -> str:
    if code >= 0:
        return f"the process that looked at it ended with code {code}"
    name = signal.Signals(-code).name
    if name in ("SIGXCPU", "SIGKILL"):
        return f"looking at it takes more than {seconds} s, or more than {memory >> 20} MiB of memory"
    return f"it makes the library that reads it crash ({name})"
