"""Which part of the time a device works, read from a trace of JAX's profiler."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def device_share(trace: Path) -> float | None:
    """From a device's first event to its last, the part in which some event runs; None without a device.

    `trace` is the directory that `jax.profiler.trace` wrote. Of several devices the least.
    """
    from jax.profiler import ProfileData

    shares = []
    for path in sorted(trace.rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:"):
                events = [event for line in plane.lines for event in line.events]
                spans = [(event.start_ns, event.start_ns + event.duration_ns) for event in events]
                shares += [covered_share(spans)] if spans else []
    return min(shares, default=None)


def covered_share(spans: Iterable[tuple[float, float]]) -> float:
    """Of the time from the first start to the last end, the part that some span covers."""
    ordered = sorted(spans)
    first, reached, covered = ordered[0][0], ordered[0][0], 0.0
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (reached - first) if reached > first else 1.0
