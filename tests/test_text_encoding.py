"""A text that is not UTF-8 is refused by the encoding that it begins with, wherever one is read."""

import gzip
import json

import pytest

from dpo.cli import main
from dpo.data.preferences import read_preferences
from dpo.data.templates import read_template
from dpo.huggingface.foreign_json import read_small_json
from dpo.text_encoding import encoding_problem
from dpo.typed_json import read_typed

ROW = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}
LINE = json.dumps(ROW) + "\n"
ENCODINGS = {
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}


@pytest.mark.parametrize(("encoding", "name"), ENCODINGS.items())
def test_the_first_bytes_show_an_encoding(encoding, name):
    problem = encoding_problem(LINE.encode(encoding)[:4])
    assert problem is not None
    assert f"those of {name}; allowed is UTF-8: iconv -f {name} -t UTF-8 FILE > NEW" in problem


@pytest.mark.parametrize("text", ["", "{", "{}\n", LINE, "\ufeff" + LINE, "日本", "\x00\x00", "a\x00bc"])
def test_utf8_is_none_of_them(text):
    assert encoding_problem(text.encode()[:4]) is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "list.json", "rows.csv", "folder"]
)
def test_rows_are_refused_by_it(tmp_path, monkeypatch, encoding, name):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = {"list.json": f"[{LINE}]", "rows.csv": "prompt,chosen,rejected\na,b,c\n"}
    content = texts.get(name, LINE).encode(encoding)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "rows.jsonl").write_bytes(content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=r"rows|list") as refused:
        read_preferences(path)
    assert "its first bytes are those of UTF-16" in str(refused.value)


@pytest.mark.parametrize(
    "read",
    [read_small_json, lambda path: read_typed(path, dict), lambda path: read_template(path, name="template")],
)
def test_files_of_a_model_or_a_run_are_refused_by_it(tmp_path, read):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe" + LINE.encode("utf-16-le"))
    with pytest.raises(
        ValueError, match=r"config.json.* its first bytes are those of UTF-16; allowed is UTF-8"
    ):
        read(path)


def test_settings_are_refused_by_it(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n", encoding="utf-16")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert "run.yaml: its first bytes are those of UTF-16; allowed is UTF-8" in capsys.readouterr().err
