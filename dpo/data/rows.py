"""What one row says, as a `Preference`.

A row is one JSON object (a JSONL line, a Parquet row, a row of a `datasets` data set) in one of the layouts
of `dpo.data.layouts`, such as

    pair         {"prompt", "chosen", "rejected"}, where wanted with "score_chosen" and "score_rejected"
    ranking      {"prompt", "responses": [...]} and "ranks": [1 is best, ...] or "scores": [higher is better,
                 ...], or both (the ranks then give the order)
    completion   {"prompt", "completion", "label": true (desirable) or false}

A prompt is a string or a conversation that does not end with the assistant. A response is a string or
messages of which the assistant says the first and the last. Where there is no column for the prompt it is
what the responses share: whole messages of conversations, and of strings the common prefix up to a word's
border. Beside any layout stand a system text ("system"), "tools", "documents" and "chat_template_kwargs" for
the chat template, and "source", which names where the row came from. Other columns are not used, and named.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.columns import BY_COLUMNS, Columns, RowReading, has_meaning, may_ask
from dpo.data.conversations import cut_repeated, mentions, split_prompt, with_system
from dpo.data.layouts import LAYOUTS, Answers, RowLayout, find_layout, find_prompt
from dpo.data.malformed import MalformedRowError
from dpo.data.messages import Prompt, Response
from dpo.data.values import (
    as_object,
    is_empty,
    name_type,
    parse_json,
    read_json,
    read_objects,
    read_text,
    show_names,
)
from dpo.outcomes import UserError

REPEATED = "the prompt at the beginning of responses"
"""What is cut off there, as it is named among what is not used."""

MOST_RESPONSES = 1000
"""Of a row, or of rows that are one: what is looked for in their pairs grows with the square."""

UNRANKED = (-1,)
"""The rank of a response that has only a score, until its neighbours are known."""


class Preference(NamedTuple):
    """A prompt and its responses, best first."""

    prompt: Prompt
    """Plain text, or the messages of a conversation."""
    responses: tuple[Response, ...]
    """Best first: the content of the assistant's message, or messages."""
    ranks: tuple[int, ...]
    """0 is best, without gaps; equal ranks are ties. One response alone: 0 is desirable, 1 undesirable."""
    scores: tuple[float, ...] | None
    """Given scores, higher is better."""
    source: str
    """The row's own "source" field, or the name of its file or data set."""
    location: str
    """File (or data set) and line (or row), counted from 1: `train.jsonl:17`."""
    context: Mapping[str, Any] | None = None
    """What the chat template gets besides messages: "tools", "documents", and template arguments by name."""


def digest(preference: Preference) -> bytes:
    """Of what a row says, not of where it stands."""
    content: list[Any] = [preference.prompt, preference.responses, preference.ranks, preference.scores]
    content += [] if preference.context is None else [preference.context]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def parse_row(row: Any, *, location: str, source: str, reading: RowReading = BY_COLUMNS) -> Preference:
    """One row as a `Preference`; raises a `ValueError` that names the field and what is allowed in it."""
    return read_row(row, location=location, source=source, reading=reading).preference


class ReadRow(NamedTuple):
    """A row as it was read."""

    preference: Preference
    layout: str
    unused: tuple[str, ...]
    """Columns that say something and were not read."""


def read_row(row: Any, *, location: str, source: str, reading: RowReading = BY_COLUMNS) -> ReadRow:
    """One row, its layout, and what of it was not used.

    Raises:
      MalformedRowError: naming the field and what is allowed in it.
    """
    _require_object(row)
    columns = Columns(row, reading)
    name = reading.layout or _find_layout(columns, row)
    layout = LAYOUTS[name]
    if reading.layout is not None and not layout.fits(frozenset(columns)):
        detail = f"found {show_names(columns)}; the layout {name} needs {layout.needs}"
        raise MalformedRowError("(row)", "missing_field", detail)
    preference = _read_columns(columns, layout, location, source)
    unread = columns.unread()
    if not unread:
        return ReadRow(preference, name, columns.replaced)
    unused = {column: value for column, value in unread.items() if not is_empty(value)}
    meant = {column for column in unused.keys() - reading.ignored if has_meaning(column, reading)}
    for column in sorted(meant):
        value = unused[column]
        if not isinstance(value, str) or not mentions(preference.prompt, value):
            raise _unused_meaning(column, name, reading)
    return ReadRow(preference, name, (*sorted(unused), *columns.replaced))


def _require_object(row: Any) -> None:
    if isinstance(row, MalformedRowError):
        raise row
    if type(row) is not dict and not isinstance(row, Mapping):
        raise MalformedRowError("(row)", "wrong_type", f"found {name_type(row)}; allowed is an object")


def _find_layout(columns: Columns, row: Mapping[str, Any]) -> str:
    """The layout of a row; where it has none because a column holds null, that column is named."""
    try:
        return find_layout(columns, columns.reading)
    except MalformedRowError as error:
        nulls = [str(name) for name, value in row.items() if value is None]
        with_nulls = frozenset([*columns, *nulls])
        if error.reason != "unknown_format" or not nulls:
            raise
        fitting = [name for name, layout in LAYOUTS.items() if layout.fits(with_nulls)]
        if not fitting:
            raise
        needed = set(LAYOUTS[fitting[0]].needs.replace("|", " ").split())
        field = next((name for name in nulls if name in needed), nulls[0])
        detail = f"found null; allowed is a value, as the layout {fitting[0]} needs one"
        raise MalformedRowError(field, "null", detail) from None


def read_prompt_row(row: Any, *, location: str, source: str, reading: RowReading = BY_COLUMNS) -> Preference:
    """One row that is a prompt alone, as a preference without responses.

    Raises:
      MalformedRowError: for a row without a prompt, and for one that has responses in some layout.
    """
    _require_object(row)
    columns = Columns(row, reading)
    fitting = [name for name, layout in LAYOUTS.items() if layout.fits(frozenset(columns))]
    if fitting or reading.layout is not None:
        detail = f"is of the layout {reading.layout or fitting[0]}; allowed is a prompt alone"
        raise MalformedRowError("(row)", "unknown_format", detail)
    return _read_columns(columns, _PROMPT_ALONE, location, source)._replace(responses=(), ranks=())


_PROMPT_ALONE = RowLayout("prompt", lambda row: Answers({"(response)": "-"}, (0,)))
"""A response that is taken off again stands in for those that are not there."""


def _unused_meaning(column: str, layout: str, reading: RowReading) -> MalformedRowError:
    detail = (
        f"would change what is learned, and the layout {layout} does not read it; allowed: its place by "
        f"{_columns_or_ignored(column, reading)}"
    )
    return MalformedRowError(column, "unused_meaning", detail)


def _columns_or_ignored(column: str, reading: RowReading) -> str:
    return f"{reading.setting('columns')}, or {reading.setting('ignore_columns')} [{column}]"


def _read_columns(columns: Columns, layout: RowLayout, location: str, source: str) -> Preference:
    found = find_prompt(columns, layout)
    answers = layout.read(columns)
    require_few(len(answers.responses))
    prompt, responses = split_prompt(
        found and found[0],
        answers.responses,
        strip=found is not None and found[1],
        setting=columns.reading.setting("columns"),
    )
    if columns.reading.repeats and found is not None:
        responses, is_cut = cut_repeated(prompt, responses, list(answers.responses))
        columns.replaced += (REPEATED,) * is_cut
    if found is None and isinstance(prompt, str):
        _require_no_empty(columns)
    shared = prompt if found is None and isinstance(prompt, str) else None
    for name in SYSTEM_COLUMNS:
        if name in columns and not is_empty(columns[name]):
            prompt = with_system(prompt, read_text(columns[name], name), name)
    given = columns.get("source")
    named = read_text(given, "source") if isinstance(given, str) else source
    context = _read_context(columns)
    if shared is not None:
        _require_no_other(columns, layout, shared)
    scores = None if answers.scores is None else tuple(map(float, answers.scores))
    if len(responses) == 1:
        ranks = UNRANKED if layout.groups else (int(answers.ranks[0]),)
        return Preference(prompt, tuple(responses), ranks, scores, named, location, context)
    order, ranks = _ordered(answers.ranks)
    if order is not None:
        responses = [responses[k] for k in order]
        scores = scores and tuple([scores[k] for k in order])
    return Preference(prompt, tuple(responses), ranks, scores, named, location, context)


def require_few(count: int) -> None:
    """Refuse more responses to a prompt than are compared with each other.

    Raises:
      MalformedRowError: with their number.
    """
    if count > MOST_RESPONSES:
        detail = f"the prompt has {count} responses; allowed are {MOST_RESPONSES}"
        raise MalformedRowError("(row)", "too_many_responses", detail)


def _require_no_empty(columns: Columns) -> None:
    """Refuse words that responses begin with as a prompt where a column that is for it says nothing.

    Raises:
      MalformedRowError: naming the column.
    """
    found = columns.empty_prompt
    if found is not None:
        name, value = found
        detail = (
            f"found {'null' if value is None else 'nothing'}, and what the responses begin with alike is not "
            "taken for the prompt; allowed is text or messages, or "
            f"{columns.reading.setting('ignore_columns')} [{name}] where the responses begin with the prompt"
        )
        raise MalformedRowError(name, "null" if value is None else "empty", detail)


def _require_no_other(columns: Columns, layout: RowLayout, shared: str) -> None:
    """Refuse words that responses begin with as a prompt where the row has something that may be it.

    Raises:
      MalformedRowError: naming the column.
    """
    tried = {name: dict.__getitem__(columns, name) for name in layout.prompts if columns.was_read(name)}
    others = {name: value for name, value in columns.asked().items() if may_ask(name, value)}
    for name, value in (tried | others).items():
        if not (isinstance(value, str) and value.strip() in shared):
            ends = ", which ends with the assistant" if name in tried else ""
            detail = (
                f"may be the prompt{ends}, and what the responses begin with alike is not taken for it; "
                f"allowed: its place by {_columns_or_ignored(name, columns.reading)}"
            )
            raise MalformedRowError(name, "unused_meaning", detail)


def join_responses(members: Sequence[Preference]) -> Preference:
    """Rows of one response and its score each as one row."""
    scores = [member.scores[0] for member in members if member.scores is not None]
    order, ranks = _ordered([-score for score in scores])
    order = range(len(members)) if order is None else order
    return members[0]._replace(
        responses=tuple([members[k].responses[0] for k in order]),
        ranks=ranks,
        scores=tuple([float(scores[k]) for k in order]),
    )


def _ordered(ranks: Sequence[int | float]) -> tuple[Sequence[int] | None, tuple[int, ...]]:
    """Places from the best to the worst (None where they are so), and the ranks there from 0 without gaps."""
    if len(ranks) == 2 and ranks[0] < ranks[1]:
        return None, (0, 1)
    distinct = sorted(set(ranks))
    if distinct == list(ranks):
        return None, tuple(range(len(ranks)))
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    levels = {rank: level for level, rank in enumerate(distinct)}
    return order, tuple([levels[ranks[k]] for k in order])


def _read_context(columns: Columns) -> Mapping[str, Any] | None:
    """What a row has for the chat template besides messages."""
    if columns.keys().isdisjoint(_CONTEXT) and not columns.was_read("input"):
        return None
    context: dict[str, Any] = {}
    inside = as_object(columns["input"], "input") if columns.was_read("input") else None
    for name in ("tools", "documents"):
        value = columns.get(name) if name in columns else (inside or {}).get(name)
        if isinstance(value, str) and not is_empty(value):
            value = parse_json(value, name)
        if not is_empty(value):
            context[name] = read_json(read_objects(_parsed_items(value, name), name), name)
    arguments = columns.get("chat_template_kwargs")
    if not is_empty(arguments):
        given = as_object(arguments, "chat_template_kwargs")
        if given is None:
            detail = f"found {name_type(arguments)}; allowed is an object"
            raise MalformedRowError("chat_template_kwargs", "wrong_type", detail)
        check_arguments(given, "chat_template_kwargs")
        context["chat_template_kwargs"] = read_json(dict(given), "chat_template_kwargs")
    return context or None


def _parsed_items(value: Any, field: str) -> Any:
    """A list of which each item that is the JSON text of an object is that object."""
    if not isinstance(value, list):
        return value
    return [
        as_object(item, f"{field}[{i}]") if isinstance(item, str) and item.lstrip().startswith("{") else item
        for i, item in enumerate(value)
    ]


def check_arguments(given: Mapping[str, Any], field: str) -> None:
    """Refuse template arguments of names that have their meaning already."""
    taken = [name for name in _GIVEN if name in given]
    if taken:
        detail = f"names {', '.join(taken)}, which the data say; allowed are other arguments"
        raise MalformedRowError(field, "wrong_type", detail)


SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
_CONTEXT = ("tools", "documents", "chat_template_kwargs")
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def row_reading(
    layout: str | None,
    columns: Mapping[str, str],
    ignored: Iterable[str],
    *,
    place: str = "data",
    place_of_layout: str = "data",
    place_of_columns: str = "data",
) -> RowReading:
    """How settings want rows to be read; a place is where they stand, and where they can be set.

    Raises:
      ValueError: when there is no such layout, or two names stand for one column.
    """
    if layout is not None and layout not in LAYOUTS:
        setting = BY_COLUMNS._replace(place=place_of_layout).setting("layout")
        raise UserError(f"{setting} is {layout!r}; allowed are {', '.join(LAYOUTS)}")
    twice = [name for name, count in Counter(columns.values()).items() if count > 1]
    if twice:
        raise UserError(
            f"{place_of_columns}.columns names {twice[0]!r} twice; allowed is one name for a column"
        )
    return RowReading(
        layout, tuple(columns.items()), frozenset(ignored), place=place, place_of_columns=place_of_columns
    )
