"""What is needed only at the end is looked at in the beginning."""

from __future__ import annotations

import fcntl
import resource
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dpo.config import TrainingConfig
from dpo.files import WriteError, require_writable
from dpo.huggingface.carried import Carried
from dpo.outcomes import ENVIRONMENT, EnvironmentFailure, UserError, outcome_of
from dpo.runs import LOCK_FILE
from dpo.training import loop, requirements
from dpo.training.lock import exclusive
from dpo.training.policy import Policy
from dpo.training.preparation import Run
from dpo.training.program import Program
from dpo.training.requirements import export_bytes, num_checkpoints, require_room, require_shared
from dpo.training.step import TrainState

GB = 10**9


def test_a_disk_without_room_is_named_with_the_figures(tmp_path: Path) -> None:
    require_room(tmp_path, 3, checkpoint=3 * GB, export=GB, free=lambda _: 11 * GB)
    said = r"room for 9\.00 GB, and the run needs 10\.07 GB: 3 checkpoints"
    with pytest.raises(EnvironmentFailure, match=said) as refused:
        require_room(tmp_path, 3, checkpoint=3 * GB, export=GB, free=lambda _: 9 * GB)
    assert outcome_of(refused.value) is ENVIRONMENT


def test_a_limit_of_a_files_size_below_the_exports_weights_is_named_with_both(tmp_path: Path) -> None:
    """As `ulimit -f` sets one; weights of more than a shard's size are several files."""

    def look(largest: int, export: int = 2 * GB) -> None:
        room = {"checkpoint": 3 * GB, "free": lambda _: 100 * GB}
        require_room(tmp_path, 1, export=export, largest=lambda: largest, **room)

    for limit in (resource.RLIM_INFINITY, 2 * GB):
        look(limit)
    look(5 * GB, export=50 * GB)
    for limit, export, figures in (
        (2 * GB - 1, 2 * GB, r"may have 2\.00 GB \(ulimit -f\), .* a file of 2\.00 GB"),
        (GB, 50 * GB, r"may have 1\.00 GB \(ulimit -f\), .* a file of 5\.00 GB"),
        (0, GB, r"may have 0\.00 GB"),
    ):
        with pytest.raises(EnvironmentFailure, match=figures):
            look(limit, export)


def test_an_export_is_float32_whatever_a_base_is_held_in_and_has_what_is_carried() -> None:
    """Adapters on a base of int8 leave four times the bytes that the base takes."""
    carried = Mock(spec=Carried, names=("vision.a", "vision.b"), num_bytes=lambda name: 100)
    policy = Mock(spec=Policy, params={"a": np.zeros(3, np.float32)}, frozen={"w": np.zeros(10, np.int8)})
    policy.pretrained = Mock(carried=None)
    assert export_bytes(policy, of_adapters_alone=False) == 4 * 13
    policy.pretrained = Mock(carried=carried)
    assert export_bytes(policy, of_adapters_alone=False) == 4 * 13 + 200
    assert export_bytes(policy, of_adapters_alone=True) == 4 * 3


def test_a_directory_that_goes_away_before_room_is_looked_for_is_named(tmp_path: Path) -> None:
    """A parent is removed while the policy is loaded: `shutil.disk_usage` has no place to ask then."""
    run_dir = tmp_path / "parent" / "run"
    run_dir.mkdir(parents=True)
    shutil.rmtree(run_dir.parent)
    program = Mock(spec=Program, state=[])
    config = Mock(training=TrainingConfig())
    run = Mock(spec=Run, run_dir=run_dir, num_steps=1, config=config, policy=Mock(params=[]))
    with pytest.raises(EnvironmentFailure, match=f"the run directory {run_dir} was deleted or renamed"):
        requirements.require_what_comes_later(run, program, first_step=0)


def test_what_somebody_put_into_the_export_is_not_deleted(tmp_path: Path) -> None:
    """Asked at the start, and again when the run has come to its end."""
    policy = Mock(spec=Policy, params=[], frozen=[])
    run = Mock(spec=Run, run_dir=tmp_path, num_steps=1, config=Mock(training=TrainingConfig()), policy=policy)
    state = Mock(spec=TrainState, params=[])
    (tmp_path / LOCK_FILE).touch()
    for name in ("export", "adapter"):
        notes = tmp_path / name / "notes.txt"
        notes.parent.mkdir()
        notes.touch()
        with pytest.raises(UserError, match=f"place of the run.s {name} is .* holds what no export wrote"):
            requirements.require_what_comes_later(run, Mock(spec=Program, state=[]), first_step=0)
        with pytest.raises(UserError, match="and would be deleted"):
            loop._export(run, state, None)
        shutil.rmtree(notes.parent)


def test_what_an_earlier_start_saved_counts_as_room(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with (tmp_path / "checkpoints" / "4" / "state").open("wb") as file:
        file.truncate(3 * GB)
    require_room(tmp_path, 1, checkpoint=3 * GB, export=GB, free=lambda _: int(1.1 * GB))


def test_what_stays_or_is_replaced_when_its_successor_is_whole_is_no_room(tmp_path: Path) -> None:
    for place in ("checkpoints/4.damaged", "export"):
        (tmp_path / place).mkdir(parents=True)
        with (tmp_path / place / "file").open("wb") as file:
            file.truncate(3 * GB)
        with pytest.raises(EnvironmentFailure, match=r"room for 3\.50 GB, and the run needs 4\.07 GB"):
            require_room(tmp_path, 1, checkpoint=3 * GB, export=GB, free=lambda _: int(3.5 * GB))


def test_how_many_checkpoints_there_are_at_a_time() -> None:
    assert num_checkpoints(TrainingConfig(keep_checkpoints=3, save_every=None), 100) == 1
    assert num_checkpoints(TrainingConfig(keep_checkpoints=3, save_every=50), 100) == 2
    assert num_checkpoints(TrainingConfig(keep_checkpoints=3, save_every=1), 100) == 4
    assert num_checkpoints(TrainingConfig(keep_checkpoints=3, save_every=None, save_minutes=5.0), 100) == 4


def test_a_run_that_was_stopped_keeps_that_checkpoint_beside_its_last() -> None:
    """`training.save_every` is not given: the stop saved one, and the end will save another."""
    training = TrainingConfig(keep_checkpoints=2, save_every=None)
    assert num_checkpoints(training, 100, first_step=40, there=1) == 2
    assert num_checkpoints(training, 100, first_step=60, there=2) == 3
    assert num_checkpoints(training, 100, first_step=60, there=5) == 6
    assert num_checkpoints(training, 100, first_step=100, there=1) == 1
    assert (
        num_checkpoints(TrainingConfig(keep_checkpoints=2, save_every=50), 100, first_step=60, there=2) == 3
    )


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    require_writable(tmp_path / "new", "a thing")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"a thing could not be written to .*file"):
        require_writable(tmp_path / "file", "a thing")


def test_a_directory_or_a_lock_that_another_host_has_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second process sees it, whose lock is not the first's."""
    monkeypatch.setattr(requirements, "is_alone", lambda: False)
    monkeypatch.setattr(requirements, "is_main", lambda: False)
    monkeypatch.setattr(requirements, "on_main", lambda _: "7 of node1\n")
    monkeypatch.setattr(requirements, "from_all", lambda see: [see()])
    with pytest.raises(ValueError, match=r"not the directory that process 0 writes to \(7 of node1\)"):
        require_shared(tmp_path, seconds=0.0)
    (tmp_path / "lock").write_text("7 of node1\n")
    with pytest.raises(EnvironmentFailure, match=r"process 0 holds \(7 of node1\), is none on .* no bucket"):
        require_shared(tmp_path, seconds=0.0)
    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        require_shared(tmp_path, seconds=0.0)


def test_who_deletes_the_lock_lets_a_second_process_in(tmp_path: Path) -> None:
    """As docs/troubleshooting.md warns: the lock is that of the file which is gone."""
    with exclusive(tmp_path):
        with pytest.raises(ValueError, match="in use by process"), exclusive(tmp_path):
            pass
        (tmp_path / LOCK_FILE).unlink()
        with exclusive(tmp_path):
            pass
