"""Files that are read piece by piece: what comes out does not depend on the pieces, and rows have a limit."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo.data import json_text, sources
from dpo.data.sources import Part, cut_every, read_rows
from dpo.outcomes import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=9,
)


def rows_of(path: Path) -> list:
    return [row for _, row in read_rows(str(path), "train", Part())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lists")


@given(st.lists(JSON, max_size=5), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1, "\r\n\t "]))
@example([-1e14, 1.5, 2e-7, 12345678], 10, False, None)  # numbers that a window ends in
def test_a_json_list_is_the_same_in_windows_of_any_size(folder, rows, window, ascii_only, indent):
    path = folder / "rows.json"
    text = "\ufeff\n " + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + " \n"
    path.write_text(text, encoding="utf-8", newline="")
    with patch.object(json_text, "_WINDOW", max(window, 8)):
        assert rows_of(path) == rows
        parts = cut_every(str(path), "train", rows=2)
        assert [row for part in parts for _, row in read_rows(str(path), "train", part)] == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2", "at character 6: Expecting ','"),
        ("[1, 2,", "at character 7: Expecting value"),
        ("[1, 2,]", "at character 7: Expecting value"),
        ("[1 2]", "at character 4: Expecting ','"),
        ("[1, 2] 3", "at character 8: Extra data"),
        ("[", "at character 2: Expecting value"),
        ('[{"a": 1}, {"a": tru}]', "at character 18: Expecting value"),
        ('["', "at character 2: Unterminated string"),
        ('[{"a": 1, "a": 2}]', "'a' twice"),
        ("[" * 100_000, "recursion"),
        ("[" + "9" * 5000 + "]", "4300 digits"),
    ],
)
@pytest.mark.parametrize("window", [8, 1 << 20])
def test_what_is_wrong_in_a_json_list_is_said_with_its_place(tmp_path, monkeypatch, text, problem, window):
    monkeypatch.setattr(json_text, "_WINDOW", window)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json") as refused:
        rows_of(path)
    assert problem in str(refused.value)


def test_rows_of_a_json_list_come_before_its_end_is_read(tmp_path):
    """Objects without content would take 24 times what their text does."""
    path = tmp_path / "rows.json"
    path.write_text("[" + "{}," * 9)
    os.truncate(path, 1 << 40)
    rows = read_rows(str(path), "train", Part())
    assert [next(rows)[1] for _ in range(9)] == [{}] * 9
    with pytest.raises(UserError, match=r"rows\.json: not JSON at character 29"):
        next(rows)


def test_a_row_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_text, "_WINDOW", 100)
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "' + "x" * 9000 + '"}]')
    with pytest.raises(UserError, match="a row of more than 1000 characters"):
        rows_of(path)
    table = tmp_path / "rows.csv"
    for row in ("x" * 2000, '"' + "x\n" * 2000, "," * 2000):
        table.write_text("prompt,chosen\na,b\na," + row)
        with pytest.raises(UserError, match=r"rows\.csv: a row of more than 1000 characters"):
            rows_of(table)
    table.write_text("prompt,chosen\n" + "a,b\n" * 2000)
    assert len(rows_of(table)) == 2000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_that_is_terabytes_of_nothing_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"[" if name == "rows.json" else b"prompt,chosen\n")
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match=name):
        rows_of(path)


def test_parts_have_so_many_rows_and_of_long_ones_fewer(tmp_path, monkeypatch):
    """Lines of ten bytes; a part is cut where its rows but the last have reached what it may have."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 12}\n' * 7)

    def cut_into(rows):
        return [
            (part.offset, part.number, part.rows, part.end)
            for part in cut_every(str(path), "train", rows=rows)
        ]

    assert cut_into(3) == [(0, 1, 3, 30), (30, 4, 3, 60), (60, 7, 1, None)]
    assert cut_into(9) == [(0, 1, 7, None)]
    monkeypatch.setattr(sources, "MAX_PART_BYTES", 15)
    assert cut_into(3) == [(0, 1, 2, 20), (20, 3, 2, 40), (40, 5, 2, 60), (60, 7, 1, None)]
    monkeypatch.setattr(sources, "MAX_PART_BYTES", 5)
    assert [part[2] for part in cut_into(3)] == [1] * 7


def test_blank_lines_are_passed_by_up_to_a_number_or_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BLANK_LINES", 3)
    monkeypatch.setattr(sources, "MAX_BLANK_BYTES", 20)
    path = tmp_path / "rows.jsonl"
    for fits in ("\n" * 3, " " * 19 + "\n"):
        path.write_text(fits + "1\n" + fits + "2" + fits)
        assert rows_of(path) == [1, 2]
    for text in ("\n" * 5, "1\n" + "\n" * 4, "1\n" + " " * 20 + "\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"rows\.jsonl:\d: more than 3 blank lines, or 20 bytes"):
            rows_of(path)


ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("end", [":subset", "@main", ":subset@main"])
@pytest.mark.parametrize("name", ["rows.jsonl", "not_there.parquet"])
def test_a_part_of_a_file_is_refused_before_the_hub_is_asked(tmp_path, name, end):
    """It was asked for the name six times, with pauses, and then said to be out of reach."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    with (
        patch.object(sources, "open_data_set", side_effect=AssertionError),
        pytest.raises(UserError, match=rf"{name} is the name of a file, which has no subset .*{name} alone"),
    ):
        rows_of(Path(f"{tmp_path / name}{end}"))


@pytest.mark.parametrize("value", [ROW, {"data": [ROW, ROW]}, {"prompt": ["p", "q"]}])
def test_one_object_over_several_lines_is_refused_as_what_it_is(tmp_path, value):
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(value, indent=1))
    with pytest.raises(
        UserError, match=r"rows\.json:2: an object over several lines; allowed is a list of rows"
    ):
        rows_of(path)
    path.write_text(f"{json.dumps(value)}\n{json.dumps(value)}\n")
    assert rows_of(path) == [value, value]


@pytest.mark.parametrize("place", [".", ".."])
def test_the_working_directory_is_a_directory_like_others(tmp_path, monkeypatch, place):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "inside").mkdir() if place == ".." else None
    monkeypatch.chdir(tmp_path / "inside" if place == ".." else tmp_path)
    assert [row for _, row in read_rows(place, "train", Part())] == [ROW]


def test_a_directory_has_subsets_and_no_revision(tmp_path, monkeypatch):
    """The whole was read whatever stood behind the @, and a subset only where the name is a bare one."""
    (tmp_path / "data" / "part").mkdir(parents=True)
    (tmp_path / "data" / "part" / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(tmp_path)
    for place in ("data", str(tmp_path / "data")):
        assert [row for _, row in read_rows(f"{place}:part", "train", Part())] == [ROW]
        with pytest.raises(UserError, match=r"is a directory, which has no revision \(@v1\); allowed is"):
            list(read_rows(f"{place}:part@v1", "train", Part()))
    with pytest.raises(UserError, match=r"data is a directory, which has no revision \(@v1\)"):
        list(read_rows("data@v1", "train", Part()))
    with pytest.raises(UserError, match="no such file or directory"):
        list(read_rows("./nothing:part", "train", Part()))
