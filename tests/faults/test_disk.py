"""A disk that is full, read-only or locked: a clear error, and the last checkpoint intact.

A small tmpfs stands for the disk, so these need the right to mount one; they skip without.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_run import outcome

from dpo.files import damaged_files


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 8 MB, and a function that mounts it anew with other options."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True, capture_output=True
        )

    try:
        mount("size=8m,mode=777")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    try:
        yield path, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def whole_checkpoints(run_dir: Path) -> list[int]:
    """Steps of all checkpoints, after checking them."""
    there = [path for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal()]
    assert not [problem for path in there for problem in damaged_files(path)]
    return sorted(int(path.name) for path in there)


@pytest.mark.ci
def test_a_disk_without_room_is_refused_at_the_start(server, make_config, disk):
    config = make_config(disk[0] / "run", keep_checkpoints=100)
    assert server.run(config) == 1
    assert "has room for 0.01 GB, and the run needs" in server.printed(config)
    assert not (disk[0] / "run").exists()


@pytest.mark.ci
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(server, make_config, expected, disk):
    """Others fill the disk in the middle of the fourth save."""
    path, remount = disk
    remount("size=512m")
    config = make_config(path / "run", keep_checkpoints=100)
    assert server.run(config, hooks=[{"where": "save", "count": 4, "do": "fill"}]) == 1
    assert "could not be written to" in server.printed(config)
    assert "No space left on device" in server.printed(config)
    before = whole_checkpoints(path / "run")
    assert before
    assert not any((path / "run").glob("export*"))
    (path / "filler").unlink()
    assert server.run(config) == 0, server.printed(config)
    assert f"resumed after step {before[-1]}" in server.printed(config)
    assert outcome(config) == expected


@pytest.mark.ci
def test_a_full_disk_at_the_export_leaves_none_in_part(server, make_config, expected, disk):
    path, remount = disk
    remount("size=512m")
    config = make_config(path / "run", keep_checkpoints=1)
    assert server.run(config, hooks=[{"where": "export", "count": 1, "do": "fill"}]) == 1
    assert "the model could not be written to" in server.printed(config)
    assert not any((path / "run").glob("export*"))
    assert not (path / "run" / "summary.json").exists()
    (path / "filler").unlink()
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected


@pytest.mark.ci
def test_a_read_only_directory_is_named_before_anything_is_loaded(server, make_config, disk):
    path, remount = disk
    (path / "run").mkdir()
    config = make_config(path / "run")
    remount("ro")
    assert server.run(config) == 1
    assert f"could not be written to {path / 'run'}: Read-only file system" in server.printed(config)
    assert "trained" not in server.printed(config)


@pytest.mark.ci
def test_permission_that_is_lost_is_named_and_the_last_checkpoint_stays(
    server, make_config, expected, tmp_path
):
    """In the middle of the fourth save nobody may write into the directory of checkpoints any more."""
    config = make_config(tmp_path / "run")
    hooks = [{"where": "save", "count": 4, "do": "lock"}]
    assert server.run(config, obey=True, hooks=hooks) == 1
    assert "the checkpoint of step 4 could not be written to" in server.printed(config)
    assert "Permission denied" in server.printed(config)
    assert whole_checkpoints(tmp_path / "run") == [2, 3]
    (tmp_path / "run" / "checkpoints").chmod(0o700)
    assert server.run(config, obey=True) == 0, server.printed(config)
    assert outcome(config) == expected


PHASES = [("step", 4), ("save", 3), ("evaluation", 1), ("evaluation", 3), ("export", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), PHASES, ids=[f"{where}-{count}" for where, count in PHASES])
def test_a_limit_of_a_files_size_is_named_and_without_it_the_run_goes_on(
    server, make_config, expected, tmp_path, where, count
):
    """As `ulimit -f` sets one: for metrics, a checkpoint, held-out log-probs and the export."""
    config = make_config(tmp_path / "run")
    assert server.run(config, hooks=[{"where": where, "count": count, "do": "limit"}]) == 1
    said = server.printed(config)
    assert "dpo train: error: the " in said
    assert f"could not be written to {config.run_dir}" in said
    assert "File too large" in said
    assert whole_checkpoints(tmp_path / "run")
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), PHASES, ids=[f"{where}-{count}" for where, count in PHASES])
@pytest.mark.parametrize("how", ["remove", "rename"])
def test_a_run_directory_that_goes_away_is_named(server, make_config, expected, tmp_path, how, where, count):
    config = make_config(tmp_path / "run")
    assert server.run(config, hooks=[{"where": where, "count": count, "do": how}]) == 1
    said = server.printed(config)
    assert (
        f"dpo train: error: the run directory {config.run_dir} was deleted or renamed while the run" in said
    )
    assert not (tmp_path / "run" / "summary.json").exists()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    if how == "rename":
        (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert server.run(config) == 0, server.printed(config)
    assert ("resumed after step" in server.printed(config)) is (how == "rename")
    assert outcome(config) == expected
