"""A window of a run's steps under JAX's profiler, and the part of its time in which the device works.

    sent        n-2     n-1      n              host: a step is sent when the one before the last is done
    device  |n-4 ||n-3 ||n-2 ||n-1 ||n …        device: one step after the other, or gaps where it waits
                 ^ second sending ^ last        measured between two sendings: whole steps, and what lies
                                                between them (data, metrics, logs)

What the device does is read from the trace that the profiler wrote: of a GPU the kernels on its streams, of
a TPU its XLA operations, of a CPU the programs of XLA's executor, each from its first operation to its last:
gaps between the tiny operations of a program are the executor's own, and nothing waits for the host there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData

from dpo.config import TrainingConfig
from dpo.outcomes import UserError
from dpo.training.hooks import Done

STEP = "train"
"""What a sending is called in a trace; the profiler's own tools group by it."""
LEAST_STEPS = 3
"""Fewer have no whole step between the second sending and the last."""

_LINES = {"/device:GPU:": "Stream #", "/device:TPU:": "XLA Ops"}
"""Planes of devices, and what those of their lines are called on which they compute. The other lines are the
same again by program or step, or the profiler's own overhead."""
_HOST = "/host:CPU"
_OF_XLA, _RUN = "hlo_op", "run_id"
"""What XLA's CPU executor says of each operation, and nothing else on the host does; and of which run."""
_COPIES = ("MemcpyH2D", "MemcpyD2H")
"""On a GPU's streams, but no computing: while only they run the device waits for the host."""

Trace = Any
"""A `jax.profiler.ProfileData`, which is no type to checkers."""
Spans = list[tuple[float, float]]
"""Begin and end, in nanoseconds."""


class Share(NamedTuple):
    """How much of a time a device works."""

    share: float
    """Of several devices the least."""
    seconds: float
    """Of the time that was looked at."""


def device_share(directory: Path, *, between_steps: bool = True) -> Share:
    """From the newest trace in a directory of JAX's profiler: how much of its time the device works.

    The time is that from the second step's sending to the last's, or else from the first to the last thing
    that a device does.

    Raises:
      UserError: where the trace has no device, or no three steps.
    """
    traces = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    newest = [path for path in traces if path.parent == traces[-1].parent]
    if not newest:
        raise UserError(f"{directory} has no trace of JAX's profiler")
    return share_of([ProfileData.from_file(str(path)) for path in newest], between_steps=between_steps)


def share_of(traces: Iterable[Trace], *, between_steps: bool = True) -> Share:
    """`device_share` of traces that were read."""
    shares = []
    for trace in traces:
        sent = _sendings(trace)
        if between_steps and len(sent) < LEAST_STEPS:
            raise UserError(f"the trace has {len(sent)} steps; at least {LEAST_STEPS} are needed")
        for spans in _devices(trace):
            begin, end = (sent[1], sent[-1]) if between_steps else (min(spans)[0], max(b for _, b in spans))
            shares.append(Share(covered(spans, begin, end) / max(end - begin, 1), (end - begin) / 1e9))
    if not shares:
        raise UserError("the trace has no device that computes")
    return min(shares)


def covered(spans: Spans, begin: float, end: float) -> float:
    """How much of the time from `begin` to `end` some span covers."""
    reached, found = begin, 0.0
    for start, stop in sorted(spans):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            found, reached = found + stop - start, stop
    return found


def _sendings(trace: Trace) -> list[float]:
    """When steps were sent, in order."""
    host = trace.find_plane_with_name(_HOST)
    lines = [] if host is None else host.lines
    return sorted(event.start_ns for line in lines for event in line.events if event.name == STEP)


def _devices(trace: Trace) -> Iterator[Spans]:
    """What each device computes; of a machine without accelerators what its CPU does."""
    accelerators = [
        (plane, name)
        for plane in trace.planes
        for prefix, name in _LINES.items()
        if plane.name.startswith(prefix)
    ]
    for plane, name in accelerators:
        lines = [line for line in plane.lines if line.name.startswith(name)]
        events = [event for line in lines for event in line.events if not event.name.startswith(_COPIES)]
        if events:
            yield [(event.start_ns, event.end_ns) for event in events]
    if not accelerators and (programs := _programs(trace)):
        yield programs


def _programs(trace: Trace) -> Spans:
    """From the first operation to the last of everything that the CPU ran."""
    host, spans = trace.find_plane_with_name(_HOST), dict[int, tuple[float, float]]()
    for event in (event for line in ([] if host is None else host.lines) for event in line.events):
        of_xla = dict(event.stats)
        if _OF_XLA in of_xla:
            begin, end = spans.get(of_xla[_RUN], (event.start_ns, event.end_ns))
            spans[of_xla[_RUN]] = min(begin, event.start_ns), max(end, event.end_ns)
    return list(spans.values())


class Profiler:
    """Traces a window of a start's steps into a directory, and says what it came to."""

    def __init__(
        self,
        directory: Path,
        *,
        begin: int | None,
        steps: int,
        settle: Callable[[], None],
        go_on: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """The `steps` after update `begin`, or none. A trace is read between `settle` and `go_on`."""
        self._directory, self._begin, self._steps = directory, begin, steps
        self._settle, self._go_on, self._log = settle, go_on, log
        self._is_on = False
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._compiled = 0

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()  # of a run that ends within the window

    def after(self, done: Done) -> None:
        """A hook: begins and ends the trace."""
        shapes = tuple(np.shape(array) for array in done.batch)
        self._compiled += self._is_on and shapes not in self._shapes
        self._shapes.add(shapes)
        if done.step == self._begin:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # to trace every call of a function would slow the host down
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._is_on = True
        elif self._begin is not None and done.step == self._begin + self._steps:
            self._stop()
            self._settle()
            self._log(
                f"profile of steps {self._begin} to {done.step - 1}: {self._said()} ({self._directory})"
            )
            self._go_on()

    def _stop(self) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False

    def _said(self) -> str:
        try:
            share, seconds = device_share(self._directory)
        except UserError as error:  # such as of a GPU whose driver lets nobody count
            return str(error)
        compiled = f", new shapes that it waited for: {self._compiled}" if self._compiled else ""
        return f"the device worked {100 * share:.1f}% of {seconds:.2f} s{compiled}"


def require_profiled_steps(training: TrainingConfig, num_steps: int) -> None:
    """Refuse to trace more steps than a run has.

    Raises:
      UserError: naming both settings.
    """
    steps, skip = training.profiler_steps, training.profiler_skip
    if steps is not None and skip + steps > num_steps:
        raise UserError(
            f"training.profiler_steps is {steps} after training.profiler_skip {skip}, and the run has "
            f"{num_steps} steps; allowed is {num_steps} together"
        )


def first_profiled(training: TrainingConfig, resumed: int, num_steps: int) -> int | None:
    """The update after which a start traces that goes on after `resumed` updates.

    None where nothing is to be traced, or too few steps are left.
    """
    begin = resumed + training.profiler_skip
    return None if training.profiler_steps is None or begin + training.profiler_steps > num_steps else begin
