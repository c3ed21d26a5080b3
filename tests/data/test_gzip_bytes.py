"""Rows of gzip files: members, padding, cut-off ends, and stretches that say nothing."""

from __future__ import annotations

import gzip
import io
import json
import time
import zlib

import pytest

from dpo.data.gzip_bytes import MOST_SILENT, GzipBytes
from dpo.data.sources import cut_every, read_rows
from dpo.outcomes import UserError

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
LINE = json.dumps(ROW).encode() + b"\n"
ENDLESS_NAME = b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"n" * 2 * MOST_SILENT
EMPTY_BLOCK = b"\0\0\0\xff\xff"


def stored(blocks: bytes) -> bytes:
    """A member of blocks of deflate as they are, and the end of it."""
    return gzip.compress(b"")[:10] + blocks + zlib.compress(LINE, wbits=-15) + bytes(8)


def test_members_with_zeros_between_and_behind_them_are_one_text(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    texts = [b"", b"one", bytes(300_000), b"", b"two\n" * 70_000, b""]
    path.write_bytes(b"".join(gzip.compress(text) + bytes(40_000) for text in texts))
    with gzip.open(path) as theirs, io.BufferedReader(GzipBytes(path)) as ours:
        assert ours.read() == theirs.read() == b"".join(texts)


def test_parts_begin_in_the_middle_of_it(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [ROW | {"prompt": str(i) * 1000} for i in range(700)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    parts = cut_every(str(path), "train", rows=300)
    assert [row for part in parts for _, row in read_rows(str(path), "train", part)] == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"") * 200_000 + gzip.compress(LINE), "hold no text"),
        (ENDLESS_NAME, "hold no text"),
        (stored(EMPTY_BLOCK * (MOST_SILENT // 4)), "hold no text"),
        (gzip.compress(LINE) + bytes(2 * MOST_SILENT), "hold no text"),
        (gzip.compress(LINE * 10_000)[:-9], "end is missing"),
        (gzip.compress(LINE)[:-1] + b"\xff", "incorrect length check"),
        (gzip.compress(LINE) + b"more", "incorrect header check"),
        (LINE, "incorrect header check"),
    ],
    ids=["members", "name", "blocks", "zeros", "cut", "sum", "rest", "text"],
)
def test_what_says_nothing_for_long_or_is_damaged_is_refused_by_file(tmp_path, content, said):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(UserError, match=rf"rows\.jsonl\.gz: cannot be read: .*{said}"):
        list(read_rows(str(path), "train", cut_every(str(path), "train", rows=2048)[0]))
    assert time.process_time() - start < 5
