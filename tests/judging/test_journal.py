"""What was appended is there again; a line cut off by a kill is not; anything else damaged is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dpo.files import WriteError
from dpo.judging.journal import Journal, read_lines

FULL = Path("/dev/full")
"""A device that has no room, ever."""


def test_the_newest_line_of_a_key_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"key": "a", "value": 1})
        journal.append({"key": "b", "value": "zwei\u2028\n"})
        journal.append({"key": "a", "value": 3})
        assert len(path.read_bytes().splitlines()) == 3, "on disk before the file is closed"
    with Journal(path) as again:
        assert again.lines == {"a": {"key": "a", "value": 3}, "b": {"key": "b", "value": "zwei\u2028\n"}}


def test_a_line_cut_off_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "val')
    with Journal(path) as journal:
        assert list(journal.lines) == ["a"]
        journal.append({"key": "c"})
    with Journal(path) as again:
        assert list(again.lines) == ["a", "c"]


def test_only_one_process_writes(tmp_path: Path) -> None:
    """Another one would cut off the line that the first is writing."""
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(ValueError, match=r"journal\.jsonl is in use by another process"):
        Journal(path)
    Journal(path).close()


def test_a_reader_leaves_a_line_that_is_being_written_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "val')
    assert list(read_lines(path)) == ["a"]
    assert path.read_text().endswith('"val')


def test_a_journal_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"a journal could not be written to .*file/journal\.jsonl"):
        Journal(tmp_path / "file" / "journal.jsonl")


def test_a_full_disk_is_named_also_where_closing_writes_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append({"key": "a"})
    journal._file.close()
    journal._file = FULL.open("a")
    for write in (lambda: journal.append({"key": "b"}), journal.close):
        with pytest.raises(WriteError, match=rf"a line could not be written to {path}: No space left"):
            write()
    assert list(read_lines(path)) == ["a"]


@pytest.mark.parametrize("how", [shutil.rmtree, lambda directory: directory.rename(directory.parent / "b")])
def test_a_journal_that_goes_away_is_named_and_not_written_into_nothing(tmp_path: Path, how) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"key": "a"})
        how(tmp_path / "a")
        with pytest.raises(
            WriteError, match=rf"a line could not be written to {path}: {tmp_path}/a was deleted"
        ):
            journal.append({"key": "b"})
        assert list(journal.lines) == ["a"]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"no": "key"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"key": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"journal\.jsonl:2 is not a line"):
        Journal(path)
