import os
import subprocess
from pathlib import Path

import pytest

from dpo.files import (
    WriteError,
    damaged_files,
    new_directory,
    new_file,
    replace_text,
    unlisted_files,
    write_checksums,
    writing,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(directory: Path, text: str, *, fail: bool = False) -> None:
    with new_directory("a thing", directory) as beside:
        (beside / "part").mkdir()
        (beside / "part" / "a").write_text(text)
        if fail:
            raise KeyError


def test_a_directory_appears_whole_with_checksums_that_sha256sum_reads(tmp_path):
    with new_directory("a thing", tmp_path / "thing") as beside:
        (beside / "a").write_text("one")
        assert not (tmp_path / "thing").exists()
    assert names(tmp_path) == ["thing"]
    assert not damaged_files(tmp_path / "thing")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "thing", check=True)


def test_a_directory_replaces_an_older_one_or_leaves_it_as_it_was(tmp_path):
    thing = tmp_path / "thing"
    fill(thing, "old")
    with pytest.raises(KeyError):
        fill(thing, "half", fail=True)
    assert (thing / "part" / "a").read_text() == "old"
    fill(thing, "new")
    assert (thing / "part" / "a").read_text() == "new"
    assert names(tmp_path) == ["thing"]


def test_what_a_killed_process_left_is_removed_or_put_back(tmp_path):
    thing = tmp_path / "thing"
    fill(thing, "old")
    thing.rename(tmp_path / "thing.replaced")  # killed between the two renames
    (tmp_path / "thing.writing").mkdir()
    (tmp_path / "thing.writing" / "rest").touch()
    with pytest.raises(KeyError):
        fill(thing, "half", fail=True)
    assert (thing / "part" / "a").read_text() == "old"
    assert names(tmp_path) == ["thing"]


def fail_to_write(path: Path) -> None:
    with new_file("a text", path) as beside:
        beside.write_text("half")
        raise KeyError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    replace_text(path, "old", what="a text")
    with pytest.raises(KeyError):
        fail_to_write(path)
    assert path.read_text() == "old"
    replace_text(path, "new", what="a text")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_damage_is_named(tmp_path):
    fill(tmp_path / "thing", "content")
    part = tmp_path / "thing" / "part" / "a"
    part.write_text("contenT")
    assert damaged_files(tmp_path / "thing") == ["part/a: its checksum does not match"]
    part.unlink()
    assert damaged_files(tmp_path / "thing") == ["part/a: No such file or directory"]
    (tmp_path / "thing" / "b").touch()
    assert unlisted_files(tmp_path / "thing") == ["b: is not in SHA256SUMS"]
    (tmp_path / "thing" / "SHA256SUMS").write_text("")
    assert damaged_files(tmp_path / "thing") == ["SHA256SUMS: is empty"]
    (tmp_path / "thing" / "SHA256SUMS").write_text("nonsense\n")
    assert damaged_files(tmp_path / "thing") == ["SHA256SUMS: is not a list of checksums"]
    (tmp_path / "thing" / "SHA256SUMS").unlink()
    assert damaged_files(tmp_path / "thing") == ["SHA256SUMS: is not there"]


def test_every_file_below_is_listed(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("b", "a", "x/c", "x/y/d"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["a", "b", "x/c", "x/y/d"]
    assert not unlisted_files(tmp_path)


def test_a_failure_names_what_where_and_why(tmp_path):
    with (
        pytest.raises(WriteError, match=r"the report could not be written to .*/x: No space .*; sorry$"),
        writing("the report", tmp_path / "x", note="sorry"),
    ):
        raise OSError(28, os.strerror(28))
