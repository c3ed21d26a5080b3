import dataclasses

from rich.console import Console
from toy_tokenizer import make_tokenizer

from dpo.data.inspection import inspect_dataset, render_report
from dpo.data.preferences import Preference, ReadPreferences
from dpo.data.remaining import left_out, remarks, warnings
from dpo.data.tokenization import tokenize


def read(*lengths, skipped=None, unused=None):
    rows = [
        Preference("hi", ("a" * length, "b"), (0, 1), None, "s", f"d.jsonl:{i}")
        for i, length in enumerate(lengths)
    ]
    found = ReadPreferences(
        rows, len(rows) + sum((skipped or {}).values()), skipped or {}, [], {}, unused or {}
    )
    return found, tokenize(rows, make_tokenizer(), max_length=20)


def read_summary(*lengths, **how):
    found, tokens = read(*lengths, **how)
    return found.summary, tokens


def test_few_that_are_left_out_are_counted_without_a_warning():
    assert left_out(*read_summary(*[1] * 99, 30)) == {"too_long": 1}
    assert warnings(*read_summary(*[1] * 99, 30)) == []


def test_many_that_are_left_out_are_a_warning_with_reasons_and_settings():
    (warning,) = warnings(*read_summary(*[1] * 7, 30, 30, skipped={"empty": 1}))
    assert warning.startswith("3 of 10 preferences (30%) are left out: 2 too_long (see data.max_length or ")
    assert warning.endswith(", 1 empty")
    found, tokens = read(*[1] * 7, 30, 30, skipped={"empty": 1})
    assert inspect_dataset(found, tokens)["warnings"] == [warning]


def test_what_a_mixture_does_not_draw_is_counted_and_is_no_warning():
    found, tokens = read_summary(*[1] * 7, 30)
    tokens = dataclasses.replace(tokens, dropped=tokens.dropped | {"not_drawn": 12, "no_pair": 5})
    assert left_out(found, tokens) == {"not_drawn": 12, "no_pair": 5, "too_long": 1}
    assert warnings(found, tokens) == []
    more = dataclasses.replace(tokens, dropped=tokens.dropped | {"too_long": 6})
    assert warnings(found, more)[0].startswith("6 of 30 preferences (20%) are left out: 6 too_long")


def test_what_is_counted_before_a_mixture_draws_says_of_how_many():
    found, tokens = read(*[1] * 4)
    noted = {"remarks": {"a space": 16}, "first_remarks": {"a space": "d.jsonl:1"}, "num_truncated": 16}
    tokens = dataclasses.replace(tokens, dropped={"not_drawn": 12}, **noted)
    assert remarks(found.summary, tokens) == ["16 of 16, drawn or not: a space (first: d.jsonl:1)"]
    terminal = Console(width=200)
    with terminal.capture() as shown:
        terminal.print(render_report(inspect_dataset(found, tokens)))
    text = shown.get()
    assert "4 (16 truncated, drawn or not)" in text
    assert "distinct prompts (12 more are not drawn)" in text
    assert "16 x a space, drawn or not (first: d.jsonl:1)" in text
    whole = dataclasses.replace(tokens, dropped={}, remarks={"a space": 3})
    assert remarks(found.summary, whole) == ["3 of 4: a space (first: d.jsonl:1)"]


def test_columns_that_were_not_used_are_said_once():
    assert remarks(*read_summary(1, 2, unused={"id": 2, "url": 1})) == ["not used: id, url"]
