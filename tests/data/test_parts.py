"""Data read in parts is the data read at once. The processes are threads that meet at every exchange."""

import gzip
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toy_tokenizer import make_tokenizer

from dpo.data import sources
from dpo.data.parts import Peers, read_together, tokenize_together
from dpo.data.preferences import read_part, read_preferences
from dpo.data.sources import Part, cut
from dpo.data.tokenization import tokenize, tokenize_part

POLICIES = {"max_length": 60, "truncation": "drop", "end_token": "template", "chat_template": None}
POLICIES |= {"template_date": "2024-07-26"}


class Exchange:
    """What `dpo.parallel.distributed` does between processes, between threads."""

    def __init__(self, count):
        self._meet = threading.Barrier(count, timeout=30)
        self._found: list = [None] * count

    def peers(self, index):
        return Peers(
            index,
            len(self._found),
            lambda function: json.loads(
                self._swap(index, lambda: json.dumps(function()).encode() if index == 0 else b"")[0]
            ),
            lambda function: self._swap(index, function),
        )

    def _swap(self, index, function):
        try:
            self._found[index] = function()
        except ValueError as error:
            self._found[index] = error
        self._meet.wait()
        found = list(self._found)
        self._meet.wait()
        for answer in found:
            if isinstance(answer, ValueError):
                raise ValueError(str(answer))
        return found


def together(count, body) -> list:
    """What `body(peers)` gives in each of so many processes, or the text of what it raises."""
    exchange = Exchange(count)

    def run(index):
        try:
            return body(exchange.peers(index))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def read_and_tokenize(source, *, tokenizer, limit=None, on_error="skip", expand="ranking", **policies):
    """At once, and as the body of `together`."""
    reading = {"split": "train", "on_error": on_error, "limit": limit, "expand": expand}
    policies = POLICIES | policies

    def at_once():
        read = read_preferences(source, **reading)
        return read, [p.location for p in read.preferences], tokenize(read.preferences, tokenizer, **policies)

    def in_parts(peers):
        read, locations = read_together(str(source), **reading, peers=peers)
        own = lambda: tokenize_part(read.preferences, tokenizer, **policies)  # noqa: E731
        return read, locations, tokenize_together(own, peers)

    return at_once, in_parts


def assert_same(results, whole):
    read, locations, tokens = whole
    assert [p for own, _, _ in results for p in own.preferences] == read.preferences
    for own, where, part in results:
        assert own[1:] == read[1:]
        assert list(own.skipped) == list(read.skipped)
        assert where == locations
        for name, value in vars(tokens).items():
            mine = getattr(part, name)
            if isinstance(value, np.ndarray):
                assert mine.dtype == value.dtype, name
                np.testing.assert_array_equal(mine, value, err_msg=name)
            else:
                assert mine == value, name
        assert list(part.dropped) == list(tokens.dropped)


def pair(i, *, length=3):
    return json.dumps({"prompt": f"number {i} " + "é" * length, "chosen": "yes", "rejected": "no"}).encode()


def ranking(i):
    rows = {"prompt": f"n {i}", "responses": ["a", "b", "c"], "ranks": [1, 1, 2], "scores": [2.0, 2, i]}
    return json.dumps(rows).encode()


LINES = {
    "pair": pair,
    "ranking": ranking,
    "too long": lambda i: pair(i, length=50),
    "blank": lambda i: b" \t" * (i % 2),
    "no JSON": lambda i: b"{" * (i + 1),
    "malformed": lambda i: b'{"prompt": "x", "chosen": "", "rejected": "b"}',
    "no UTF-8": lambda i: b"\xff",
}


def write(path, kinds, newline=b"\n", end=b"\n"):
    content = newline.join(LINES[kind](i) for i, kind in enumerate(kinds)) + end
    path.write_bytes(content)
    return path


@given(
    st.lists(st.sampled_from(list(LINES)), max_size=14),
    st.integers(1, 5),
    st.none() | st.integers(1, 9),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.sampled_from([b"", b"\n", b"\r\n\r\n"]),
    st.sampled_from(["ranking", "all_pairs"]),
)
@example(["ranking", "no JSON"], 3, None, b"\n", b"", "all_pairs")
def test_parts_of_any_file_are_the_file(tmp_path_factory, kinds, count, limit, newline, end, expand):
    path = write(tmp_path_factory.getbasetemp() / "rows.jsonl", ["pair", *kinds], newline, end)
    at_once, in_parts = read_and_tokenize(path, tokenizer=make_tokenizer(), limit=limit, expand=expand)
    assert_same(together(count, in_parts), at_once())


@pytest.mark.parametrize(
    "name", ["rows.jsonl.gz", "rows.json", "list.json", "rows.parquet", "rows.csv", "saved"]
)
def test_every_kind_of_source_can_be_cut(name, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(11)]
    path = tmp_path / name
    if name == "list.json":
        path.write_text(json.dumps(rows))
    elif name == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    elif name == "rows.csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        lines = b"\n".join(json.dumps(row).encode() for row in rows)
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    whole = read_preferences(path).preferences
    for count, limit in ((1, None), (3, None), (4, 9), (12, None)):
        parts = cut(str(path), "train", count=count, limit=limit)
        sizes = [part.rows or 0 for part in parts]
        assert sum(sizes) == (limit or 11)
        assert max(sizes) - min(sizes) <= 1
        read = [read_part(str(path), "train", part, "ranking").preferences for part in parts]
        assert [preference for part in read for preference in part] == whole[:limit]


def test_a_row_is_decoded_and_tokenised_by_one_process_only(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ["pair", "blank"] * 10)
    decoded = Counter()
    monkeypatch.setattr(sources, "_decode_json", lambda line: decoded.update([line]) or json.loads(line))
    _, in_parts = read_and_tokenize(path, tokenizer=make_tokenizer())
    parts = together(4, in_parts)
    assert [len(read.preferences) for read, _, _ in parts] == [2, 3, 2, 3]
    # all once more, as what the first 64 say together is found out; the first again, for its layout
    assert sorted(decoded.values()) == [2] * 9 + [3]


@pytest.mark.parametrize(
    ("kinds", "settings"),
    [
        (["pair"] * 5 + ["malformed"], {"on_error": "stop"}),
        (["no JSON"] * 30 + ["pair"] * 5 + ["malformed"] * 3, {"on_error": "stop"}),
        (["malformed", "blank", "no UTF-8"], {}),
        (["too long"] * 3, {}),
        (["pair", "pair", "too long", "too long"], {"truncation": "error"}),
    ],
)
def test_an_error_is_that_of_one_process_and_ends_all(kinds, settings, tmp_path):
    path = write(tmp_path / "rows.jsonl", kinds)
    at_once, in_parts = read_and_tokenize(path, tokenizer=make_tokenizer(), **settings)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        at_once()
    assert together(3, in_parts) == [str(error.value)] * 3


def test_an_error_in_one_part_only_ends_all(tmp_path):
    path = write(tmp_path / "rows.jsonl", ["pair", "pair"])
    path.write_bytes(path.read_bytes() + b"x" * 20 + b"\n")
    _, in_parts = read_and_tokenize(path, tokenizer=make_tokenizer(), on_error="stop")
    errors = together(2, in_parts)
    assert errors[0] == errors[1]
    assert f"{path}:3: field '(row)'" in errors[0]


def test_a_file_that_is_not_the_one_that_was_cut_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ["pair"] * 4)
    part = cut(str(path), "train", count=2)[1]
    write(path, ["pair"] * 5)
    with pytest.raises(ValueError, match=r"\d+ bytes in this process and \d+ in process 0"):
        read_part(str(path), "train", part, "ranking")
    assert read_part(str(path), "train", Part(), "ranking").num_rows == 5


def test_rows_that_are_one_and_responses_of_several_turns_are_the_same_in_parts(tmp_path):
    """Rated rows of one prompt are read by one process; flags of scored tokens may be in one part alone."""
    rated = [{"prompt": f"p{i // 2}", "response": "ab"[i % 2], "helpfulness": i} for i in range(8)]
    turns = [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate("xyz")]
    pairs = [
        {"prompt": f"p{i}", "chosen": turns if i == 5 else "a", "rejected": "b", "id": i} for i in range(6)
    ]
    for name, rows in (("rated", rated), ("pairs", pairs)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        at_once, in_parts = read_and_tokenize(path, tokenizer=make_tokenizer())
        whole = at_once()
        assert_same(together(3, in_parts), whole)
        assert (whole[2].scored is None) is (name == "rated")
