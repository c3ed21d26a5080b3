"""JSON that a command left is of its type, or refused by field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from dpo.typed_json import MAX_DEPTH, Length, parse_typed, read_typed


class Inner(TypedDict):
    share: float | None
    interval: NotRequired[Annotated[list[float], Length(3)]]


class Other(TypedDict):
    kind: Literal["other"]


class Outer(TypedDict):
    count: int
    rows: dict[str, Inner | Other]
    anything: Any


GOOD = {
    "count": 3,
    "rows": {"a": {"share": 1, "interval": [1, 0.5, 2]}, "b": {"kind": "other"}},
    "anything": [{}],
}


def test_what_is_of_its_type_is_read_and_further_names_are_left_aside():
    given = GOOD | {"of a later version": 1}
    assert parse_typed(json.dumps(given).encode(), Outer) == given


@pytest.mark.parametrize(
    ("change", "says"),
    {
        "a list": ([1], r"what it holds is \[1\]; allowed is an object"),
        "null": ({"count": None}, "count is None; allowed is a whole number"),
        "a truth": ({"count": True}, "count is True"),
        "a half": ({"count": 1.5}, "count is 1.5"),
        "too many digits": ({"count": 10**400}, r"count is 1000.*…; allowed is a whole number"),
        "a number beyond floats": ({"rows": {"a": {"share": 10**400}}}, "rows.a.share is 1000"),
        "a text": ({"rows": {"a": {"share": "1"}}}, "rows.a.share is '1'; allowed is a number or null"),
        "another length": (
            {"rows": {"a": {"share": 1, "interval": [1]}}},
            "rows.a.interval has 1 values; allowed are 3",
        ),
        "nothing there": ({"rows": {"a": {}}}, "rows.a.share is not there"),
        "another word": ({"rows": {"a": {"kind": "x"}}}, "kind is 'x'; allowed is 'other'"),
        "a list of objects": ({"rows": [{}]}, r"rows is \[{}\]; allowed is an object"),
        "many lists": (
            {"anything": json.loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))},
            f"more than {MAX_DEPTH} lists and objects",
        ),
    }.values(),
)  # fmt: skip
def test_what_is_of_another_type_is_refused_by_field(change, says):
    given = GOOD | change if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=says):
        parse_typed(json.dumps(given).encode(), Outer)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *((content, "not valid JSON") for content in (b"{", b"\xe9", b"[" * 100_000, b"9" * 5000)),
        (b"\xff\xfe", "its first bytes are those of UTF-16"),
    ],
)
def test_what_is_no_json_is_refused(content, says, tmp_path):
    path = tmp_path / "figures.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"figures\.json is damaged: {says}.*; delete it"):
        read_typed(path, dict, remedy="; delete it")


def test_a_pipe_is_refused_unread(tmp_path: Path):
    os.mkfifo(tmp_path / "figures.json")
    with pytest.raises(ValueError, match=r"figures\.json is damaged: must be a regular file"):
        read_typed(tmp_path / "figures.json", dict)


def test_what_an_earlier_version_did_not_write_may_be_missing():
    assert parse_typed(b'{"count": 1}', Outer, whole=False) == {"count": 1}
    with pytest.raises(ValueError, match="count is 'x'"):
        parse_typed(b'{"count": "x"}', Outer, whole=False)
