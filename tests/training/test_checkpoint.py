import itertools
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpy.testing import assert_array_equal

from dpo.files import WriteError, write_checksums
from dpo.losses import RunningMean
from dpo.outcomes import StopRequested, UserError
from dpo.training import checkpoint
from dpo.training.checkpoint import Checkpoints
from dpo.training.step import TrainState


def state_of(value: float) -> TrainState:
    return TrainState(
        step=jnp.asarray(int(value), jnp.int32),
        params={"a": {"kernel": jnp.full((3, 4), float(value))}, "b": jnp.arange(5.0) * value},
        opt_state=(jnp.full(2, float(value)),),
        shift=RunningMean.zero(),
        reference={},
    )


def save(directory, *steps, keep=2, **options):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"settings": {"step": step}}, **options)


def test_what_was_saved_is_restored_with_what_it_belongs_to(tmp_path):
    save(tmp_path, 3)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(3, state_of(0))
        assert checkpoints.identity(3)["settings"] == {"step": 3}
    assert_array_equal(restored.params["a"]["kernel"], np.full((3, 4), 3.0))
    (moments,) = jax.tree.leaves(restored.opt_state)
    assert_array_equal(moments, np.full(2, 3.0))
    assert int(restored.step) == 3


def test_the_newest_stay_and_the_protected(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, protect=[2])
    with Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 4, 5]
        assert checkpoints.latest == 5


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, 1)
    before = (tmp_path / "1" / "SHA256SUMS").stat().st_mtime_ns
    save(tmp_path, 1)
    assert (tmp_path / "1" / "SHA256SUMS").stat().st_mtime_ns == before


def test_what_a_killed_process_was_writing_is_removed_but_by_readers(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "2.writing" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints:
        assert checkpoints.steps == [1]
    assert (tmp_path / "2.writing").exists()
    with Checkpoints(tmp_path, keep=2):
        assert not (tmp_path / "2.writing").exists()


def test_the_newest_whole_one_is_found_and_damaged_ones_are_set_aside(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2" / "identity.json").write_text("{}")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest_whole() == (1, {2: ["identity.json: its checksum does not match"]})
        assert checkpoints.set_aside(2) == tmp_path / "2.damaged"
        assert checkpoints.steps == [1]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The state is copied by `save`; what becomes of it afterwards changes nothing that is on its way."""
    go_on = threading.Event()
    write_checksums = checkpoint.write_checksums

    def slow_disk(directory):
        assert go_on.wait(60)
        write_checksums(directory)

    monkeypatch.setattr(checkpoint, "write_checksums", slow_disk)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        state = state_of(1)
        checkpoints.save(1, state, {})
        jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)(state)
        assert checkpoints.steps == []
        go_on.set()
        checkpoints.wait()
        assert checkpoints.steps == [1]
        assert_array_equal(checkpoints.restore(1, state_of(0)).params["a"]["kernel"], np.ones((3, 4)))


@pytest.mark.parametrize("jump", [30 * 86_400.0, -30 * 86_400.0])
def test_a_clock_that_is_set_while_a_checkpoint_is_written_does_not_stop_it(tmp_path, monkeypatch, jump):
    """Each look at the wall clock finds it a month further on than the last one, or a month back."""
    looks, now = itertools.count(), time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + next(looks) * jump)
        save(tmp_path, 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_failure_names_step_path_reason_and_what_is_left(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    expected = rf"of step 2 could not be written to {tmp_path}/2: No space .*; the newest there is step 1"
    with pytest.raises(WriteError, match=expected):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


@pytest.mark.parametrize("bug", [KeyError("bug"), RuntimeError("bug"), ValueError("bug")])
def test_a_bug_in_the_thread_that_writes_is_not_lost(tmp_path, monkeypatch, bug):
    """Nor is it called a failure of the disk."""

    def fail(directory):
        raise bug

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    with pytest.raises(type(bug), match="bug") as caught:
        save(tmp_path, 1)
    assert caught.value is bug
    assert not list(tmp_path.iterdir())


def test_other_shapes_are_refused(tmp_path):
    save(tmp_path, 1)
    other = state_of(0)._replace(params={"a": {"kernel": jnp.zeros((3, 5))}, "b": jnp.zeros(5)})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(
            ValueError,
            match=r"/1 does not fit these settings .*kernel.*float32\[3, 4\] → (float32\[3, 5\]|None)",
        ):
            checkpoints.restore(1, other)
        with pytest.raises(
            ValueError,
            match=r"/1 does not fit these settings .*kernel.*float32\[3, 4\] → (float32\[3, 5\]|None)",
        ):
            checkpoints.restore(1, state_of(0)._replace(params={"a": {}}))


def test_steps_after_the_one_that_a_run_goes_on_from_are_saved_again(tmp_path):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert [checkpoints.is_saved(step) for step in (1, 2, 3)] == [True, True, False]
        checkpoints.set_aside(2)
        checkpoints.go_on_from(1)
        checkpoints.save(2, state_of(2), {})
        checkpoints.wait()
        assert checkpoints.steps == [1, 2]


def test_the_parameters_alone_come_back_as_arrays_of_the_host(tmp_path):
    save(tmp_path, 3)
    with Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints:
        params = checkpoints.restore_params(3, state_of(0).params)
        with pytest.raises(ValueError, match=r"/3 does not fit these settings: another model"):
            checkpoints.restore_params(3, {"a": {"kernel": jnp.zeros((4, 3))}, "b": jnp.zeros(5)})
    assert isinstance(params["b"], np.ndarray)
    assert_array_equal(params["b"], np.arange(5.0) * 3)
    assert_array_equal(params["a"]["kernel"], np.full((3, 4), 3.0))


def test_a_directory_is_made_with_those_above_it_and_not_by_a_reader(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    with Checkpoints(directory, keep=1, read_only=True) as checkpoints:
        assert (checkpoints.steps, checkpoints.latest, checkpoints.newest_whole()) == ([], None, (None, {}))
    assert not directory.exists()
    save(directory, 1)
    assert (directory / "1").is_dir()


@pytest.mark.parametrize(("ended_by", "raised"), [(StopRequested, WriteError), (KeyError, KeyError)])
def test_what_was_to_be_saved_and_is_not_is_said_where_a_stop_ends_the_run(
    tmp_path, monkeypatch, ended_by, raised
):
    """Another error is the reason itself, and stays."""

    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checksums", full)

    def end():
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(1, state_of(1), {})
            raise ended_by("ended")

    with pytest.raises(raised):
        end()


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_the_new_one_is_whole(tmp_path, monkeypatch):
    def locked(path, *given, **choices):
        raise PermissionError(13, "Permission denied")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", locked)
    with pytest.warns(UserWarning, match=r"/1, an old checkpoint, stays: .*Permission denied"):
        save(tmp_path, 2, keep=1)
    with Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        assert checkpoints.newest_whole() == (2, {})


def test_of_many_arrays_that_differ_three_are_named_and_all_are_counted(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints:
        other = state_of(0)._replace(params={name: jnp.zeros(1) for name in "vwxyz"})
        with pytest.raises(ValueError, match=r"7 arrays differ, the first of them") as caught:
            checkpoints.restore(1, other)
    assert str(caught.value).count("→") == 3


def test_the_reason_is_one_line(tmp_path, monkeypatch):
    def fail(directory):
        raise ValueError("  NOT_FOUND: first\nsecond")

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    with pytest.raises(WriteError, match=r"/1: NOT_FOUND: first; there is none before it$"):
        save(tmp_path, 1)


def test_a_save_that_fails_before_anything_is_there_is_named_too(tmp_path, monkeypatch):
    def full(*given, **choices):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "save", full)
        with pytest.raises(WriteError, match=r"/1: No space left on device; there is none before it$"):
            checkpoints.save(1, state_of(1), {})


def test_a_save_of_which_nothing_is_left_when_it_fails_is_named_too(tmp_path, monkeypatch):
    def lost(directory):
        shutil.rmtree(directory)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "write_checksums", lost)
    with pytest.raises(WriteError, match=r"/1: Input/output error; there is none before it$"):
        save(tmp_path, 1)


def test_a_directory_that_was_deleted_is_not_made_anew(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        (tmp_path / "checkpoints").rmdir()
        with pytest.raises(WriteError, match="was deleted or renamed while the run went on"):
            checkpoints.save(1, state_of(1), {})
    assert not list(tmp_path.iterdir())


def test_what_stands_where_a_checkpoint_is_to_be_written_is_replaced(tmp_path):
    """A save that failed may leave it, and what it waits for is no run of a reader's."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        (tmp_path / "1.writing" / "state").mkdir(parents=True)
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        assert checkpoints.newest_whole() == (1, {})


def test_one_process_waits_for_ever_and_several_as_long_as_orbax_says(monkeypatch):
    alone = checkpoint._async_options()
    assert (alone.timeout_secs, alone.create_directories_asynchronously) == (100 * 365 * 86_400, False)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert checkpoint._async_options() == ocp.options.AsyncOptions()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("identity.json", b"[1]"),
        ("identity.json", b'{"state": 3}'),
        ("identity.json", b"\xff"),
        ("state/_METADATA", b"{}"),
        ("state/_METADATA", b"\xff"),
        ("state/manifest.ocdbt", b"x" * 100),
    ],
)
def test_a_checkpoint_of_somebody_else_is_read_or_refused_by_its_name(tmp_path, name, content):
    """Checksums keep nobody from writing others."""
    save(tmp_path, 3)
    (tmp_path / "3" / name).write_bytes(content)
    write_checksums(tmp_path / "3")
    with (
        Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints,
        pytest.raises(UserError, match=str(tmp_path / "3")),
    ):
        checkpoints.restore_params(3, state_of(0).params)
