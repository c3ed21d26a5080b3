"""What a trace says of the device: of a GPU's streams, of a CPU's threads, and of a run's own loop."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from dpo.config import TrainingConfig
from dpo.data.batch import Batch
from dpo.outcomes import UserError
from dpo.training import profile
from dpo.training.hooks import Done
from dpo.training.profile import (
    Profiler,
    Share,
    Trace,
    covered,
    first_profiled,
    require_profiled_steps,
    share_of,
)

TRACES = Path(__file__).parent / "traces"


def trace(name: str, leave_out: str = "") -> Trace:
    """A stored trace, its comments and the lines with `leave_out` taken off."""
    lines = (TRACES / f"{name}.textproto").read_text().splitlines()
    kept = [line for line in lines if line[:1] != "#" and not (leave_out and leave_out in line)]
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace("\n".join(kept)))


def test_of_a_gpu_what_runs_on_its_streams_counts():
    """Copies from the host, the span of a program and the profiler's overhead don't; nor does the lead."""
    share, seconds = share_of([trace("gpu")])
    assert share == pytest.approx(270 / 300)
    assert seconds == pytest.approx(300e-6)


def test_of_a_cpu_the_programs_that_its_executor_runs_count():
    """Waiting for one, marks of its operations' ends and the host's own work don't."""
    share, seconds = share_of([trace("cpu")])
    assert share == pytest.approx(170 / 200)
    assert seconds == pytest.approx(200e-6)


def test_of_several_devices_the_least_counts():
    both = share_of([trace("gpu"), trace("cpu")])
    assert both.share == pytest.approx(170 / 200)


def test_without_marks_of_steps_the_devices_own_time_is_measured():
    assert share_of([trace("cpu")], between_steps=False).share == pytest.approx(370 / 400)


@pytest.mark.parametrize(
    ("name", "left_out", "said"),
    [
        ("gpu", 'name: "train"', "the trace has 0 steps; at least 3 are needed"),
        ("cpu", 'name: "hlo_op"', "the trace has no device that computes"),
    ],
)
def test_a_trace_that_tells_nothing_is_said(name, left_out, said):
    with pytest.raises(ValueError, match=said):
        share_of([trace(name, left_out)])


def test_spans_that_overlap_count_once():
    assert covered([(0.0, 4.0), (2.0, 6.0), (8.0, 10.0)], 0.0, 10.0) == 8
    assert covered([(3.0, 20.0), (0.0, 4.0), (1.0, 2.0)], 2.0, 10.0) == 8
    assert covered([(3.0, 3.0)], 3.0, 3.0) == 0


def test_a_start_that_has_too_few_steps_left_traces_none():
    training = TrainingConfig(profiler_steps=4, profiler_skip=2)
    assert first_profiled(training, 0, 6) == 2
    assert first_profiled(training, 5, 11) == 7
    assert first_profiled(training, 6, 11) is None
    assert first_profiled(TrainingConfig(), 0, 100) is None
    require_profiled_steps(training, 6)
    with pytest.raises(
        UserError, match=r"profiler_steps is 4 after training\.profiler_skip 2, and the run has 5"
    ):
        require_profiled_steps(training, 5)


def test_a_shape_that_is_compiled_in_the_window_is_said(monkeypatch):
    """The trace is of the fourth update to the sixth; the fourth has a new shape, the others have not."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    monkeypatch.setattr(profile, "device_share", lambda _: Share(0.5, 2.0))
    calls = {name: lambda name=name: events.append(name) for name in ("settle", "go on")}
    with Profiler(
        Path("P"), begin=3, steps=3, settle=calls["settle"], go_on=calls["go on"], log=events.append
    ) as profiler:
        for step, width in enumerate((1, 1, 2, 3, 3, 2, 4), start=1):
            events.append(step)
            profiler.after(Done(step, make_batch(width), {}, None))  # pyright: ignore[reportArgumentType]
    said = "profile of steps 3 to 5: the device worked 50.0% of 2.00 s, new shapes that it waited for: 1 (P)"
    assert events == [1, 2, 3, "start", 4, 5, 6, "stop", "settle", said, "go on", 7]


def test_a_trace_ends_with_a_run_that_ends_before_it(monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    with Profiler(
        Path("P"), begin=1, steps=3, settle=lambda: None, go_on=lambda: None, log=events.append
    ) as profiler:
        profiler.after(Done(1, make_batch(1), {}, None))  # pyright: ignore[reportArgumentType]
    assert events == ["start", "stop"]


def make_batch(width: int) -> Batch:
    return Batch._make(np.zeros((1, width), np.int32) for _ in Batch._fields)
