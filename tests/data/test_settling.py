"""How rows are read where all rows together say it: what numbers count from, and prompts said twice."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.config import DataConfig
from dpo.config.commands import EvaluateConfig, heldout_settings
from dpo.config.run import Config
from dpo.data.columns import BY_COLUMNS, RowReading
from dpo.data.messages import answer_turns
from dpo.data.preferences import DataError, read_preferences
from dpo.data.settling import settle_rows
from dpo.training.places import places

ASK, A, B = "Name a river.", "The moon.", "The Nile."


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def battles(verdicts, names=("response_a", "response_b")):
    return [{"prompt": ASK, names[0]: A, names[1]: B, "winner": verdict} for verdict in verdicts]


def winners(read):
    firsts = {A: "a", B: "b"}
    return "".join("=" if p.ranks == (0, 0) else firsts[p.responses[0]] for p in read.preferences)


@pytest.mark.parametrize(
    ("verdicts", "won"),
    [
        ([1, 0, 1], "bab"),
        ([1, 2, 1], "aba"),
        (["1", "2", "tie"], "ab="),
        ([1.0, 0.0, 0.5], "ba="),
        (["tie", 1, 2], "=ab"),
        (["a", "model_b", "tie"], "ab="),
    ],
)
def test_all_verdicts_together_say_what_numbers_count_from(tmp_path, verdicts, won):
    assert winners(read_preferences(write(tmp_path, battles(verdicts)))) == won


@pytest.mark.parametrize(
    ("verdicts", "says"),
    [
        ([1, 1, 1], r"the rows do not say whether response_a is 0 or 1.*response_0: response_a.*response_2"),
        ([0, 1, 2], "found 2, where response_a is 0"),
        ([2, 1, 0], "found 0, where response_a is 1"),
        ([0, 1, -1], "found -1, where response_a is 0"),
        (["a", 1, "b"], "found 1, and the rows do not say"),
        (["a", 0, 1], "found 0, and the rows do not say"),
        ([0] * 30 + ["maybe"] * 25 + [3], "found 3, where"),
    ],
)
def test_numbers_that_do_not_fit_are_never_skipped(tmp_path, verdicts, says):
    path = write(tmp_path, battles(verdicts))
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match=says):
            read_preferences(path, on_error=on_error)
    with pytest.raises(DataError, match="cannot be skipped"):
        read_preferences(path, on_error="skip")


def test_a_word_that_is_no_side_is_skipped(tmp_path):
    read = read_preferences(write(tmp_path, battles([1, "neither", 0])), on_error="skip")
    assert (winners(read), read.skipped) == ("ba", {"unknown_side": 1})


@pytest.mark.parametrize(("first", "won"), [(0, "bb"), (1, "aa")])
def test_names_say_what_numbers_of_one_kind_count_from(tmp_path, first, won):
    columns = ((f"response_{first}", "response_a"), (f"response_{first + 1}", "response_b"))
    read = read_preferences(write(tmp_path, battles([1, 1])), reading=RowReading(columns=columns))
    assert winners(read) == won


@pytest.mark.parametrize(
    "rows",
    [
        battles([0, 1], ("response_1", "response_2")),
        battles([1, 2], ("response_0", "response_1")),
        [{"prompt": ASK, "response_0": A, "response_1": B, "better_response_id": n} for n in (1, 2)],
        [{"prompt": ASK, "completion": A, "label": n} for n in (1, 5)],
        [{"history": ASK, "human_ref_A": A, "human_ref_B": B, "labels": n} for n in (1, 2)],
    ],
)
def test_numbers_beside_names_that_count_otherwise_are_never_skipped(tmp_path, rows):
    with pytest.raises(DataError, match="cannot be skipped"):
        read_preferences(write(tmp_path, rows), on_error="skip")


def pairs(prompt, *chosen):
    return [{"prompt": prompt, "chosen": text, "rejected": f"{prompt} {A}"} for text in chosen]


def test_a_prompt_that_responses_repeat_is_cut_off_and_counted(tmp_path):
    rows = [
        *pairs(f"{ASK}\n", f"{ASK}\n{B}", f"{ASK} {B}"),
        {**pairs(ASK, "")[0], "rejected": A, "chosen": B},
    ]
    with pytest.raises(DataError, match=r"rows.jsonl:3: field 'chosen': does not begin with the prompt"):
        read_preferences(write(tmp_path, rows))
    read = read_preferences(write(tmp_path, rows[:2]))
    assert [p.responses for p in read.preferences] == [(B, f" {A}"), (f" {B}", f" {A}")]
    assert read.unused == {"the prompt at the beginning of responses": 2}
    one = write(tmp_path, [{"prompt": ASK, "completion": f"{ASK} {B}", "label": True}])
    assert read_preferences(one).preferences[0].responses == (f" {B}",)


@pytest.mark.parametrize("response", [ASK, f"{ASK}  "])
def test_a_response_that_is_the_prompt_alone_is_refused(tmp_path, response):
    with pytest.raises(DataError, match="nothing is left after the prompt"):
        read_preferences(
            write(tmp_path, pairs(ASK, B, response) + pairs(ASK, f"{ASK} {B}") * 3), on_error="stop"
        )


def test_responses_that_echo_their_prompt_among_others_stay_as_they_are():
    others = [{"prompt": ASK, "chosen": B, "rejected": A}] * 3
    echo = {"prompt": "Hello", "chosen": "Hello there!", "rejected": "Hello."}
    assert settle_rows(lambda: [echo, *others], BY_COLUMNS) == BY_COLUMNS


def test_a_split_of_a_file_is_refused_and_not_ignored(tmp_path):
    path = str(write(tmp_path, []))
    for data in (
        DataConfig(train=path, train_split="validation"),
        DataConfig(train=[path], train_split="validation"),
        DataConfig(train=[{"source": path, "split": "train"}]),
    ):
        with pytest.raises(ValueError, match=r"split is '(train|validation)', and .* is one table"):
            places(data, heldout=False)
    mixed = DataConfig(train=[path, "org/name"], train_split="validation")
    assert [place.split for place in places(mixed, heldout=False)] == ["validation"] * 2


def test_files_in_place_of_a_runs_data_have_not_its_split(tmp_path):
    run = Config(data=DataConfig(eval="org/name", eval_split="test_prefs"))
    assert (
        heldout_settings(EvaluateConfig(run="r", data=str(write(tmp_path, []))), run).data.eval_split
        == "test"
    )
    assert heldout_settings(EvaluateConfig(run="r", data="org/other"), run).data.eval_split == "test_prefs"


def test_numbers_of_a_database_are_numbers_and_a_map_is_an_object(tmp_path):
    call = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [("x", "1")]}]}]
    arguments = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    turns = pa.list_(pa.struct([("role", pa.string()), ("tool_calls", pa.list_(arguments))]))
    table = pa.table(
        {
            "prompt": [ASK, ASK],
            "response_a": [A, A],
            "response_b": pa.array([call, call], turns),
            "winner": [Decimal("1.0"), Decimal("2.0")],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    first, second = read_preferences(tmp_path / "rows.parquet").preferences
    assert first.responses[0] == second.responses[1] == A
    (turn,) = answer_turns(second.responses[0])
    assert turn["tool_calls"] == [{"name": "f", "arguments": {"x": "1"}}]
