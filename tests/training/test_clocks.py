"""Durations are measured on clocks that nobody sets."""

import re
from pathlib import Path

import dpo

WALL_CLOCKS = re.compile(r"(?<!wall_time=)time\.time\(|time_ns\(|datetime|st_mtime|getmtime")
"""But for the stamp on an event of TensorBoard's, which nothing here reads."""


def test_no_part_of_a_run_looks_at_the_wall_clock():
    package = Path(dpo.__path__[0])
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in (package / "training").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if WALL_CLOCKS.search(line)
    ]
    assert not found
