"""Tokens that are made in chunks and opened from disk are those of the whole at once, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizer import make_tokenizer

from dpo.data import chunks, parts, prepared, sources, token_processes
from dpo.data.chunks import TokenJob
from dpo.data.columns import BY_COLUMNS, RowReading
from dpo.data.expansion import Expand
from dpo.data.preferences import OnError, digest, fingerprint, read_preferences
from dpo.data.prepared import Store, prepare
from dpo.data.sources import Part
from dpo.data.tokenization import tokenize
from dpo.outcomes import EnvironmentFailure

POLICIES = {"max_length": 60, "truncation": "drop", "end_token": "template", "chat_template": None}
POLICIES |= {"template_date": "2024-07-26", "template_kwargs": {}}


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def pairs(count, **others):
    return [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}", **others} for i in range(count)]


class Preparation:
    """`prepare` with a store of its own, and what it said."""

    def __init__(self, directory, *, limit=10**9, **policies):
        self.store, self.said = Store(directory, limit), []
        self.policies = POLICIES | policies

    def __call__(
        self,
        source,
        *,
        kept=True,
        on_error: OnError = "stop",
        rows=None,
        expand: Expand = "ranking",
        reading=BY_COLUMNS,
    ):
        job = TokenJob(str(source), "train", expand, reading, make_tokenizer(), self.policies)
        return prepare(
            job,
            on_error=on_error,
            limit=rows,
            store=self.store if kept else None,
            log=self.said.append,
        )

    def directories(self, ending=""):
        return [p for p in self.store.directory.iterdir() if p.is_dir() and p.suffix == ending]


@pytest.fixture
def preparation(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "CHUNK_ROWS", 3)
    monkeypatch.setattr(prepared, "count_processes", lambda _: 1)
    return Preparation(tmp_path / "tokens")


def assert_same(
    found,
    source,
    *,
    on_error: OnError = "stop",
    rows=None,
    expand: Expand = "ranking",
    reading=BY_COLUMNS,
    **policies,
):
    read = read_preferences(source, on_error=on_error, limit=rows, expand=expand, reading=reading)
    tokens = tokenize(read.preferences, make_tokenizer(), **(POLICIES | policies))
    assert found.summary == read.summary
    assert list(found.summary.skipped) == list(read.skipped)
    assert list(found.locations) == [preference.location for preference in read.preferences]
    assert found.content == fingerprint(map(digest, read.preferences))
    for name, value in vars(tokens).items():
        mine = getattr(found.tokens, name)
        if isinstance(value, np.ndarray):
            assert mine.dtype == value.dtype, name
            np.testing.assert_array_equal(mine, value)
        else:
            assert mine == value, name


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


texts = st.text("abc ", min_size=1, max_size=40).filter(str.strip)
row = st.one_of(
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
    st.fixed_dictionaries({"prompt": texts, "responses": st.lists(texts, min_size=2, max_size=3)}).map(
        lambda r: r | {"scores": [float(i % 2) for i in range(len(r["responses"]))]}
    ),
    st.fixed_dictionaries({"prompt": texts, "completion": texts, "label": st.booleans()}),
    st.just({"prompt": "?"}),
)


@pytest.mark.ci
@given(st.lists(row, min_size=1, max_size=12), st.sampled_from(["ranking", "all_pairs"]), st.integers(1, 4))
def test_what_is_kept_is_what_is_made_at_once(tmp_path_factory, rows, expand, size):
    folder = tmp_path_factory.mktemp("rows")
    source = write_rows(folder / "rows.jsonl", rows)
    preparation = Preparation(folder / "tokens")
    how = {"on_error": "skip", "expand": expand}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "CHUNK_ROWS", size)
        patch.setattr(prepared, "count_processes", lambda _: 1)
        refused = refusal(lambda: tokenize(read_preferences(source, **how)[0], make_tokenizer(), **POLICIES))
        for kept in (False, True, True):
            if refused is None:
                assert_same(preparation(source, kept=kept, **how), source, **how)
            else:
                assert refusal(lambda kept=kept: preparation(source, kept=kept, **how)) == refused


def test_the_second_start_opens_what_the_first_has_made(tmp_path, preparation, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", pairs(8))
    preparation(source)
    (directory,) = preparation.directories()
    assert not preparation.directories(".chunks")
    monkeypatch.setattr(chunks, "tokenize_part", lambda *_, **__: pytest.fail("made again"))
    found = preparation(source)
    assert_same(found, source)
    assert found.tokens.prompt_tokens.base is not None, "mapped, not read"
    assert {path.suffix for path in directory.iterdir()} == {".npy", ".json", ""}


@pytest.mark.parametrize(
    "change",
    [
        lambda source, p: write_rows(source, [*pairs(7), {"prompt": "q", "chosen": "a", "rejected": "b"}]),
        lambda source, p: p.policies.update(max_length=50),
        lambda source, p: p.policies.update(template_kwargs={"thinking": False}),
        lambda source, p: p.policies.update(end_token="none"),
    ],
)
def test_what_determines_tokens_is_part_of_the_fingerprint(tmp_path, preparation, change):
    source = write_rows(tmp_path / "rows.jsonl", pairs(8))
    preparation(source)
    change(source, preparation)
    assert_same(preparation(source), source, **preparation.policies)
    assert len(preparation.directories()) == 2


def test_a_slow_tokenizer_is_said_and_keeps_nothing(tmp_path, preparation, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", pairs(4))
    monkeypatch.setattr(prepared, "rules_of", lambda _: None)
    assert_same(preparation(source), source)
    (said,) = preparation.said
    assert "is no tokenizer with a tokenizer.json" in said
    assert not preparation.store.directory.exists()
    preparation.said.clear()
    preparation(source, kept=False)
    assert not preparation.said, "nothing is wanted to be kept"


def test_other_code_makes_them_anew(tmp_path, preparation, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", pairs(2))
    preparation(source)
    monkeypatch.setattr(prepared, "_fingerprint_code", lambda: "other")
    preparation(source)
    assert len(preparation.directories()) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "list"])
def test_damage_is_said_and_mended(tmp_path, preparation, damage):
    source = write_rows(tmp_path / "rows.jsonl", pairs(8))
    preparation(source)
    (directory,) = preparation.directories()
    file = directory / ("SHA256SUMS" if damage == "list" else "response_tokens.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "bit" else data[:-4])
    assert_same(preparation(source), source)
    assert "damaged" in preparation.said[0]
    assert str(directory) in preparation.said[0]
    preparation.said.clear()
    assert_same(preparation(source), source)
    assert not preparation.said


def test_an_interrupted_preparation_goes_on(tmp_path, preparation, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", pairs(20))
    real, made = chunks.tokenize_part, []

    def stops(preferences, *rest, **policies):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(len(preferences))
        return real(preferences, *rest, **policies)

    monkeypatch.setattr(chunks, "tokenize_part", stops)
    with pytest.raises(KeyboardInterrupt):
        preparation(source)
    (left,) = preparation.directories(".chunks")
    damaged, *_ = sorted(left.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made[:] = [-2]  # four more may be made, of which one is the damaged one
    monkeypatch.setattr(chunks, "tokenize_part", lambda *a, **k: made.append(1) or real(*a, **k))
    assert_same(preparation(source), source)
    assert len(made) - 1 == 7 - 3 + 1
    assert any("going on after 6 of 20 rows" in line for line in preparation.said)
    assert any("is damaged: it is made anew" in line for line in preparation.said)
    assert not preparation.directories(".chunks")


def test_errors_are_those_of_the_whole(tmp_path, preparation):
    rows = pairs(30)
    rows[25] = {"prompt": "q", "chosen": ""}
    rows[27] = {"prompt": 3, "chosen": "a", "rejected": "b"}
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="2 of 30 rows are malformed") as raised:
        preparation(source)
    assert f"{source}:26: field" in str(raised.value)
    assert f"{source}:28: field" in str(raised.value)
    assert_same(preparation(source, on_error="skip"), source, on_error="skip")
    assert not preparation.directories(".chunks")
    preparation.policies["truncation"], preparation.policies["max_length"] = "error", 12
    with pytest.raises(ValueError, match="are longer than max_length 12"):
        preparation(source, on_error="skip")


def test_one_prepares_and_the_others_wait(tmp_path, preparation, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", pairs(8))
    real, made = chunks.tokenize_part, []

    def slow(*rest, **policies):
        made.append(1)
        time.sleep(0.05)
        return real(*rest, **policies)

    monkeypatch.setattr(chunks, "tokenize_part", slow)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: preparation(source), range(2)):
            assert_same(found, source)
    assert len(made) == 3
    assert any("waiting for it" in line for line in preparation.said)


def test_above_the_limit_the_oldest_goes(tmp_path):
    preparation = Preparation(tmp_path / "tokens", limit=1)
    first, second = (write_rows(tmp_path / f"{name}.jsonl", pairs(4)) for name in "ab")
    preparation(first)
    (old,) = preparation.directories()
    assert_same(preparation(second), second)
    assert old not in preparation.directories()
    assert len(preparation.directories()) == 1
    assert "data.token_store_limit" in preparation.said[-1]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    source = write_rows(tmp_path / "rows.jsonl", pairs(4))
    with pytest.raises(OSError, match=r"data\.token_store"):
        Preparation(blocked)(source)


def test_neighbours_that_belong_together_are_one_chunk(tmp_path, preparation):
    rows = [{"prompt": f"q{i // 2}", "response": f"a{i}", "helpfulness": i % 2} for i in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert_same(preparation(source), source)


def test_neighbours_that_belong_together_are_in_memory_up_to_a_limit(tmp_path, preparation, monkeypatch):
    """A small gzip file may hold any number of them."""
    rows = [{"prompt": f"q{i // 2}", "response": f"a{i}", "helpfulness": i % 2} for i in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(sources, "MAX_WHOLE_BYTES", source.stat().st_size // 2)

    def together(path):
        how = {"split": "train", "on_error": "stop", "limit": None, "expand": "ranking"}
        return parts.read_together(str(path), **how, peers=parts.ALONE)

    for read in (preparation, together):
        with pytest.raises(
            ValueError, match=r"rows\.jsonl: more than \d+ bytes of rows in memory.* several files"
        ):
            read(source)


def test_a_data_set_is_known_by_its_values(tmp_path, preparation):
    import datasets

    table = datasets.Dataset.from_list(pairs(8))
    table.save_to_disk(tmp_path / "saved")
    assert_same(preparation(tmp_path / "saved"), tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    table.select([*range(7), 0]).save_to_disk(tmp_path / "saved")
    assert_same(preparation(tmp_path / "saved"), tmp_path / "saved")
    assert len(preparation.directories()) == 2


@pytest.fixture
def in_two_processes(preparation, monkeypatch):
    monkeypatch.setattr(prepared, "count_processes", lambda _: 2)
    return preparation


def test_several_processes_make_what_one_makes(tmp_path, in_two_processes, monkeypatch):
    here = []
    real = chunks.tokenize_part
    monkeypatch.setattr(chunks, "tokenize_part", lambda *a, **k: here.append(1) or real(*a, **k))
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(25), {"prompt": "?"}])
    reading = RowReading("pair", (("prompt", "prompt"),), frozenset({"images"}))
    found = in_two_processes(source, on_error="skip", reading=reading)
    assert not here, "made in the other processes"
    assert_same(found, source, on_error="skip", reading=reading)


@pytest.mark.ci
def test_errors_of_several_processes_are_those_of_one(tmp_path, in_two_processes):
    rows = pairs(30)
    rows[4]["rejected"] = rows[20]["rejected"] = "no" * 30
    rows[25] = {"prompt": "q", "chosen": ""}
    source = write_rows(tmp_path / "rows.jsonl", rows)
    refused = refusal(lambda: read_preferences(source))
    assert refused is not None
    assert refusal(lambda: in_two_processes(source)) == refused
    long = "{% if messages[0]['content'] in ('q13', 'q7') %}{{ 'x' * 10 ** 7 }}{% endif %}"
    in_two_processes.policies["chat_template"] = long
    policies = in_two_processes.policies
    whole = refusal(
        lambda: tokenize(read_preferences(source, on_error="skip")[0], make_tokenizer(), **policies)
    )
    assert whole is not None
    assert refusal(lambda: in_two_processes(source, on_error="skip")) == whole


def test_the_processes_run_no_code_of_the_working_directory(tmp_path, in_two_processes, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", pairs(25))
    for name in ("json", "numpy", "dpo", "zstandard"):
        (tmp_path / f"{name}.py").write_text("open('was_run', 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    in_two_processes(source)
    assert not (tmp_path / "was_run").exists()


def test_a_process_that_is_lost_is_said(tmp_path, in_two_processes, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    source = write_rows(tmp_path / "rows.jsonl", pairs(25))
    with pytest.raises(EnvironmentFailure, match="a process that makes tokens ended with code 1"):
        in_two_processes(source)


def test_whose_share_is_done_takes_over_half_of_the_largest():
    shares = token_processes._Shares([(number, Part()) for number in range(9)], 2)
    taken = [shares.take(index) for index in (0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0)]
    assert [one and one[0] for one in taken] == [0, 4, 5, 6, 7, 8, 2, 1, 3, None, None]


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", pairs(6000))
    code = f"""
import sys; sys.path[:0] = {[os.path.dirname(__file__)]!r}
import pathlib, test_prepared as t
from dpo.data import prepared
prepared.CHUNK_ROWS = 100
t.Preparation(pathlib.Path({str(tmp_path / "tokens")!r}))({str(source)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not list(tmp_path.glob("tokens/*.chunks/*.safetensors")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    preparation = Preparation(tmp_path / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "CHUNK_ROWS", 100)
        assert_same(preparation(source), source)
    assert any("going on after" in line for line in preparation.said)
