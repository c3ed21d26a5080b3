"""Tables of strangers: what is blown up, broken or elsewhere is refused by name before it is opened here."""

import gzip
import json
import os
import shutil
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dpo import limited
from dpo.data import sources, table_checks, table_worker
from dpo.data.preferences import read_preferences
from dpo.data.sources import Part, read_rows
from dpo.limited import stored_bytes
from dpo.outcomes import told_by

PAIR = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=path.name) as refused:
        read_preferences(path)
    return str(refused.value)


def write_parquet(path: Path, columns: dict, **how) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", **how)
    return path


def test_a_small_parquet_file_that_is_gigabytes_of_rows_is_refused_unread(tmp_path):
    """One text of 4 MB, named by each of 1,024 rows."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1024, pyarrow.int32()), ["x" * (1 << 22)])
    path = write_parquet(tmp_path / "rows.parquet", {"prompt": texts, "chosen": texts, "rejected": texts})
    assert path.stat().st_size < 10_000
    assert "allowed is a file that is not blown up so" in refusal(path)


def test_rows_without_end_are_refused_before_they_are_counted(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", {"prompt": pyarrow.nulls(100_000_000, pyarrow.int8())})
    assert path.stat().st_size < 1_000_000
    assert "its rows take more than" in refusal(path)


def test_texts_that_are_the_same_in_all_rows_are_read(tmp_path):
    """Many times smaller than its rows, as a file of one long system prompt is."""
    rows = [PAIR | {"prompt": "Be brief. " * 200, "chosen": str(number)} for number in range(3000)]
    columns = {name: [row[name] for row in rows] for name in PAIR}
    path = write_parquet(tmp_path / "rows.parquet", columns, row_group_size=700)
    found = read_preferences(path).preferences
    assert [row.responses[0] for row in found] == columns["chosen"]


def test_a_large_file_is_looked_at_as_far_as_it_is_read(tmp_path, monkeypatch):
    asked = []

    def look(script, request, **sizes):
        asked.append(request["first"])
        return limited.look(script, request | {"rows": 1}, **sizes)

    monkeypatch.setattr(table_checks, "look", look)
    monkeypatch.setattr(table_checks, "_SEEN", {})
    source = tmp_path / "rows.parquet"
    write_parquet(source, {name: [text] * 40 for name, text in PAIR.items()}, row_group_size=10)
    assert len(read_preferences(source).preferences) == 40
    assert len(read_preferences(source).preferences) == 40
    assert asked == [0]


def test_a_row_group_is_looked_at_before_it_is_decoded_wherever_reading_begins(tmp_path, monkeypatch):
    """Of a large file each process reads a part, and one look goes no further than its window."""
    looked = []

    def look(script, request, **sizes):
        said = limited.look(script, request | {"until": request["first"] + 1}, **sizes)
        looked.append(request["first"])
        return said

    monkeypatch.setattr(table_checks, "look", look)
    monkeypatch.setattr(table_checks, "_SEEN", {})
    source = tmp_path / "rows.parquet"
    write_parquet(source, {name: [text] * 40 for name, text in PAIR.items()}, row_group_size=10)
    last = Part(offset=30, number=31)
    assert len(list(read_rows(str(source), "train", last))) == 10
    assert looked == [0, 3]
    assert len(read_preferences(source).preferences) == 40
    assert looked == [0, 3, 1, 2]


def test_row_groups_take_together_what_a_file_may(tmp_path):
    """However many looks it takes to go through them."""
    path = write_parquet(tmp_path / "rows.parquet", {name: [text] * 40 for name, text in PAIR.items()})
    request = {"kind": "parquet", "path": str(path), "first": 0, "until": None, "rows": 1}
    for taken, is_read in ((0, True), (table_worker.BASE + 1001 * path.stat().st_size, False)):
        said = limited.look(table_checks.WORKER, request | {"taken": taken}, size=path.stat().st_size)
        assert ("seen" in said) == is_read, said


def save(tmp_path: Path) -> Path:
    datasets.Dataset.from_list([PAIR] * 50).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_wrong_offset_in_a_saved_data_set_is_refused_by_file(tmp_path):
    """In the process itself it is SIGBUS: the file is mapped into memory."""
    path = save(tmp_path)
    (file,) = path.glob("*.arrow")
    offsets = b"".join((len(PAIR["chosen"]) * n).to_bytes(4, "little") for n in range(1, 6))
    content = file.read_bytes()
    assert offsets in content
    file.write_bytes(content.replace(offsets, offsets[:-4] + b"\xff\xff\xff\x7f"))
    assert "not a readable Arrow file" in refusal(path)
    table = tmp_path / "rows.arrow"
    shutil.copy(file, table)
    assert "not a readable Arrow file" in refusal(table)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "", 7, None, "a/b.arrow"])
def test_a_saved_data_set_names_files_beside_it(tmp_path, name):
    path = save(tmp_path)
    (file,) = path.glob("*.arrow")
    shutil.copy(file, tmp_path / "outside.arrow")
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    assert "allowed is a list of files beside it" in refusal(path)


def test_splits_of_a_saved_data_set_are_folders_in_it(tmp_path):
    save(tmp_path)
    path = tmp_path / "splits"
    path.mkdir()
    (path / "dataset_dict.json").write_text(json.dumps({"splits": ["../saved"]}))
    assert "allowed is a list of folders in it" in refusal(path)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"_data_files": 7}', "[" * 100_000, "{}"], ids=lambda text: text[:20]
)
def test_a_damaged_state_is_refused_by_name(tmp_path, content):
    path = save(tmp_path)
    (path / "state.json").write_text(content)
    assert "state.json" in refusal(path)


def test_a_saved_data_set_is_read_without_its_format(tmp_path):
    """A format shows some of the columns."""
    data = datasets.Dataset.from_list([PAIR] * 2)
    data.with_format("numpy", columns=["chosen", "rejected"]).save_to_disk(tmp_path / "saved")
    assert [row.prompt for row in read_preferences(tmp_path / "saved").preferences] == [PAIR["prompt"]] * 2
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {"_format_type": "custom"}))
    assert "state.json: _format_type is 'custom'; allowed are None, python" in refusal(tmp_path / "saved")


def test_what_was_saved_and_cannot_be_read_is_refused_by_its_files(tmp_path):
    path = save(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"_split": 7}))
    assert "its state.json or dataset_info.json is not what save_to_disk writes" in refusal(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    """Python's dict has the last of them."""
    message = pyarrow.StructArray.from_arrays(
        [pyarrow.array(text) for text in (["assistant"], ["a"], ["b"])], names=["role", "content", "content"]
    )
    turns = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1], pyarrow.int32()), message)
    inside = pyarrow.table({"prompt": ["a"], "chosen": turns, "rejected": ["c"]})
    beside = pyarrow.Table.from_arrays(
        [pyarrow.array([text]) for text in "abcd"], names=["prompt", "chosen", "rejected", "chosen"]
    )
    for table, name in ((inside, "content"), (beside, "chosen")):
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
            stream.write_table(table)
        for file in ("rows.parquet", "rows.arrow"):
            assert f"fields of an object, named '{name}'; allowed is one" in refusal(tmp_path / file)


_OFFSETS = b"".join(end.to_bytes(4, "little") for end in (0, 1, 2, 4))
VALUES = {
    "a day of no calendar": pyarrow.array([0, 1, 2**31 - 1], pyarrow.date32()),
    "a time of no calendar": pyarrow.array([0, 1, 2**62], pyarrow.timestamp("us")),
    "a zone of no place": pyarrow.array([0, 1, 2], pyarrow.timestamp("us", tz="Nowhere/At_all")),
    "text that is none": pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(_OFFSETS), pyarrow.py_buffer(b"ab\xff\xfe")]
    ),
}


@pytest.mark.parametrize("what", VALUES)
def test_a_value_that_python_has_not_is_refused_by_its_row(tmp_path, monkeypatch, what):
    """Arrow and `datasets` keep it, and fail when a row is made of it."""
    table = pyarrow.table({**{name: [text] * 3 for name, text in PAIR.items()}, "more": VALUES[what]})
    monkeypatch.setattr(sources, "open_data_set", lambda *_, **__: datasets.Dataset(table))
    row = 1 if "zone" in what else 3
    assert f"{tmp_path}:{row}: a value of this row cannot be read: " in refusal(tmp_path)


def make_folder(tmp_path: Path, card: str = "") -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "outside.jsonl").write_text(json.dumps(PAIR) + "\n")
    if card:
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {card}\n---\n")
    return folder


@pytest.mark.parametrize(
    "pattern",
    [
        "hf://datasets/someone/theirs/train.jsonl",
        "http://127.0.0.1:9/train.jsonl",
        "zip://train.jsonl::http://127.0.0.1:9/a.zip",
        "../outside.jsonl",
        "/etc/passwd",
    ],
)
@pytest.mark.parametrize("form", ["{}", "[{}]", "[{{split: train, path: {}}}]", "{{train: [{}]}}"])
def test_a_folder_reads_no_place_but_itself(tmp_path, monkeypatch, pattern, form):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("was opened"))
    quoted = json.dumps(pattern)
    folder = make_folder(tmp_path, f"data_files: {form.format(quoted)}")
    assert "allowed are files of this folder" in refusal(folder)
    (folder / "README.md").rename(folder / "other")
    (folder / ".huggingface.yaml").write_text(f"configs:\n- data_dir: {quoted}\n")
    assert "allowed are files of this folder" in refusal(folder)


NINE = "\n".join(
    f"v{depth}: &v{depth} [{', '.join([f'*v{depth - 1}' if depth else 'x'] * 9)}]" for depth in range(12)
)
"""Values by aliases: nine of nine of nine, 9¹² in 700 bytes."""


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (f"{NINE}\nconfigs: [{{data_files: *v11}}]", "more than 20000 values"),
        ("configs: &all [{data_files: *all}]", "20 lists and objects deep"),
        ("configs: " + "[" * 30 + "]" * 30, "20 lists and objects deep"),
        ("# " + "x" * (1 << 20), "characters of its data"),
    ],
    ids=["aliases", "of itself", "deep", "long"],
)
def test_a_card_that_takes_long_to_look_through_is_refused(tmp_path, monkeypatch, said, problem):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("was opened"))
    folder = make_folder(tmp_path)
    (folder / "README.md").write_text(f"---\n{said}\n---\n")
    assert problem in refusal(folder)


def test_a_card_that_datasets_cannot_read_is_refused_by_its_file(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: x, sequence: {a: 1}}\n---\n"
    )
    assert "its README.md or .huggingface.yaml says under configs or dataset_info" in refusal(folder)


def test_a_folder_whose_card_names_its_own_files_is_read(tmp_path):
    folder = make_folder(tmp_path, "data_files: [{split: train, path: 'tr*.jsonl'}]")
    assert len(read_preferences(folder).preferences) == 1


def test_a_link_out_of_a_folder_is_the_users_own(tmp_path):
    """As of a model: the cache of the hub is made of links."""
    folder = make_folder(tmp_path)
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert len(read_preferences(folder).preferences) == 1


def test_a_folder_that_is_no_tables_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.xml").write_text("<a/>")
    assert "would be read as xml; allowed are csv, json, parquet, arrow" in refusal(folder)


def test_a_folder_with_a_small_file_of_gigabytes_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1024, pyarrow.int32()), ["x" * (1 << 22)])
    write_parquet(folder / "train.parquet", {"prompt": texts, "chosen": texts, "rejected": texts})
    assert "could not be read" in refusal(folder)


def test_rows_of_a_folder_take_together_what_its_files_may(tmp_path):
    """They are counted before they are kept, which in many files none of the kernel's limits would end."""
    folder = tmp_path / "folder"
    folder.mkdir()
    columns = {name: ["x" * (1 << 20)] * 100 for name in PAIR}
    path = write_parquet(folder / "train.parquet", columns, row_group_size=20)
    assert path.stat().st_size < 100_000
    assert "train.parquet: its rows take more than" in refusal(folder)


def test_rows_of_a_file_with_holes_may_take_what_is_stored_of_it(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", {name: [text] * 40 for name, text in PAIR.items()})
    request = {"kind": "parquet", "path": str(path), "first": 0, "until": None, "rows": 1}
    taken = table_worker.BASE + 500 * path.stat().st_size
    for size, is_read in ((path.stat().st_size, True), (100, False)):
        said = limited.look(table_checks.WORKER, request | {"taken": taken}, size=size)
        assert ("seen" in said) == is_read, said


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}',
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen" : "d"}',
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen"\t: "d"}',
        '{"prompt": "a", "chosen": "b", "rejected": "c", "ch\\u006fsen": "d"}',
        '{"prompt": "a", "rejected": "c", "chosen": [{"role": "assistant", "content": "", "content": "b"}]}',
        json.dumps(PAIR | {"chosen": '[{"role": "assistant", "content": "b", "content": "d"}]'}),
        json.dumps(PAIR | {"tools": '[{"type": "function", "type": "f"}]'}),
    ],
)  # fmt: skip
def test_a_row_that_has_a_name_twice_is_no_row(tmp_path, row):
    """JSON's readers differ in which of the two they take."""
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n" + json.dumps(PAIR))
    found = read_preferences(path, on_error="skip")
    assert found.skipped == {"duplicate_key": 1}
    assert "twice" in str(found.problems[0])


@pytest.mark.parametrize("form", ["lines", "compressed", "list", "object"])
def test_a_name_that_an_object_of_a_folder_has_twice_is_refused_by_file(tmp_path, form):
    """What makes tables of it would take the last one in silence where it lies below the row."""
    turn = '[{"role": "assistant", "content": "", "content": "b"}]'
    rows = [json.dumps(PAIR | {"chosen": [{"role": "assistant", "content": "a"}]}), f'{{"chosen": {turn}}}']
    text = {"list": f"[{', '.join(rows)}]", "object": f'{{\n"chosen": {turn}\n}}'}.get(form, "\n".join(rows))
    path = tmp_path / ("rows.jsonl" if form in ("lines", "compressed") else "rows.json")
    content = ("\ufeff" + text).encode()
    path.write_bytes(gzip.compress(content) if form == "compressed" else content)
    said = []
    try:
        table_worker._require_names_once_in_json(str(path), "utf-8")
    except table_worker._WrongError as error:
        said = [str(error)]
    assert said == ["has 'content' twice in one object; allowed is once"]
    path.write_bytes(content.replace(b'"content": "", ', b""))
    table_worker._require_names_once_in_json(str(path), "utf-8")
    if form == "lines":
        path.write_bytes(content)
        assert "rows.jsonl: has 'content' twice" in refusal(tmp_path)


def test_a_file_that_is_terabytes_of_holes_has_a_small_files_limits(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    os.truncate(path, 1 << 43)
    with path.open("ab") as file:
        file.write(b"\0\1\0\0PAR1")
    assert stored_bytes(path) < 1 << 20
    assert "rows.parquet" in refusal(path)


@pytest.mark.parametrize("line", [b"\n", b" " * 4000 + b"\n"], ids=["many", "long"])
def test_blank_lines_without_end_are_refused(tmp_path, line, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BLANK_BYTES", 2 * sources.MAX_BLANK_LINES)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.GzipFile(path, "wb") as file:
        most = sources.MAX_BLANK_LINES + 5 if line == b"\n" else sources.MAX_BLANK_BYTES // len(line) + 1
        file.write(json.dumps(PAIR).encode() + b"\n" + line * most)
    assert path.stat().st_size < 10_000
    assert "blank lines" in refusal(path)


def test_blank_lines_of_a_table_of_text_end_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BLANK_LINES", 100)
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\n" + "\n" * 100 + "a,b,c\n" + "\n" * 101)
    assert f"{path}:204: more than 100 blank lines" in refusal(path)


def test_parts_of_long_rows_have_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PART_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    rows = [PAIR | {"prompt": "x" * length} for length in (10, 10, 3000, 10, 900, 900, 10, 10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = sources.cut_every(str(path), "train", rows=3)
    assert [part.rows for part in parts] == [3, 2, 2, 1]
    read = [row for part in parts for _, row in sources.read_rows(str(path), "train", part)]
    assert read == rows


def test_lists_in_each_other_in_a_folder_end_no_process(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(PAIR) + "\n")
    (folder / "b.jsonl").write_text('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    assert "could not be read: b.jsonl: it makes the library that reads it crash" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("prompt,chosen,rejected,chosen\na,b,c,d\n", {}),
        ('\n"prompt";chosen;"chosen"\na;b;c;d;e\n', {"sep": ";", "skip_blank_lines": True}),
        ("prompt,,\na,b,c\n", {}),
    ],
)
def test_a_csv_file_that_names_a_column_twice_is_refused(tmp_path, text, how):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(Exception, match=r"its first line has the column '\w*' twice; allowed is once"):
        table_worker._require_columns_once(str(path), {"header": "infer", "names": None} | how)
    table_worker._require_columns_once(str(path), {"header": "infer", "names": ["a", "b", "c", "d"]} | how)
    path.write_text("prompt,chosen,chosen.1\na,b,c,d\n".replace(",", how.get("sep", ",")))
    table_worker._require_columns_once(str(path), {"header": "infer", "names": None} | how)


@pytest.mark.slow
def test_a_folder_whose_csv_names_a_column_twice_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    assert "train.csv: its first line has the column 'chosen' twice" in refusal(folder)


def test_what_takes_a_while_is_said_once(tmp_path, monkeypatch, capsys):
    def look(*_, **__):
        time.sleep(0.2)
        return {"error": "broken"}

    monkeypatch.setattr(table_checks, "look", look)
    folder = make_folder(tmp_path)
    refusal(folder)
    assert "are made into tables" not in capsys.readouterr().out
    monkeypatch.setattr(table_checks, "A_WHILE", 0.01)
    refusal(folder)
    said = capsys.readouterr().out
    assert said.count("folder: its files, 0 MiB, are made into tables, which are kept") == 1


def test_empty_files_of_a_folder_are_passed_over_aloud(tmp_path, capsys):
    folder = make_folder(tmp_path)
    (folder / "train.jsonl").rename(folder / "rows.jsonl")
    for number in range(7):
        (folder / f"empty{number}.jsonl").touch()
    assert len(read_preferences(folder).preferences) == 1
    assert "7 of 8 files of split 'train' are empty: empty0.jsonl, " in capsys.readouterr().out


def test_a_folder_of_empty_files_is_refused_by_name(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(7):
        (folder / f"x{number}.jsonl").touch()
    assert "all files of split 'train' are empty: x0.jsonl, x1.jsonl, " in refusal(folder)


def test_a_folder_of_files_without_number_is_refused_unread(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    (folder / ".git").mkdir()
    for number in range(20):
        (folder / ".git" / str(number)).touch()
    monkeypatch.setattr(table_checks, "MAX_FILES", 10)
    assert len(read_preferences(folder).preferences) == 1
    (folder / "itself").symlink_to(".")  # as often as the system follows links
    assert "has more than 10 files and folders; allowed are as many" in refusal(folder)


def test_a_library_that_raises_without_a_word_is_said_to():
    """Whose next() finds nothing, whose assert fails: what reads on the terminal as `StopIteration:`."""
    outer = RuntimeError("while a table was made")
    outer.__cause__ = StopIteration()
    for error in (outer, StopIteration(), AssertionError(" ")):
        for told in (told_by(error), table_worker._told_by(error)):
            assert told.endswith((": while a table was made", "raised without a word"))


@pytest.mark.parametrize("other", ["notes.csv", "more.jsonl"])
def test_a_folder_of_which_a_file_would_be_left_out_is_refused(tmp_path, other):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "README.txt").write_text("about it")
    assert len(read_preferences(str(tmp_path)).preferences) == 1
    (tmp_path / other).write_text(
        "prompt,chosen,rejected\na,b,c\n" if ".csv" in other else json.dumps(row) + "\n"
    )
    with pytest.raises(ValueError, match=rf"{other} would be left out, because the folder is read as json"):
        read_preferences(str(tmp_path))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    )
    assert len(read_preferences(str(tmp_path)).preferences) == 1
