"""Replies are from outside: what is no answer is refused by name, within bytes and seconds."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from dpo.judging import replies
from dpo.judging.replies import (
    Completion,
    MalformedReplyError,
    decompress,
    parse_completion,
    read_kept,
    server_message,
)


def completion(content: object = "[[A]]", **usage: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()


def test_an_answer_with_its_counts() -> None:
    assert parse_completion(completion("[[A]]", prompt_tokens=7, completion_tokens=2.0)) == Completion(
        "[[A]]", 7, 2
    )
    assert parse_completion(completion(None, prompt_tokens=None)) == Completion("", 0, 0)
    cut = completion().replace(b'"message"', b'"finish_reason": "length", "message"')
    assert parse_completion(cut).is_cut
    for other in (b"\xef\xbb\xbf" + completion(), completion().decode().encode("utf-16")):
        assert parse_completion(other).answer == "[[A]]"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (completion("\ud800"), "half a character"),
        (completion(completion_tokens=-5), r"usage\.completion_tokens is -5; allowed is a count"),
        (completion(prompt_tokens=7).replace(b"7", b"1e999"), "usage.prompt_tokens is inf"),
        (completion(prompt_tokens=7).replace(b"7", b"NaN"), "usage.prompt_tokens is nan"),
        (completion(prompt_tokens=10**400), "usage.prompt_tokens is 1000"),
        (completion(prompt_tokens=1.5), "usage.prompt_tokens is 1.5"),
        (completion(prompt_tokens=True), "usage.prompt_tokens is True"),
        (completion(prompt_tokens="7"), "usage.prompt_tokens is '7'"),
        (completion().replace(b"{}", b"[1]"), "usage is no object"),
        (b'{"choices": [{"message": {"content": "[[A]]", "content": "[[B]]"}}]}', "has 'content' twice"),
        (b"\xff\xfe\x00[", "not a chat completion"),
        (b"[" * 100_000, "not a chat completion"),
        (b'{"a":' * 100_000, "not a chat completion"),
        (b'{"choices": {"message": 1}}', "not a chat completion"),
        (b'{"choices": [{"message": "x"}]}', "not a chat completion"),
        (b"\xff\xfe\x00", "not a chat completion"),
        (b"9" * 10_000, "not a chat completion"),
        (b"", "not a chat completion: ''"),
    ],
)
def test_what_is_no_answer_is_named(content: bytes, problem: str) -> None:
    with pytest.raises(MalformedReplyError, match=problem) as caught:
        parse_completion(content)
    assert len(str(caught.value)) < 700
    str(caught.value).encode("utf-8")


def test_compression_is_undone_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_BYTES", 1000)
    assert decompress(b"plain", "") == decompress(b"plain", "identity") == b"plain"
    assert decompress(gzip.compress(b"x" * 1000), "gzip") == decompress(zlib.compress(b"x" * 1000), "deflate")
    for content, encoding, problem in (
        (gzip.compress(b"x" * 1001), "gzip", "more than 1000 bytes when decompressed"),
        (gzip.compress(b"x" * 10**8), "gzip", "more than 1000 bytes when decompressed"),
        (b"junk", "gzip", "not gzip although it says so"),
        (gzip.compress(b"x" * 900)[:-9], "gzip", "ends in the middle"),
        (b"x", "br", "Content-Encoding 'br', which was not asked for"),
        (b"x", "gzip, gzip", "which was not asked for"),
    ):
        with pytest.raises(MalformedReplyError, match=problem):
            decompress(content, encoding)


def test_the_servers_own_message_is_found_and_short() -> None:
    assert server_message(b'{"error": {"message": "no such model"}}') == "no such model"
    assert server_message(b'{"error": "busy"}') == "busy"
    assert server_message(b'{"detail": "wrong"}') == "wrong"
    assert server_message(b"\xff" * 10_000) == "\N{REPLACEMENT CHARACTER}" * 300
    assert server_message(b'{"message": "\\ud800"}') == "?"


def test_a_kept_reply_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "reply.json"
    good: dict[str, Any] = {"answer": "[[A]]", "prompt_tokens": 1, "completion_tokens": 2}
    path.write_text(json.dumps(good))
    assert read_kept(path) == Completion(**good)
    path.write_text(json.dumps({**good, "is_cut": True}))
    assert read_kept(path) == Completion(**good, is_cut=True)
    for bad in (
        {**good, "is_cut": 1},
        {**good, "answer": 5},
        {**good, "prompt_tokens": -1},
        {**good, "more": 1},
        {"answer": "x"},
        [],
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="delete it, and the judge is asked again"):
            read_kept(path)
