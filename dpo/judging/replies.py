"""What an endpoint sends back, read with limits: it is from outside, and may be anything at all.

Every reply goes through `receive` (bytes and time) and `parse_completion` (content). What they do not take
they refuse by name with `MalformedReplyError`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import zlib
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx

from dpo.data.json_text import DECODER, DuplicateKeyError
from dpo.outcomes import UserError

MAX_BYTES = 4 * 2**20
"""Of one reply, both as it is sent and as it is decompressed."""
MAX_TOKENS = 10**9
"""No request has more: a larger count is no count."""
_SHOWN = 300
"""Characters of what a server says that are shown."""


class MalformedReplyError(Exception):
    """A reply that is no answer, and why."""


class Received(NamedTuple):
    """A reply as it came."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    """Decompressed."""


class Completion(NamedTuple):
    """What is kept of an answer."""

    answer: str
    prompt_tokens: int
    completion_tokens: int
    """Both counts are 0 where the server reports none."""
    is_cut: bool = False
    """Whether the server ended it at its longest (`finish_reason` is length)."""


async def receive(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], *, seconds: float
) -> Received:
    """Post a request and read the whole reply.

    Raises:
      TimeoutError: when it is not all there after so many seconds, however it was drawn out.
      MalformedReplyError: for one that is too large, or compressed in a way that was not asked for.
      httpx.TransportError: where the connection fails.
    """
    async with asyncio.timeout(seconds), client.stream("POST", url, json=body) as response:
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > MAX_BYTES:
                raise MalformedReplyError(f"a reply of more than {MAX_BYTES} bytes")
        encoding = response.headers.get("Content-Encoding", "")
        return Received(response.status_code, response.headers, decompress(bytes(content), encoding))


def decompress(content: bytes, encoding: str) -> bytes:
    """Content that a server compressed, although nothing of the kind was asked for.

    Raises:
      MalformedReplyError: where it is not what it says, or is too large.
    """
    if encoding.strip().lower() in ("", "identity"):
        return content
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        raise MalformedReplyError(f"a reply with Content-Encoding {encoding[:40]!r}, which was not asked for")
    reader = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever it is
    try:
        found = reader.decompress(content, MAX_BYTES + 1)
    except zlib.error as error:
        raise MalformedReplyError(f"a reply that is not {encoding} although it says so ({error})") from error
    if len(found) > MAX_BYTES:
        raise MalformedReplyError(f"a reply of more than {MAX_BYTES} bytes when decompressed")
    if not reader.eof:
        raise MalformedReplyError(f"a reply whose {encoding} ends in the middle")
    return found


def parse_completion(content: bytes) -> Completion:
    """The answer in a chat completion; raises `MalformedReplyError` for anything else."""
    try:
        value = DECODER.decode(content.decode(json.detect_encoding(content)))
    except DuplicateKeyError as error:
        raise MalformedReplyError(f"a reply that {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedReplyError(f"not a chat completion: {server_message(content)!r}") from error
    match value:
        case {"choices": [{"message": {"content": answer}} as choice, *_]}:
            is_cut = choice.get("finish_reason") == "length"
        case _:
            raise MalformedReplyError(f"not a chat completion: {server_message(content)!r}")
    usage = value.get("usage") or {}
    if not isinstance(usage, dict):
        raise MalformedReplyError(f"usage is no object: {_show(usage)}")
    if not isinstance(answer, str):
        answer = ""
    _require_text(answer)
    counts = [_count(usage.get(name), name) for name in ("prompt_tokens", "completion_tokens")]
    return Completion(answer, *counts, is_cut=is_cut)


def server_message(content: bytes) -> str:
    """What a server says of an error: the message in its JSON, or the text as it is, cut to a few lines."""
    text = content[: 8 * _SHOWN].decode("utf-8", "replace")
    try:
        match json.loads(content):
            case {"error": {"message": str(found)}} | {"error": str(found)} | {"message": str(found)}:
                text = found
            case {"detail": str(found)}:
                text = found
    except (ValueError, RecursionError):
        pass
    return text[:_SHOWN].encode("utf-8", "replace").decode()


def seconds_asked_for(headers: Mapping[str, str]) -> float:
    """The Retry-After header, a number of seconds or a date, as seconds from now; 0 where there is none."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - time.time())


def read_kept(path: Path) -> Completion:
    """A completion that `write_kept` wrote; raises `ValueError` with the way out for a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        answer = kept["answer"]
        is_cut = kept.get("is_cut", False)  # an earlier version did not keep it
        if not isinstance(answer, str) or {*kept, "is_cut"} != set(Completion._fields):
            raise MalformedReplyError("it has other fields")
        if not isinstance(is_cut, bool):
            raise MalformedReplyError("is_cut is neither true nor false")
        _require_text(answer)
        counts = [_count(kept[name], name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, LookupError, RecursionError, MalformedReplyError) as error:
        raise UserError(
            f"{path} is no kept reply ({error}); delete it, and the judge is asked again"
        ) from error
    return Completion(answer, *counts, is_cut=is_cut)


def _require_text(answer: str) -> None:
    try:
        answer.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedReplyError("the answer holds half a character (a lone surrogate)") from error


def _count(value: Any, name: str) -> int:
    if value is None:
        return 0
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not is_whole or not 0 <= value <= MAX_TOKENS:
        raise MalformedReplyError(f"usage.{name} is {_show(value)}; allowed is a count of tokens")
    return int(value)


def _show(value: Any) -> str:
    return ascii(value)[:60]
