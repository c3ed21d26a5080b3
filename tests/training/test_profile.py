"""What a trace says of the device: of a GPU's streams, of a CPU's threads, and of a run's own loop."""

from pathlib import Path

import pytest
from jax.profiler import ProfileData

from dpo.config import TrainingConfig
from dpo.outcomes import UserError
from dpo.training.profile import Trace, covered, first_profiled, require_profiled_steps, share_of

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


def test_of_a_cpu_what_its_executor_runs_counts():
    """Waiting for a program, marks of its operations' ends and the host's own work don't."""
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
