"""Nothing that comes from outside acts on a terminal, whoever prints it."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.table import Table
from rich.text import Text

from dpo import cli, terminal
from dpo.commands import generate
from dpo.config import GenerateConfig
from dpo.files import WriteError
from dpo.outcomes import UserError
from dpo.terminal import Guard, console, guarded_output, plural, print_plain, shortened, show_controls
from dpo.training.progress import PlainLines, Terminal, say
from dpo.training.tracking import Tracker

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\r\x7f\x9b31m\u202e\u2066\u2028\u200f\ufeff\ud800\U000e0041z"
SHOWN = "a␛]0;owned␇␛[2Jb␍␡\ufffd31m⟨U+202E⟩⟨U+2066⟩⟨U+2028⟩⟨U+200F⟩⟨U+FEFF⟩⟨U+D800⟩⟨U+E0041⟩z"
ROOT = Path(__file__).resolve().parents[1]


def acts(text: str) -> bool:
    return show_controls(text) != text


def test_control_characters_of_data_do_not_act_on_a_terminal():
    assert show_controls(HOSTILE) == SHOWN
    assert not acts("é\t👩\u200d👩\u200c\n")


def print_error(text: str) -> None:
    """As the command line says what is wrong, whatever the cause."""
    sys.stderr.write(f"dpo train: error: {shortened(str(UserError(text)))}\n")


def log(text: str) -> None:
    """As transformers and datasets do: with a handler that took the stream when they were imported."""
    logger = logging.Logger("library")
    logger.addHandler(logging.StreamHandler())
    logger.warning("unrecognized key %s", text)


def warn(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        sys.stderr.write(warnings.formatwarning(UserWarning(text), UserWarning, "x.py", 1))


def show_progress(bar: type) -> object:
    def show(text: str) -> None:
        out = console(force_terminal=bar is Terminal, color_system=None, width=400)
        tracker = Tracker([], bar(out, total_steps=2, first_step=0, clock=lambda: 0.0))
        tracker.message(text)
        tracker.close()

    return show


def show_table(text: str) -> None:
    table = Table(title=text, title_style="none")
    table.add_column(Text(text))
    table.add_row(Text(text))
    console(width=400).print(table)


SINKS = {
    "print": lambda text: print(text),
    "lines of text": lambda text: sys.stdout.writelines([text]),
    "an error": print_error,
    "a library's logger": log,
    "a warning": warn,
    "a line of a command": print_plain,
    "a line of the run": say,
    "lines of progress": show_progress(PlainLines),
    "a bar": show_progress(Terminal),
    "a table": show_table,
}


@pytest.mark.parametrize("name", SINKS)
def test_one_hostile_text_through_every_sink(name, monkeypatch):
    """What is left of the terminal's own commands are those that Rich and tqdm write, none of them ours."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    with guarded_output():
        SINKS[name](HOSTILE)
    out.flush()
    written = out.buffer.getvalue().decode("utf-8")
    if name == "a bar":
        assert "\x1b[2K" in written, "Rich's own commands act"
        assert "␛[2K" not in written
        assert "\x1b]0" not in written
        assert "\x1b[2J" not in written
        assert not any(mark in written for mark in "\x07\x9b\u202e\u2066\u2028\ufeff")
    else:
        assert not acts(written)
    assert ("␛]0;owned␛[2Jb␡" if name == "a table" else "␛]0;owned␇␛[2Jb␍␡") in written
    assert "⟨U+202E⟩" in written


def test_settings_that_are_wrong_are_shown_too(capsys):
    with contextlib.suppress(SystemExit):
        cli.main(["inspect", "--data.train=x", "--run_dir=x", "--data.max_length=\x1b[2J\u202e"])
    said = capsys.readouterr().err
    assert not acts(said)
    assert "␛[2J⟨U+202E⟩" in said


def test_a_progress_bar_still_draws_over_its_line():
    out = io.StringIO()
    guard = Guard(out)
    guard.write("\r10%")
    guard.write("\x1b[A\x1b[A")
    guard.write("\x1b[Ax\r")
    assert out.getvalue() == "\r10%\x1b[A\x1b[A␛[Ax␍"


def test_a_stream_that_cannot_write_a_character_writes_its_number():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Guard(out).write("é")
    out.flush()
    assert out.buffer.getvalue() == b"\\xe9"


def test_a_long_error_keeps_its_beginning_and_its_end():
    said = shortened("model/x.safetensors: tensor " + "n" * 3_000_000 + " is wrong")
    assert len(said) < 2100
    assert said.startswith("model/x.safetensors: tensor n")
    assert said.endswith(" is wrong")
    assert shortened("\n".join("x" * 5000)).count("\n") == terminal.MOST_LINES
    assert shortened("short\nlines") == "short\nlines"


def test_only_here_is_a_console_made_and_a_stream_written():
    """Others print through these; what they print themselves passes the guard."""
    for path in sorted((ROOT / "dpo").rglob("*.py")):
        if path.name in ("terminal.py", "template_worker.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("Console", "rich.print", "rich.get_console"), f"{path}:{node.lineno}"
                assert not called.startswith(("sys.__stdout__", "sys.__stderr__")), f"{path}:{node.lineno}"


@pytest.mark.parametrize("sink", SINKS)
def test_what_nobody_reads_any_more_is_dropped(sink, monkeypatch):
    """A closed pipe, from the first line to the end of the interpreter, which flushes what is left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with guarded_output():
            for text in ("one", "two\n", "x" * 100_000):
                SINKS[sink](text)
                sys.stdout.flush()


class Refusing(io.StringIO):
    """Standard output that gives an error, now or when it is flushed at the end."""

    def __init__(self, number: int, *, late: bool) -> None:
        super().__init__()
        self._error, self._late = OSError(number, os.strerror(number)), late

    def write(self, text: str) -> int:
        if not self._late:
            raise self._error
        return len(text)

    def flush(self) -> None:
        raise self._error


def ends(command: str, out: Refusing, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command line whose standard output is `out`."""
    with monkeypatch.context() as within:
        within.setattr(sys, "stdout", out)
        try:
            return cli.main(command.split())
        except SystemExit as end:
            return end.code


@pytest.mark.parametrize("command", [*cli.COMMANDS, "--help", "watch --help"])
def test_what_was_asked_for_and_could_not_be_printed_is_an_error(command, monkeypatch, capsys):
    """Of commands that write files it is a warning; who reads no further misses nothing."""
    wanted = command in cli.PRODUCT_IS_PRINTED or "--help" in command
    begins = f"{'error' if wanted else 'warning'}: standard output could not be written: "
    ways = (print, print_plain, lambda text: console().print(Text(text)))
    for show in ways if command in cli.COMMANDS else ways[:1]:
        if command in cli.COMMANDS:
            monkeypatch.setitem(cli.COMMANDS, command, lambda _, show=show: show("figures") or 0)
        for late in (False, True):
            assert ends(command, Refusing(errno.EPIPE, late=late), monkeypatch) == 0
            assert capsys.readouterr().err == ""
            for number in (errno.ENOSPC, errno.EDQUOT):
                assert ends(command, Refusing(number, late=late), monkeypatch) == (1 if wanted else 0)
                assert begins + os.strerror(number) in capsys.readouterr().err


def test_a_bar_at_a_terminal_that_is_lost_is_drawn_no_more_and_fails_in_no_thread(capsys):
    """Rich draws it anew from a thread of its own, whose error would be a traceback."""
    primary, replica = os.openpty()
    with os.fdopen(replica, "w") as stream:
        out = console(file=stream, force_terminal=True, width=80)
        bar = Terminal(out, total_steps=2, first_step=0, clock=lambda: 0.0)
        os.close(primary)
        bar.update(0, {"loss": 1.0})
        bar._bar.refresh()
        bar.message("still going on")
        bar.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [BrokenPipeError(), WriteError("No space left")])
@pytest.mark.parametrize("prompt", ["hello", None])
def test_an_answer_ends_quietly_where_its_reader_has_gone(error, prompt, monkeypatch):
    """As in `dpo generate MODEL PROMPT | head -1`; a full disk is said, since the answer was asked for."""
    for name in ("dpo.huggingface.pretrained", "dpo.pages.chat", "dpo.training.program"):
        said = {"respond": lambda *_, **__: iter(["yes"]), "converse": lambda *_, write, **__: write("yes")}
        monkeypatch.setitem(sys.modules, name, Mock(**said))
    monkeypatch.setattr(generate, "_write", Mock(side_effect=error))
    gone = isinstance(error, BrokenPipeError)
    with contextlib.nullcontext() if gone else pytest.raises(OSError, match="No space left"):
        generate.answer(GenerateConfig(model="/no/model"), prompt)


def test_one_thing_is_not_several() -> None:
    assert [plural(count, "row") for count in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


@pytest.mark.parametrize(
    ("margin", "shown"), [(4.041e-06, "0"), (-1.907e-07, "0"), (0.0004321, "0.00043"), (-12.3456, "-12.35")]
)
def test_a_margin_of_rounding_alone_is_shown_as_none(margin, shown):
    out = io.StringIO()
    lines = PlainLines(console(file=out, width=200), total_steps=9, first_step=0, clock=lambda: 0.0)
    lines.update(0, {"loss": 0.6931472, "rewards/margins": margin})
    assert out.getvalue() == f"step 1/9  loss 0.6931  margin {shown}\n"
