"""One table of hostile texts through every place to which a text of others comes.

To a terminal they come through `dpo.terminal` (tests/test_terminal.py has its sinks one by one), to a page
through `dpo.pages.page`, to a model card through `as_text`, to files as JSON, Parquet or YAML. A new place is
added here; that there is none besides shows in what the package imports and calls.
"""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow.parquet
import pytest
import yaml
from markdown_it import MarkdownIt

from dpo.commands.output import write_json
from dpo.evaluation.rows_table import Line, write_lines
from dpo.huggingface.foreign_json import show
from dpo.judging.journal import Journal, read_lines
from dpo.outcomes import UserError, describe
from dpo.pages.page import make_environment
from dpo.terminal import guarded_output, print_plain, shortened, show_controls
from dpo.training.model_card import as_text
from dpo.training.progress import say

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "a window's title": "\x1b]0;owned\x07",
    "a link of the terminal": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "a clipboard": "\x1b]52;c;ZWNobw==\x07",
    "a cleared screen": "\x1b[2J\x1b[H",
    "C1": "\x9b31m\x9d0;x\x9c",
    "a line that is written over": "safe\rowned",
    "backspaces": "owned\x08\x08\x08\x08\x08safe",
    "a turned line": "abc\u202edcba\u202c",
    "isolates": "\u2066a\u2069\u200f",
    "lines of Unicode": "a\u2028b\u2029c\x0bd\x0ce\x85f",
    "what hides": "a\ufeff\u2060\u2064b\U000e0041",
    "zero": "a\x00b",
    "lines": "a\n# owned\n| b |\n---\n",
    "a formula": "=HYPERLINK(\"http://evil.example\")",
    "formulas": "+1\t-1\t@SUM(1)",
    "a script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "an attribute's end": "\" onmouseover=\"alert(1)' x='",
    "an entity": "&lt;b&gt;&#x202e;",
    "Rich's markup": "[bold red]owned[/] [link=http://evil.example]x[/link]",
    "a template": "{{ 7 * 7 }}{% raw %}{# #}",
    "Markdown": "[x](javascript:alert(1)) ![y](http://evil.example/p.png) **b** `c` ``` | d",
    "YAML": "a: !!python/object/apply:os.system [x]\n- &a *a",
    "JSON": '"}, {"key": "\\u202e',
}  # fmt: skip


@pytest.fixture(params=TEXTS)
def text(request) -> str:
    return TEXTS[request.param]


def print_error(text: str) -> None:
    print(shortened(describe("dpo train", UserError(f"model: {show(text)} and {text}"))), file=sys.stderr)


TERMINAL: dict[str, Callable[[str], None]] = {
    "print": print,
    "a command's line": print_plain,
    "a run's line": say,
    "an error": print_error,
}


@pytest.mark.parametrize("sink", TERMINAL)
def test_on_a_terminal_it_is_shown(sink, text, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    with guarded_output():
        TERMINAL[sink](text)
    out.flush()
    written = out.buffer.getvalue().decode("utf-8")
    assert show_controls(written) == written
    assert show_controls(text).strip().split("\n")[0].split("\t")[0] in written


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Any] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_on_a_page_it_is_shown(text):
    page = _Elements()
    page.feed(make_environment().from_string('<p title="{{ x }}">{{ x }}</p>').render(x=text))
    page.close()
    shown = show_controls(text)
    assert page.found == [("p", [("title", shown)])]
    assert page.text == shown


def test_every_page_has_a_policy_before_its_first_text_by_which_it_fetches_and_sends_nothing():
    pages = {path.name: path.read_text("utf-8") for path in (ROOT / "dpo" / "pages").glob("*.html.jinja")}
    layout = pages.pop("page.html.jinja")
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert 0 < layout.index(f'http-equiv="Content-Security-Policy" content="{policy}"') < layout.index("{{")
    assert pages
    assert all("{% extends 'page.html.jinja' %}" in text.replace('"', "'") for text in pages.values())


def test_on_a_card_it_is_shown(text):
    line = as_text(text)
    assert show_controls(line) == line
    table = MarkdownIt("gfm-like", {"linkify": False}).parse(f"| a | b |\n|---|---|\n| c | {line} |\n\nend\n")
    cells = [token for token in table if token.type == "inline"]
    assert len(cells) == 5, "no cell more, no line more"
    assert {inner.type for inner in cells[3].children or ()} <= {"text", "code_inline"}


def test_in_a_table_of_rows_it_is_what_it_was(text, tmp_path):
    kinds = {str: text, int: 1, float: 0.5}
    line: Any = {name: kinds.get(kind, [1]) for name, kind in get_type_hints(Line).items()}
    for name in ("rows.jsonl", "rows.parquet"):
        write_lines(str(tmp_path / name), [line, line])
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    assert [json.loads(one)["prompt"] for one in lines] == [text, text]
    found = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [one["prompt"] for one in found] == [text, text]


def test_in_a_journal_it_is_one_line(text, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with Journal(path) as journal:
        journal.append({"key": text, "answer": text})
    assert path.read_bytes().count(b"\n") == 1
    assert read_lines(path) == {text: {"key": text, "answer": text}}


def test_in_files_of_results_and_settings_it_is_what_it_was(text, tmp_path):
    write_json(tmp_path / "result.json", {"name": text})
    assert json.loads((tmp_path / "result.json").read_text("utf-8")) == {"name": text}
    assert yaml.safe_load(yaml.safe_dump({"name": text}, allow_unicode=True)) == {"name": text}


def test_nothing_writes_tables_that_a_spreadsheet_would_compute():
    """Rows go out as JSON lines and Parquet: there is no writer of CSV that would need to quote formulas."""
    calls = {
        ast.unparse(call.func)
        for path in sorted((ROOT / "dpo").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call)
    }
    assert not {call for call in calls if call.endswith(("csv.writer", "DictWriter", "to_csv", "write_csv"))}
