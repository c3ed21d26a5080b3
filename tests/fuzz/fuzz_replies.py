"""What a judge's endpoint may send: how it says that it compressed it (a first line), and the content."""

from __future__ import annotations

import gzip
import json
import zlib

from dpo.judging.answers import read_answer
from dpo.judging.keys import Key
from dpo.judging.replies import (
    MalformedReplyError,
    decompress,
    parse_completion,
    seconds_asked_for,
    server_message,
)

KEY = Key("sk-0123456789", "KEY")


def _completion(content: object, usage: object) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return json.dumps({"id": "1", "choices": [choice], "usage": usage}).encode()


COMPLETIONS = [
    _completion("Good. [[A]]", {"prompt_tokens": 7, "completion_tokens": 2}),
    _completion("<think>[[A]]</think>\n[[B]]", {"prompt_tokens": 7.0, "total_tokens": 9}),
    _completion(None, None),
    json.dumps({"choices": [{"message": {"content": "é [[C]]"}}]}, ensure_ascii=False).encode(),
]
SEEDS = [b"\n" + one for one in COMPLETIONS]
SEEDS += [b"gzip\n" + gzip.compress(COMPLETIONS[0]), b"deflate\n" + zlib.compress(COMPLETIONS[1])]
WORDS = [b"gzip", b"deflate", b"br", b"choices", b"message", b"content", b"usage", b"prompt_tokens"]
WORDS += [
    b"error",
    b"[[A]]",
    b"[[B]]",
    b"<think>",
    b"</think>",
    b"null",
    b"true",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
]
WORDS += [KEY.value.encode() if KEY.value else b"", b"Fri, 27 Nov 2026 10:00:00 GMT", b"3600", b"[" * 3000]
WORDS += [b"{", b"}", b"[", b"]"]


def reply(data: bytes) -> object:
    """As the judge reads it: headers, the message of an error, and the completion with its verdict."""
    said, _, content = data.partition(b"\n")
    header = said.decode("latin-1")
    seconds_asked_for({"Retry-After": header})
    KEY.cut_from(server_message(content)).encode("utf-8")
    completion = parse_completion(decompress(content, header))
    assert completion.prompt_tokens >= 0
    answer = KEY.cut_from(completion.answer)
    assert "sk-0123456789" not in answer
    answer.encode("utf-8")
    return read_answer(answer, is_cut=completion.is_cut), completion.prompt_tokens > 0


def is_malformed(error: BaseException) -> bool:
    """How a reply is declared to be refused."""
    return isinstance(error, MalformedReplyError)
