import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.columns import BY_COLUMNS
from dpo.data.expansion import expand_ranking
from dpo.data.malformed import MalformedRowError
from dpo.data.preferences import (
    MAX_PROBLEMS,
    DataError,
    Preference,
    each_preference,
    has_groups,
    parse_row,
    read_part,
    read_preferences,
)
from dpo.data.sources import Part, cut, read_rows


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def parse(row) -> Preference:
    return parse_row(row, location="data.jsonl:1", source="data.jsonl")


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIR = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("a", "b", "c"), "chosen": "yes", "rejected": "no"},
        {"prompt": turns("a", "b", "c"), "chosen": turns("-", "yes")[1:], "rejected": turns("-", "no")[1:]},
        {"prompt": turns("a", "b", "c"), "chosen": turns("a", "b", "c", "yes"), "rejected": "no"},
        {"chosen": turns("a", "b", "c", "yes"), "rejected": turns("a", "b", "c", "no")},
        {"chosen": turns("a", "b", "c", "yes"), "rejected": turns("a", "b", "c", "no"), "prompt": None},
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
        },
        {
            "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            "chosen": " yes",
            "rejected": " no",
        },
        {"prompt": turns("a", "b", "c"), "responses": ["no", "yes"], "ranks": [2, 1]},
        {"prompt": turns("a", "b", "c"), "responses": ["no", "yes"], "scores": [-1, 0.5]},
    ],
)
def test_every_format_of_a_pair_reads_the_same(row):
    preference = parse(row)
    assert preference.prompt == tuple(turns("a", "b", "c"))
    assert preference.responses == ("yes", "no")
    assert preference.ranks == (0, 1)


def test_a_string_prompt_stays_a_string():
    assert parse(PAIR) == Preference(
        "Say hello.", ("Hello!", "No."), (0, 1), None, "data.jsonl", "data.jsonl:1"
    )


def test_an_implicit_string_prompt_ends_between_words():
    preference = parse({"chosen": "The film is good.", "rejected": "The film is gone."})
    assert preference.prompt == "The film is"
    assert preference.responses == (" good.", " gone.")


@given(st.text(min_size=1), st.text(), st.text())
def test_splitting_strings_loses_nothing(start, left, right):
    chosen, rejected = start + " " + left, start + " " + right
    try:
        preference = parse({"chosen": chosen, "rejected": rejected})
    except MalformedRowError:
        return
    if isinstance(preference.prompt, str):
        assert [f"{preference.prompt}{response}" for response in preference.responses] == [chosen, rejected]


def test_identical_conversations_are_one_prompt_and_the_same_response_twice():
    preference = parse({"chosen": turns("a", "b"), "rejected": turns("a", "b")})
    assert preference.prompt == tuple(turns("a"))
    assert preference.responses == ("b", "b")


def test_ties_stay_equal_ranks_without_gaps_and_scores_follow_their_response():
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [7, 2, 2, 9], "scores": [3, 5, 4, 1]}
    preference = parse(row)
    assert preference.responses == ("b", "c", "a", "d")
    assert preference.ranks == (0, 0, 1, 2)
    assert preference.scores == (5, 4, 3, 1)


def test_scores_alone_give_the_ranks():
    preference = parse({"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]})
    assert preference.responses == ("b", "a", "c")
    assert preference.ranks == (0, 1, 1)


@pytest.mark.parametrize(("label", "rank"), [(True, 0), (False, 1), (1, 0), (0, 1)])
def test_an_unpaired_row_has_one_response_whose_rank_is_its_label(label, rank):
    preference = parse({"prompt": "p", "completion": "a", "label": label})
    assert (preference.responses, preference.ranks) == (("a",), (rank,))


def test_a_pair_may_have_scores():
    assert parse({**PAIR, "score_chosen": 8.5, "score_rejected": 3}).scores == (8.5, 3)


MALFORMED = [
    ([1], "(row)", "wrong_type"),
    ({"prompt": "p", "chosen": "a"}, "(row)", "unknown_format"),
    ({**PAIR, "responses": ["a", "b"], "ranks": [1, 2]}, "(row)", "ambiguous_format"),
    ({**PAIR, "chosen": ""}, "chosen", "empty"),
    ({**PAIR, "chosen": 3}, "chosen", "wrong_type"),
    ({**PAIR, "prompt": []}, "prompt", "empty"),
    ({**PAIR, "prompt": turns("a", "b")}, "prompt", "roles"),
    ({**PAIR, "prompt": [{"role": "judge", "content": "a"}]}, "prompt[0].role", "roles"),
    ({**PAIR, "prompt": [{"role": "user", "content": None}]}, "prompt[0].content", "wrong_type"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "prompt[0]", "wrong_type"),
    ({**PAIR, "chosen": "\ud800"}, "chosen", "invalid_unicode"),
    ({**PAIR, "source": "\ud800"}, "source", "invalid_unicode"),
    ({**PAIR, "source": " "}, "source", "empty"),
    ({**PAIR, "chosen": turns("x", "b", "c")[1:]}, "chosen", "roles"),
    ({"chosen": turns("a", "b"), "rejected": turns("c", "d")}, "prompt", "no_common_prompt"),
    ({"chosen": turns("a", "b"), "rejected": turns("a", "b", "c")}, "rejected", "roles"),
    ({"chosen": "good", "rejected": "bad"}, "prompt", "no_common_prompt"),
    ({"prompt": "p", "responses": ["a"], "ranks": [1]}, "responses", "too_few_responses"),
    ({"prompt": "p", "responses": "ab", "ranks": [1, 2]}, "responses", "too_few_responses"),
    ({"prompt": "p", "responses": ["a", "b"]}, "ranks", "missing_field"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "ranks", "length_mismatch"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": "12"}, "ranks", "wrong_type"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}, "ranks[1]", "not_a_number"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "scores[1]", "not_a_number"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 10**400]}, "scores[1]", "not_a_number"),
    ({"prompt": "p", "completion": "a", "label": "fine"}, "label", "wrong_type"),
    ({"completion": "a", "label": True}, "prompt", "missing_field"),
]


@pytest.mark.parametrize(("row", "field", "reason"), MALFORMED)
def test_a_malformed_row_names_field_and_reason_and_what_is_allowed(row, field, reason):
    with pytest.raises(MalformedRowError) as caught:
        parse(row)
    assert (caught.value.field, caught.value.reason) == (field, reason)
    assert any(word in caught.value.detail for word in ("allowed", "needs", "no prompt", "nothing is left"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
fields = ["prompt", "chosen", "rejected", "responses", "ranks", "scores", "completion", "label", "source"]


@given(st.dictionaries(st.sampled_from(fields), json_values))
def test_any_row_is_a_preference_or_a_named_problem(row):
    try:
        preference = parse(row)
    except MalformedRowError:
        return
    assert len(preference.responses) == len(preference.ranks) >= 1


def test_all_problems_are_listed_at_once_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + '\n\n{"prompt": \n' + json.dumps({**PAIR, "chosen": ""}) + "\n")
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert "2 of 3 rows are malformed" in str(caught.value)
    assert [problem.location for problem in caught.value.problems] == [f"{path}:3", f"{path}:4"]
    assert [problem.reason for problem in caught.value.problems] == ["invalid_json", "empty"]


def test_the_list_of_problems_is_capped_and_counted(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *[{**PAIR, "chosen": ""}] * (MAX_PROBLEMS + 7))
    with pytest.raises(DataError, match="and 7 more") as caught:
        read_preferences(path)
    assert len(caught.value.problems) == MAX_PROBLEMS == 20


def test_what_is_wrong_with_one_row_as_with_the_one_before_is_said_once(tmp_path):
    """A long list of what is allowed stands there once, each row with its place."""
    path = write_lines(tmp_path / "rows.jsonl", *[{"a": 1}] * 3, {"b": 1}, {**PAIR, "chosen": ""})
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    lines = str(caught.value).splitlines()[1:6]
    assert [line.split(": ")[0].strip() for line in lines] == [f"{path}:{n}" for n in range(1, 6)]
    assert lines[1:3] == [f"  {path}:2: the same", f"  {path}:3: the same"]
    assert [line.count("docs/data.md has all") for line in lines] == [1, 0, 0, 1, 0]
    assert [problem.location for problem in caught.value.problems] == [f"{path}:{n}" for n in range(1, 6)]


def test_a_list_of_all_problems_says_nothing_of_more(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *[{**PAIR, "chosen": ""}] * MAX_PROBLEMS)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert "more" not in str(caught.value)


def test_tied_pairs_are_left_out_and_not_malformed(tmp_path):
    tied = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}
    path = write_lines(tmp_path / "rows.jsonl", tied, PAIR)
    read = read_preferences(path, expand="all_pairs")
    assert (read.skipped, read.num_rows) == ({"tied_pair": 1}, 2)
    assert [p.responses for p in read.preferences] == [("Hello!", "No.")]
    with pytest.raises(DataError, match="1 of 3 rows are malformed"):
        read_preferences(write_lines(path, tied, PAIR, []), expand="all_pairs")


def test_skipped_rows_are_counted_by_reason(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PAIR, {**PAIR, "chosen": ""}, [], {**PAIR, "rejected": ""})
    read = read_preferences(path, on_error="skip")
    assert len(read.preferences) == 1
    assert read.num_rows == 4
    assert read.skipped == {"empty": 2, "wrong_type": 1}


def test_rows_with_a_column_that_nobody_reads_are_counted(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PAIR, {**PAIR, "id": 1}, {**PAIR, "id": 2, "model": "m"})
    assert read_preferences(path).unused == {"id": 2, "model": 1}


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no usable row"):
        read_preferences(write_lines(tmp_path / "rows.jsonl", []), on_error="skip")


def test_bytes_that_are_not_utf8_are_a_problem_of_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n')
    assert read_preferences(path, on_error="skip").skipped == {"invalid_unicode": 1}


def test_every_kind_of_file_reads_the_same(tmp_path):
    rows = [{"prompt": turns("a"), "chosen": turns("a", "b")[1:], "rejected": turns("a", "c")[1:]}] * 3
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    write_lines(tmp_path / "rows.jsonl", *rows)
    names = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "saved", "splits"]
    reads = [read_preferences(tmp_path / name).preferences for name in names]
    plain = [[p._replace(source="", location="") for p in preferences] for preferences in reads]
    assert all(preferences == plain[0] for preferences in plain)
    assert len(plain[0]) == 3
    assert len(read_preferences(tmp_path / "splits", split="test").preferences) == 1


def test_a_directory_opens_as_a_data_set_with_splits(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", PAIR, PAIR)
    write_lines(folder / "test.jsonl", PAIR)
    assert len(read_preferences(folder).preferences) == 2
    assert len(read_preferences(folder, split="test").preferences) == 1
    with pytest.raises(ValueError, match="split 'validation'"):
        read_preferences(folder, split="validation")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "rows.txt"])
def test_a_path_that_cannot_be_read_says_so(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no such file|allowed are .jsonl"):
        read_preferences(name)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=name):
        read_preferences(tmp_path / name)


def test_limit_takes_the_first_rows(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *[{**PAIR, "prompt": str(i)} for i in range(5)])
    assert [p.prompt for p in read_preferences(path, limit=2).preferences] == ["0", "1"]


@pytest.mark.parametrize(
    ("expand", "pairs", "num_tied"),
    [
        ("ranking", [("a", "b", "c", "d")], 0),
        ("best_worst", [("a", "d")], 0),
        ("adjacent", [("a", "b"), ("c", "d")], 1),
        ("all_pairs", [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")], 1),
    ],
)
def test_a_ranking_expands_to_pairs_without_ties(expand, pairs, num_tied):
    ranking = Preference("p", ("a", "b", "c", "d"), (0, 1, 1, 2), (4, 3, 3, 1), "s", "f:1")
    expanded, tied = expand_ranking(ranking, expand)
    assert [preference.responses for preference in expanded] == pairs
    assert expand == "ranking" or {preference.ranks for preference in expanded} == {(0, 1)}
    assert tied == num_tied


def test_expansion_counts_tied_pairs_and_keeps_scores(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 3]}
    read = read_preferences(write_lines(tmp_path / "rows.jsonl", row), expand="all_pairs")
    assert read.skipped == {"tied_pair": 1}
    assert [(p.responses, p.scores) for p in read.preferences] == [(("b", "a"), (3, 1)), (("c", "a"), (3, 1))]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c", "label": "x" * 10**6},
        {"prompt": [{"role": "x" * 10**6, "content": "c"}], "chosen": "a", "rejected": "b"},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, "9" * 10**6]},
        {str(n): n for n in range(10**5)},
    ],
)
def test_an_error_shows_little_of_a_row_however_large(row):
    with pytest.raises(MalformedRowError) as caught:
        parse(row)
    assert len(caught.value.detail) < 1000


def test_a_row_of_any_depth_is_a_named_problem():
    deep = json.loads("[" * 300 + "]" * 300)
    for field in ("label", "completion", "prompt"):
        row = {"prompt": "p", "completion": "c", "label": True, field: deep}
        with pytest.raises(MalformedRowError):
            parse(row)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr("dpo.data.sources.MAX_ROW_BYTES", 1000)
    lines = json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "chosen": "x" * 10**6}) + "\n"
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as file:
        file.write(lines)
    with pytest.raises(ValueError, match=f"{name}:2: a line of more than 1000 bytes"):
        read_preferences(tmp_path / name)


def rated(prompt, response, score):
    """A row of HelpSteer2: neighbours with one prompt belong together."""
    return {"prompt": prompt, "response": response, "helpfulness": score, "verbosity": 1}


def test_a_group_ends_at_another_prompt_and_at_a_row_of_another_layout(tmp_path):
    pair = {**PAIR, "prompt": "a"}
    rows = [rated("a", "x", 1), rated("a", "y", 4), pair, pair, rated("a", "v", 3), rated("a", "w", 2)]
    rows += [rated("b", "s", 1), rated("b", "t", 2), rated("b", "u", 3)]
    read = read_preferences(write_lines(tmp_path / "rows.jsonl", *rows))
    best = [preference.responses for preference in read.preferences]
    assert best == [("y", "x"), ("Hello!", "No."), ("Hello!", "No."), ("v", "w"), ("u", "t", "s")]
    assert read.layouts == {"helpsteer2": 7, "pair": 2}


def test_preferences_one_by_one_are_those_of_the_whole(tmp_path):
    ranking = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}
    rows = [PAIR, [], ranking, rated("a", "x", 1), rated("a", "y", 4)]
    path = str(write_lines(tmp_path / "rows.jsonl", *rows))
    for expand in ("ranking", "adjacent"):
        whole = read_part(path, "train", Part(), expand).preferences
        assert list(each_preference(path, "train", Part(), expand)) == whole


@pytest.mark.parametrize(
    ("rows", "limit", "grouped"),
    [
        ([rated("a", "x", 1), PAIR], None, True),
        ([rated("a", "x", 1), PAIR], 5, True),
        ([PAIR, rated("a", "x", 1)], None, False),
        ([PAIR, rated("a", "x", 1)], 2, False),
        ([rated("a", "x", 1)], 0, False),
        ([], None, False),
    ],
)
def test_the_first_row_says_whether_rows_are_parts_of_groups(tmp_path, rows, limit, grouped):
    path = str(write_lines(tmp_path / "rows.jsonl", *rows))
    assert has_groups(path, "train", limit, BY_COLUMNS) is grouped


@pytest.mark.parametrize("expand", ["ranking", "best_worst", "adjacent", "all_pairs"])
def test_a_single_response_stays_as_it_is(expand):
    alone = Preference("p", ("a",), (1,), None, "s", "f:1")
    assert expand_ranking(alone, expand) == ([alone], 0)


def test_a_csv_row_stands_where_it_begins_in_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n"a\nb",x,y\n\n"c",,y\n"d\n\ne",x\n')
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert [problem.location for problem in caught.value.problems] == [f"{path}:5", f"{path}:6"]
    read = read_preferences(path, on_error="skip")
    assert [preference.location for preference in read.preferences] == [f"{path}:2"]
    parts = [part for part in cut(str(path), "train", count=3) if part.rows]
    located = [location for part in parts for location, _ in read_rows(str(path), "train", part)]
    assert located == [f"{path}:2", f"{path}:5", f"{path}:6"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_null_is_named_as_such(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    rows = [PAIR, {**PAIR, "chosen": None}]
    if ending == "jsonl":
        write_lines(path, *rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(
        DataError, match="found null; allowed is a value, as the layout pair needs one"
    ) as caught:
        read_preferences(path)
    (problem,) = caught.value.problems
    assert (problem.location, problem.field, problem.reason) == (f"{path}:2", "chosen", "null")


def test_what_is_no_json_is_found_in_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + '\n{"prompt"\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*not JSON at character 1\d: Expecting ':'"):
        read_preferences(path)
