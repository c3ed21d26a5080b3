import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.config import Config, save_config
from dpo.data.token_store import TokenStore
from dpo.files import (
    CHECKSUMS_FILE,
    WriteError,
    damaged_files,
    new_directory,
    new_file,
    replace_text,
    require_writable,
    unlisted_files,
    write_checksums,
    writing,
)
from dpo.judging.journal import Journal
from dpo.outcomes import EnvironmentFailure
from dpo.regular_files import why_no_file
from dpo.training.lock import exclusive


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


def test_settings_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    called = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    save_config(Config(), tmp_path / "config.yaml")
    assert called == ["fsync", "replace"]


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
    (problem,) = damaged_files(tmp_path / "thing")
    assert problem.startswith("SHA256SUMS: is not a list of checksums")
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


def write_slowly(directory: Path, text: str, began, goes_on) -> None:
    with new_directory("a thing", directory) as beside:
        began.set()
        assert goes_on.wait(60)
        (beside / "a").write_text(text)


def test_of_two_that_write_a_directory_one_waits_for_the_other(tmp_path):
    """Locks are of open files, so that threads stand for processes."""
    began, goes_on = threading.Event(), threading.Event()
    writers = [
        threading.Thread(target=write_slowly, args=(tmp_path / "thing", text, event, goes_on))
        for text, event in (("first", began), ("second", threading.Event()))
    ]
    writers[0].start()
    assert began.wait(60)
    writers[1].start()
    time.sleep(0.2)
    assert names(tmp_path) == ["thing.writing", "thing.writing.lock"], (
        "the second has not removed the first's"
    )
    assert (tmp_path / "thing.writing.lock").read_text() == f"{os.getpid()} of {socket.gethostname()}\n"
    goes_on.set()
    for writer in writers:
        writer.join(60)
    assert (tmp_path / "thing" / "a").read_text() == "second"
    assert names(tmp_path) == ["thing"], "nothing is left, the lock neither"


@pytest.mark.parametrize("ending", [".lock", "-store.writing.lock"])
def test_who_holds_a_lock_of_its_own_beside_does_not_wait_for_itself(tmp_path, ending):
    """The stores of tokens and of reference log-probs hold theirs while they write."""
    with (tmp_path / f"thing{ending}").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = threading.Thread(target=fill, args=(tmp_path / "thing", "text"), daemon=True)
        writer.start()
        writer.join(10)
        assert not writer.is_alive()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def no_locks(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(EnvironmentFailure, match=r"has no locks \(No locks available\).*allowed"):
        fill(tmp_path / "thing", "text")
    with pytest.raises(EnvironmentFailure, match="has no locks"), exclusive(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with pytest.raises(EnvironmentFailure, match="has no locks"):  # before log-probs or an export are made
        require_writable(tmp_path / "store", "reference log-probs")
    with pytest.raises(EnvironmentFailure, match="has no locks"):
        Journal(tmp_path / "journal.jsonl")
    store = TokenStore(tmp_path / "tokens", "key", limit=1, log=print)
    with pytest.raises(EnvironmentFailure, match="has no locks"), store.held():
        pass


def test_a_bucket_that_is_mounted_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    """gcsfuse renames files, and answers to a directory's new name with EMFILE."""
    rename = os.rename

    def as_gcsfuse(here: Path, there: Path) -> None:
        if Path(here).is_dir():
            raise OSError(errno.EMFILE, "Too many open files")
        rename(here, there)

    monkeypatch.setattr("os.rename", as_gcsfuse)
    said = r"file system of .* can't rename a directory \(Too many open files\).*allowed: .* no bucket"
    with pytest.raises(EnvironmentFailure, match=said), exclusive(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    store = TokenStore(tmp_path / "tokens", "key", limit=1, log=print)
    with pytest.raises(EnvironmentFailure, match=said), store.held():
        pass
    with pytest.raises(EnvironmentFailure, match=said):
        require_writable(tmp_path / "reference", "reference log-probs")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


SUM = "0" * 64


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "/dev/zero", "a/../../outside", "a\\b", "a\x1b[2J", "", "."]
)
def test_checksums_name_only_what_is_inside(tmp_path, name):
    (tmp_path / "SHA256SUMS").write_text(f"{SUM}  {name}\n")
    (problem,) = damaged_files(tmp_path)
    assert problem.startswith("SHA256SUMS: is not a list of checksums: line 1 ")
    assert "\x1b" not in problem


def test_checksums_are_of_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "holes").touch()
    os.truncate(tmp_path / "holes", 1 << 43)
    (tmp_path / "SHA256SUMS").write_text(f"{SUM}  pipe\n{SUM}  zero\n{SUM}  holes\n")
    assert damaged_files(tmp_path) == [
        "pipe: must be a regular file, and is a pipe",
        "zero: must be a regular file, and is a device",
        f"holes: {1 << 43} of its bytes are holes; allowed are {1 << 36}",
    ]


def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "new.writing").symlink_to(tmp_path / "mine")
    replace_text(tmp_path / "new", "text", what="a text")
    assert (tmp_path / "mine").read_text() == "kept"
    assert not (tmp_path / "new").is_symlink()
    assert (tmp_path / "new").read_text() == "text"


def test_a_list_of_checksums_names_what_can_be_a_file(tmp_path):
    """A name too long for any file is a wrong list, not a disk that cannot be read."""
    for name in ("a" * 256, "b/" + "é" * 128):
        (tmp_path / CHECKSUMS_FILE).write_text(f"{'0' * 64}  {name}\n")
        (problem,) = damaged_files(tmp_path)
        assert "allowed is each file of the directory once" in problem


def test_a_path_with_one_mistyped_name_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("", encoding="utf-8")
    (tmp_path / "runs" / "farst").mkdir()
    (tmp_path / "train\x1b.jsonl").write_text("", encoding="utf-8")
    meant = tmp_path / "runs" / "first" / "config.yaml"
    asked = f"there is no such file; did you mean {meant}?"
    assert why_no_file(tmp_path / "runs" / "frist" / "config.yaml") == asked
    assert why_no_file(tmp_path / "rnus" / "first" / "config.yaml") == asked
    for path in (
        "runs/first/summary.json",
        "trian.jsonl",
        "nothing/alike/config.yaml",
        "a" * 300,
        "b/" * 3000,
    ):
        assert why_no_file(tmp_path / path) in ("there is no such file", "cannot be read: File name too long")


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["train", "--config=my/setings.yaml"], "my/settings.yaml"),
        (["train", "--config", "my/setings.yaml"], "my/settings.yaml"),
        (["train", "--data.train=my/trian.jsonl"], "my/train.jsonl"),
        (["train", "--model.source=./my/modle"], "my/model"),
        (["report", "my/rnu"], "my/run/config.yaml"),
        (["watch", "my/rnu"], "my/run/config.yaml"),
    ],
)
def test_commands_ask_for_what_may_have_been_meant(
    command: list[str],
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("settings.yaml", "train.jsonl", "run/config.yaml", "model/config.json"):
        (tmp_path / "my" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my" / name).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        main(command)
    assert f"; did you mean {meant}?" in capsys.readouterr().err
