"""The columns of one row: renamed as the settings say, and with a note of which were read.

A column that a layout does not read is named to the user. One whose name says that it would change what is
learned (`MEANING`) may not go unread, unless what it says stands in the prompt anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.malformed import MalformedRowError
from dpo.data.values import as_object, is_empty, show_names

MEANING = frozenset(
    {
        "assistant_prefill",
        "assistant_prefix",
        "audio",
        "audios",
        "chat_history",
        "chat_template_kwargs",
        "context",
        "conversation_history",
        "developer_prompt",
        "documents",
        "functions",
        "history",
        "image",
        "images",
        "initial_reason_steps",
        "input",
        "instruction",
        "instructions",
        "passage",
        "passages",
        "prefill",
        "query",
        "question",
        "response_prefix",
        "sys_prompt",
        "system",
        "system_instruction",
        "system_message",
        "system_prompt",
        "tools",
        "video",
        "videos",
    }
)
"""Names of columns that, in the data sets that have them, say what a model is to answer to; in any case."""
_ASKS = MEANING | {
    "dialog",
    "dialogue",
    "message",
    "post",
    "problem",
    "request",
    "task",
    "text",
    "user",
    "user_input",
    "user_prompt",
}
"""Those that may be the prompt where a layout has found none."""
_PROMPTS = (_ASKS - MEANING) | {
    "context",
    "conversation",
    "conversations",
    "history",
    "input",
    "instruction",
    "messages",
    "prompt",
    "query",
    "question",
}
"""Those in which a row says so by saying nothing that its prompt is not there."""


def has_meaning(name: str, reading: RowReading) -> bool:
    """Whether a column's name says that it changes what is learned; in an object, of which a part is read
    (`question.system` beside `question.text`), the last of it.
    """
    column, _, inside = name.partition(".")
    is_opened = any(theirs.startswith(f"{column}.") for _, theirs in reading.columns)
    return _plain_name(inside if is_opened and inside else name) in MEANING


def may_ask(name: str, value: Any) -> bool:
    """Whether a column could be the prompt of a row: by its name, or because it holds more than a word."""
    if isinstance(value, str):
        return _plain_name(name) in _ASKS or len(value.split()) > 1
    return isinstance(value, list) and all(isinstance(item, Mapping) and len(item) > 1 for item in value)


def _plain_name(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


class RowReading(NamedTuple):
    """How the rows of a source are to be read."""

    layout: str | None = None
    """Name of their layout; recognised by each row's columns when not given."""
    columns: tuple[tuple[str, str], ...] = ()
    """Names that a layout reads, each with the name that the source has instead."""
    ignored: frozenset[str] = frozenset()
    """Columns that are not read, although their names may be in `MEANING`."""
    counts_from: int | None = None
    """The number of the first of two responses whose columns do not say it; not known when not given."""
    repeats: bool = False
    """Whether responses that are text begin with their prompt, which is cut off there."""
    place: str = "data"
    """Where settings for this source stand: data, or of one in a list its place, such as data.train[1]."""
    place_of_columns: str = "data"
    """Where the names in `columns` stand: there, or in a list at data for every source that has none."""

    def setting(self, name: str) -> str:
        """A setting for this source as the user can write it, by its name in a list of sources."""
        return f"{self.place}.{'row_layout' if (self.place, name) == ('data', 'layout') else name}"

    def as_json(self) -> list[Any]:
        """What another process makes the same of, by `from_json`."""
        return [self.layout, self.columns, sorted(self.ignored), *self[3:]]

    @classmethod
    def from_json(cls, given: Sequence[Any]) -> RowReading:
        """The reading of which `as_json` made a list that went through JSON."""
        layout, columns, ignored, *settled = given
        return cls(layout, tuple(map(tuple, columns)), frozenset(ignored), *settled)


BY_COLUMNS = RowReading()
Values = dict[str, Any]
"""What stands in columns, by their names."""


class Columns(Values):
    """A row's columns that are not null, by the names that layouts know.

    Every row is asked for many names that it has not: a dictionary answers at once.
    """

    __slots__ = ("_ignored", "_read", "_row", "reading", "replaced")

    def __init__(self, row: Mapping[str, Any], reading: RowReading = BY_COLUMNS) -> None:
        values = {str(name): value for name, value in row.items() if value is not None}
        super().__init__(_rename(row, values, reading) if reading.columns else values)
        self.replaced = _replaced(values, reading)
        """What else of a row is not used, as it is named to the user: columns for which others are read."""
        self._row, self.reading = row, reading
        self._ignored = {name: self.pop(name) for name in reading.ignored if name in self}
        self._read: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self._read.append(name)
        return _VALUE(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a column, or None."""
        return self[name] if name in self else default  # noqa: SIM401 (it is noted that it was read)

    def find(self, *names: str) -> str | None:
        """The first of these columns that the row has."""
        return next((name for name in names if name in self), None)

    def was_read(self, name: str) -> bool:
        """Whether somebody has read the column."""
        return name in self._read

    @property
    def empty_prompt(self) -> tuple[str, Any] | None:
        """A column that the prompt would stand in, which is empty or null, unless it is not to be read."""
        moved = {theirs: ours for ours, theirs in self.reading.columns}
        whole = {str(name): value for name, value in self._row.items()}
        whole |= {name: _at(whole, name) for name in moved if "." in name and name not in whole}
        for name, value in whole.items():
            ours = moved.get(name, name)
            if is_empty(value) and ours not in self.reading.ignored and _plain_name(ours) in _PROMPTS:
                return name, value
        return None

    def item(self, value: Mapping[str, Any]) -> Values:
        """An object in a column, with the names that layouts know."""
        given = {ours: _find(value, theirs) for ours, theirs in self.reading.columns}
        return dict(value) | {name: found for name, found in given.items() if found is not _NOT_THERE}

    def asked(self) -> Values:
        """The columns that nobody has read and that are not ignored, and their values."""
        return {name: _VALUE(self, name) for name in self.keys() - self._read}

    def unread(self) -> Values:
        """The columns that nobody has read, and their values."""
        unread = {name: _VALUE(self, name) for name in self.keys() - self._read}
        return unread | self._ignored if self._ignored else unread


_VALUE = Values.__getitem__


def _rename(row: Mapping[str, Any], values: Values, reading: RowReading) -> Values:
    theirs = {their for _, their in reading.columns}
    inside = {their for their in theirs if their not in row and _at(values, their) is not _NOT_THERE}
    opened = {name.split(".")[0] for name in inside}
    renamed = {name: value for name, value in values.items() if name not in theirs | opened}
    renamed |= _rest(values, opened, inside)
    for ours, their in reading.columns:
        found = _at(values, their) if their in inside else values.get(their)
        if found is not None:
            renamed[ours] = found
        elif their not in row and their not in inside and not _is_in_items(their, values):
            raise _missing_column(ours, their, row, values, reading.place_of_columns)
    return renamed


def _rest(values: Mapping[str, Any], opened: set[str], inside: set[str]) -> Values:
    """What else stands in objects of which a part is read, under the names that say where."""
    objects = {name: as_object(values[name], name) or {} for name in sorted(opened)}
    named = {f"{name}.{key}": value for name, found in objects.items() for key, value in found.items()}
    read = {".".join(name.split(".")[:2]) for name in inside}
    return {name: value for name, value in named.items() if name not in read and value is not None}


_NOT_THERE = object()


def _at(values: Mapping[str, Any], name: str) -> Any:
    """What stands in the objects of a column, one in the other: `a.b` is b of the object in a."""
    first, *rest = name.split(".")
    found = values.get(first, _NOT_THERE) if rest else _NOT_THERE
    for i, key in enumerate(rest, start=1):
        given = as_object(found, ".".join([first, *rest][:i]))
        found = _NOT_THERE if given is None else given.get(key, _NOT_THERE)
    return found


def _find(values: Mapping[str, Any], name: str) -> Any:
    """A value by its own name, else as a part of an object; `_NOT_THERE` where it is neither."""
    return values[name] if name in values else _at(values, name)


def _missing_column(
    ours: str, their: str, row: Mapping[str, Any], values: Mapping[str, Any], place: str
) -> MalformedRowError:
    last = their.rpartition(".")[2]
    of_items = f"; of the objects in a list it is {last!r} alone" if _is_in_items(last, values) else ""
    detail = f"{place}.columns reads {ours!r} from it; found {show_names(row)}{of_items}"
    return MalformedRowError(their, "missing_column", detail)


def _replaced(values: Mapping[str, Any], reading: RowReading) -> tuple[str, ...]:
    moved = {their for _, their in reading.columns}
    return tuple(
        f"{ours} (for it {their} is read)"
        for ours, their in reading.columns
        if ours in values and their in values and ours not in moved
    )


def _is_in_items(name: str, values: Mapping[str, Any]) -> bool:
    """Whether objects in a column have a key of this name, or such a part."""
    lists = (value for value in values.values() if isinstance(value, list) and value)
    return any(isinstance(items[0], Mapping) and _find(items[0], name) is not _NOT_THERE for items in lists)
