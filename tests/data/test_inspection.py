import io
import json

import pytest
from rich.console import Console
from toy_tokenizer import make_tokenizer

from dpo.data.inspection import (
    _with_places,
    inspect_dataset,
    longer_is_better,
    render_example,
    render_report,
)
from dpo.data.preferences import Preference, Problem, ReadPreferences
from dpo.data.text_counts import TextCounts
from dpo.data.tokenization import tokenize
from dpo.data.tokenized import make_dataset

USER = {"role": "user", "content": "Hello, World!"}
ASSISTANT = {"role": "assistant", "content": "Hi."}


def make(prompt, *responses, ranks=None, scores=None, source="s"):
    return Preference(
        prompt, responses, ranks or tuple(range(len(responses))), scores, source, f"{source}.jsonl:1"
    )


def inspect(preferences, **settings):
    read = ReadPreferences(list(preferences), len(preferences), {}, [])
    return inspect_dataset(read, tokenize(preferences, make_tokenizer(), **settings))


@pytest.mark.parametrize(
    ("preferences", "counts"),
    [
        ([make("p", "a", "b"), make("p", "b", "c")], {"distinct_prompts": 1, "conflicting": 0}),
        ([make("p", "a", "b"), make("p", "b", "a")], {"conflicting": 1, "duplicates": 0}),
        ([make("p", "a", "b", "c"), make("p", "c", "x", "a")], {"conflicting": 1}),
        ([make("p", "a", "b"), make("q", "b", "a")], {"conflicting": 0, "distinct_prompts": 2}),
        ([make("p", "a", ranks=(0,)), make("p", "a", ranks=(1,))], {"conflicting": 1}),
        ([make("p", "a", "b")] * 3, {"duplicates": 2, "conflicting": 0}),
        ([make("p", "a", "a"), make("q", "a", "b")], {"identical_responses": 1}),
        ([make("p", "a", "b", "c", ranks=(0, 0, 1))], {"tied": 1, "all_tied": 0}),
        ([make("p", "a", "b", ranks=(0, 0))], {"tied": 1, "all_tied": 1, "conflicting": 0}),
        ([make("p", "a", "b", scores=(1.0, 2.0))], {"scores_against_ranks": 1, "with_scores": 1}),
        ([make("p", "a", "b", scores=(2.0, 1.0))], {"scores_against_ranks": 0}),
        ([make("p", "a", ranks=(1,)), make("q", "a")], {"labels": {"desirable": 1, "undesirable": 1}}),
        ([make("p", "a", "b", source="x"), make("p", "a", "c", source="y")], {"sources": {"x": 1, "y": 1}}),
        ([make("p", "a", "b"), make("p", "a", "b", "c")], {"responses": {"2": 1, "3": 1}}),
        ([make("p", "a", "b"), make("p", "a" * 99, "b")], {"kept": 1, "dropped": {"too_long": 1}}),
    ],
)
def test_counts(preferences, counts):
    report = inspect(preferences, max_length=60)
    assert {key: report[key] for key in counts} == counts


def test_overlap_is_of_normalised_prompts():
    train = [make((USER, ASSISTANT, USER), "a", "b"), make("Other", "a", "b")]
    heldout = [
        make(({"role": "user", "content": "hello   world"}, ASSISTANT, USER), "c", "d"),
        make((USER,), "c", "d"),
        make("other?", "c", "d"),
        make("new", "c", "d"),
    ]
    texts = TextCounts(with_first_messages=True)
    for preference in train:
        texts.add(preference)
    overlap = texts.overlap(heldout)
    assert (overlap["heldout"], overlap["same_prompt"], overlap["same_first_message"]) == (4, 2, 3)


def test_longer_is_better_compares_best_with_worst_of_untied_prompts():
    responses = [[[1, 1], [1]], [[1], [1], [1, 1]], [[1], [1]], [[1, 1], [1]]]
    ranks = [[0, 1], [0, 1, 2], [0, 1], [0, 0]]
    longer = longer_is_better(make_dataset([[1]] * 4, responses, ranks=ranks))
    assert (longer["rate"], longer["comparisons"], longer["equal_length"]) == (0.5, 2, 1)
    none = longer_is_better(make_dataset([[1]], [[[1], [1]]], ranks=[[0, 1]]))
    assert (none["rate"], none["low"], none["high"]) == (None, 0.0, 1.0)


def test_the_report_is_json_and_renders_with_every_count():
    train = [make("p", "a", "bb", "ccc", ranks=(0, 0, 1), scores=(2.0, 2.0, 1.0)), make("q" * 99, "a", "b")]
    read = ReadPreferences(train, 3, {"empty": 1}, [])
    dataset = tokenize(train, make_tokenizer(), max_length=60)
    report = inspect_dataset(read, dataset, heldout=[make("P", "x", "y")])
    assert json.loads(json.dumps(report)) == report
    written = io.StringIO()
    Console(width=150, file=written).print(render_report(report))
    printed = written.getvalue()
    for part in (
        "empty 1",
        "too_long 1",
        "1 with 2, 1 with 3",
        "1 whole",
        "with ties",
        "prompt + all responses",
    ):
        assert part in printed


def test_the_example_colours_exactly_the_scored_text(tokenizer):
    dataset = tokenize([make("hi", "yes", "no")], tokenizer)
    text = render_example(dataset, 0, tokenizer)
    scored = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert scored == "yes<e>⏎\nno<e>⏎\n"
    read = "".join(
        text.plain[span.start : span.end] for span in text.spans if "bright_black" in str(span.style)
    )
    assert read == "<s>u:hi<e>\n<s>a:"


def test_a_long_prompt_is_shortened_in_the_example(tokenizer):
    dataset = tokenize([make("h" * 300, "yes", "no")], tokenizer)
    assert "… 208 tokens left out …" in render_example(dataset, 0, tokenizer, max_prompt_tokens=100).plain


def test_names_and_texts_of_data_are_neither_markup_nor_terminal_commands(tokenizer):
    odd = make("h[/b]\x1b[2J", "y[red]es", "n\x07o", source="[/no] [bold]x\x1b]0;t\x07")
    read = ReadPreferences([odd], 1, {}, [Problem("[/f]:1", "[/x]", "r", "\x1b[1m")])
    dataset = tokenize([odd], tokenizer)
    written = io.StringIO()
    console = Console(width=200, file=written, force_terminal=False)
    console.print(render_report(inspect_dataset(read, dataset)))
    console.print(render_example(dataset, 0, tokenizer))
    printed = written.getvalue()
    assert "[/no] [bold]x␛]0;t␇ 1" in printed
    assert "malformed: [/f]:1: field '[/x]': ␛[1m [r]" in printed
    assert "\x1b" not in printed
    assert "\x07" not in printed


def test_what_is_counted_is_named_by_its_place():
    rows = [Preference("p", ("a", "b"), (0, 1), None, "s", f"it.jsonl:{line}") for line in range(1, 9)] + [
        Preference("p", ("b", "a"), (0, 1), None, "s", "it.jsonl:9")
    ]
    counts = TextCounts()
    for row in rows:
        counts.add(row)
    assert counts.figures() | {"duplicates": 7, "conflicting": 1} == counts.figures()
    assert counts.first == {
        "duplicates": [f"it.jsonl:{line}" for line in range(2, 7)],
        "conflicting": ["it.jsonl:9"],
    }
    assert _with_places("7", counts.first["duplicates"], 7).plain.endswith("it.jsonl:6, …)")
