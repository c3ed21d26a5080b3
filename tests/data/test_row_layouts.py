"""Rows of the data sets that people have, each read for what it says."""

import csv
import json
import math
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.columns import MEANING, RowReading
from dpo.data.layouts import LAYOUTS, find_layout
from dpo.data.malformed import MalformedRowError
from dpo.data.messages import answer_turns, as_turns
from dpo.data.preferences import read_preferences
from dpo.data.rows import MOST_RESPONSES, SYSTEM_COLUMNS, read_row, row_reading


def say(*texts):
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def read(row, **how):
    return read_row(row, location="f:1", source="f", reading=RowReading(**how))


def share(*texts):
    """The same in ShareGPT's words."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ASK, GOOD, BAD = "Name a river.", "The Nile.", "The moon."
ULTRA = [
    {"response": BAD, "overall_score": 2.0},
    {"response": GOOD, "overall_score": 9.0},
    {"response": "A river.", "overall_score": 4.5},
]
ASPECTS = {"annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "4"}}}
POOR = {"annotations": {"helpfulness": {"Rating": "1"}, "honesty": {"Rating": "N/A"}}}

PAIRS = {
    "pair": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "orca": {"system": "", "question": ASK, "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD},
    "alpaca_outputs": {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
    "sharegpt": {"conversations": share(ASK), "chosen": share("", GOOD)[1], "rejected": share("", BAD)[1]},
    "openai": {
        "input": {"messages": say(ASK), "tools": [], "parallel_tool_calls": True},
        "preferred_output": say("", GOOD)[1:],
        "non_preferred_output": say("", BAD)[1:],
    },
    "argilla": {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD, "best_rating": 4.0},
    "ranking": {"prompt": ASK, "responses": [BAD, GOOD], "ranks": [2, 1]},
    "distilabel": {"instruction": ASK, "generations": [BAD, GOOD], "ratings": [1.0, 5.0]},
    "ultrafeedback": {"instruction": ASK, "models": ["m"], "completions": ULTRA[:2]},
    "nectar": {
        "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
        "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}],
    },
    "stack_exchange": {
        "qid": 4, "question": ASK, "answers": [{"text": BAD, "pm_score": 0}, {"text": GOOD, "pm_score": 5}]
    },
    "stack_pairs": {"qid": 4, "question": ASK, "response_j": GOOD, "response_k": BAD},
    "webgpt": {
        "question": {"full_text": ASK, "id": "q"},
        "answer_0": BAD, "answer_1": GOOD, "score_0": -1, "score_1": 1,
    },
    "swift_messages": {"messages": say(ASK, GOOD), "rejected_messages": say(ASK, BAD)},
    "swift_query": {"query": ASK, "response": GOOD, "rejected_response": BAD, "system": "", "history": []},
    "nemo_rl": {
        "context": say(ASK),
        "completions": [
            {"rank": 1, "completion": say("", BAD)[1:]}, {"rank": 0, "completion": say("", GOOD)[1:]}
        ],
    },
    "swift": {"messages": say(ASK, GOOD), "rejected_response": BAD},
    "helpsteer2_preference": {
        "prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2
    },
    "helpsteer3": {
        "context": say(ASK), "response1": BAD, "response2": GOOD, "overall_preference": 1
    },
    "arena": {
        "conversation_a": say(ASK, BAD), "conversation_b": say(ASK, GOOD), "winner": "model_b", "turn": 1
    },
    "arena_flags": {
        "prompt": json.dumps([ASK]), "response_a": json.dumps([GOOD]), "response_b": json.dumps([BAD]),
        "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
    },
    "sides": {"prompt": ASK, "response_a": BAD, "response_b": GOOD, "preference": "B"},
    "shp": {
        "history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 3, "score_B": 12
    },
    "safe_rlhf": {
        "prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0
    },
}  # fmt: skip


def text_of(prompt):
    """A prompt of one message as text."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.mark.parametrize("name", PAIRS)
def test_every_layout_of_a_pair_says_the_same(name):
    found = read(PAIRS[name])
    assert found.layout == name
    assert text_of(found.preference.prompt) == ASK
    assert found.preference.responses == (GOOD, BAD)
    assert found.preference.ranks == (0, 1)


@pytest.mark.parametrize("name", PAIRS)
def test_a_named_layout_reads_as_the_recognised_one(name):
    assert read(PAIRS[name], layout=name) == read(PAIRS[name])


LABELLED = {
    "completion": {"prompt": ASK, "completion": GOOD, "label": True},
    "alpaca_kto": {"instruction": ASK, "input": "", "output": GOOD, "kto_tag": True},
    "sharegpt_kto": {"conversations": share(ASK, GOOD), "kto_tag": True},
    "messages_label": {"messages": say(ASK, GOOD), "label": 1},
}


@pytest.mark.parametrize("name", LABELLED)
def test_every_layout_of_a_rated_response_says_the_same(name):
    found = read(LABELLED[name])
    assert found.layout == name
    assert text_of(found.preference.prompt) == ASK
    assert (found.preference.responses, found.preference.ranks) == ((GOOD,), (0,))


def test_the_table_has_a_case_for_every_layout():
    assert {*PAIRS, *LABELLED, "helpsteer2"} == set(LAYOUTS)


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "1", "+1", "desirable", "Good", "👍"])
def test_a_label_is_a_flag_a_number_or_a_word(label):
    assert read({**LABELLED["completion"], "label": label}).preference.ranks == (0,)


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "0", "no", "undesirable", "bad", "👎"])
def test_a_label_may_say_no_in_as_many_ways(label):
    assert read({**LABELLED["completion"], "label": label}).preference.ranks == (1,)


@pytest.mark.parametrize("label", ["fine", -1, 0.5, 2, [], {}, float("nan")])
def test_a_label_that_says_neither_is_refused(label):
    with pytest.raises(MalformedRowError, match=r"label.*allowed are true, 1, .* \(desirable\) and false, 0"):
        read({**LABELLED["completion"], "label": label})


@pytest.mark.parametrize(
    ("verdict", "responses", "ranks"),
    [
        ("a", (BAD, GOOD), (0, 1)),
        ("model_a", (BAD, GOOD), (0, 1)),
        ("response_b", (GOOD, BAD), (0, 1)),
        (0, (BAD, GOOD), (0, 1)),
        ("1", (GOOD, BAD), (0, 1)),
        ("tie", (BAD, GOOD), (0, 0)),
        ("tie (bothbad)", (BAD, GOOD), (0, 0)),
        (0.5, (BAD, GOOD), (0, 0)),
    ],
)
@pytest.mark.parametrize("column", ["winner", "preference", "label"])
def test_a_side_is_named_or_numbered(column, verdict, responses, ranks):
    row = {"prompt": ASK, "response_a": BAD, "response_b": GOOD, column: verdict}
    found = read(row, counts_from=0).preference
    assert (found.responses, found.ranks) == (responses, ranks)


def test_numbered_columns_count_as_their_names_do():
    row = {"instruction": ASK, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2}
    assert read(row).preference.responses == (GOOD, BAD)
    with pytest.raises(MalformedRowError, match="allowed are output_1, output_2"):
        read({**row, "preference": 0})


@pytest.mark.parametrize(
    "names", [("response_0", "response_1"), ("response_1", "response_2"), ("answer_a", "answer_b")]
)
def test_two_columns_of_one_kind_are_the_sides(names):
    row = {"prompt": ASK, names[0]: BAD, names[1]: GOOD}
    assert read({**row, "winner": names[1]}).preference.responses == (GOOD, BAD)
    with pytest.raises(MalformedRowError, match="needs"):
        read(row, layout="sides")
    with pytest.raises(MalformedRowError, match=r"response_a.* \+ response_b"):
        read({"prompt": ASK, "response_a": BAD, "answer_b": GOOD, "winner": "a"}, layout="sides")


@pytest.mark.parametrize(("labels", "first"), [(1, BAD), (0, GOOD)])
def test_a_label_of_one_is_for_the_first_answer_of_shp(labels, first):
    assert read({**PAIRS["shp"], "labels": labels}).preference.responses[0] == first


@pytest.mark.parametrize(("better", "first"), [(0, BAD), (1, GOOD)])
def test_safe_rlhf_counts_its_responses_from_zero(better, first):
    assert read({**PAIRS["safe_rlhf"], "better_response_id": better}).preference.responses[0] == first


def test_a_battle_of_one_turn_may_be_plain_text():
    row = {**PAIRS["arena_flags"], "prompt": ASK, "response_a": GOOD, "response_b": '["a", "list"]'}
    found = read(row).preference
    assert (text_of(found.prompt), found.responses) == (ASK, (GOOD, '["a", "list"]'))


def test_a_ranking_needs_ranks_or_scores():
    row = {"prompt": ASK, "responses": [BAD, GOOD]}
    assert read({**row, "scores": [1, 2.5]}).preference.responses == (GOOD, BAD)
    with pytest.raises(MalformedRowError, match=r"'ranks' \(1 is best\) or 'scores'"):
        read(row, layout="ranking")


def test_one_score_of_a_pair_alone_says_nothing():
    assert read({**PAIRS["pair"], "score_chosen": 2}).preference.scores is None


@pytest.mark.parametrize(("strength", "first"), [(-3, BAD), (-1, BAD), (1, GOOD), ("3", GOOD)])
def test_a_strength_below_zero_is_for_the_first(strength, first):
    assert read({**PAIRS["helpsteer3"], "overall_preference": strength}).preference.responses[0] == first


@pytest.mark.parametrize(
    ("turn", "learned"), [(1, GOOD), ("1", GOOD), (1.0, GOOD), (2, "more"), (3, "more"), (None, "more")]
)
def test_a_verdict_on_the_first_turns_is_not_learned_of_later_ones(turn, learned):
    """MT-bench has whole conversations beside each verdict; Chatbot Arena's `turn` is that of all."""
    sides = {
        "conversation_a": say(ASK, BAD, "And?", "more"),
        "conversation_b": say(ASK, GOOD, "And?", "more"),
    }
    for row in (sides, {name: json.dumps(turns) for name, turns in sides.items()}):
        found = read({**row, "winner": "model_b", "turn": turn})
        (best, _), prompt = found.preference.responses, found.preference.prompt
        assert (text_of(prompt), answer_turns(best)[-1]["content"], found.unused) == (ASK, learned, ())
        assert answer_turns(best)[0]["content"] == GOOD


def test_a_strength_of_zero_is_a_tie():
    assert read({**PAIRS["helpsteer3"], "overall_preference": 0}).preference.ranks == (0, 0)


def test_rankings_stay_rankings_with_their_scores():
    found = read({"instruction": ASK, "completions": ULTRA}).preference
    assert found.responses == (GOOD, "A river.", BAD)
    assert (found.ranks, found.scores) == ((0, 1, 2), (9.0, 4.5, 2.0))
    answers = [{"answer": text, "rank": rank} for text, rank in (("x", 2.0), ("y", 1.0), ("z", 2.0))]
    found = read({"prompt": ASK, "answers": answers}).preference
    assert (found.responses, found.ranks) == (("y", "x", "z"), (0, 1, 1))


def test_fine_grained_ratings_stand_in_for_an_overall_score():
    items = [{"response": BAD, **POOR}, {"response": GOOD, **ASPECTS}]
    with pytest.raises(MalformedRowError, match=r"honesty.Rating.*N/A"):
        read({"instruction": ASK, "completions": items})
    del items[0]["annotations"]["honesty"]
    assert read({"instruction": ASK, "completions": items}).preference.scores == (4.5, 1.0)


def test_completions_are_compared_by_a_score_that_all_of_them_have():
    """An overall score is of 10, a fine-grained one of 5: 6 of 10 is no more than 4.5 of 5."""
    items = [
        {"response": BAD, "overall_score": 6, "fine-grained_score": 2.5},
        {"response": GOOD, "overall_score": None, "fine-grained_score": 4.5},
    ]
    found = read({"instruction": ASK, "completions": items}).preference
    assert (found.responses, found.scores) == ((GOOD, BAD), (4.5, 2.5))
    with pytest.raises(MalformedRowError, match=r"completions\[0\].*no score that the others have"):
        read({"instruction": ASK, "completions": [{"response": BAD, "overall_score": 6}, items[1]]})


def test_a_part_of_an_object_may_be_named():
    row = {
        "question": {"text": ASK, "id": 3, "note": None},
        "answers": {"good": {"text": GOOD}, "bad": BAD},
    }
    mapping = (("prompt", "question.text"), ("chosen", "answers.good.text"), ("rejected", "answers.bad"))
    found = read(row, columns=mapping)
    assert (found.preference.prompt, found.preference.responses) == (ASK, (GOOD, BAD))
    assert found.unused == ("question.id",)
    as_text = {**row, "question": json.dumps(row["question"])}
    assert read(as_text, columns=mapping).preference == found.preference
    flat = {"question.text": ASK, "answers.good.text": GOOD, "answers.bad": BAD}
    assert read(flat, columns=mapping).preference == found.preference
    named = {**flat, "question": "2+2?"}
    with pytest.raises(MalformedRowError, match=r"'question'.*would change what is learned"):
        read(named, columns=mapping)
    for question in ({"id": 3}, "a text", None):
        with pytest.raises(MalformedRowError, match=r"question\.text.*reads 'prompt' from it"):
            read({**row, "question": question}, columns=mapping)


def test_what_stands_beside_a_part_that_is_read_is_used_or_refused():
    row = {"question": {"text": ASK, "system": "Be kind."}, "chosen": GOOD, "rejected": BAD}
    mapping = (("prompt", "question.text"),)
    with pytest.raises(MalformedRowError, match=r"question\.system.*would change what is learned"):
        read(row, columns=mapping)
    assert read(row, columns=mapping, ignored=frozenset({"question.system"})).preference.prompt == ASK
    both = read(row, columns=(*mapping, ("system", "question.system"))).preference
    assert as_turns(both.prompt) == tuple([{"role": "system", "content": "Be kind."}, *say(ASK)])
    with pytest.raises(MalformedRowError, match="found null, and what the responses begin with alike"):
        read({**SHARED, "question": {"text": None}}, columns=mapping)


def test_a_part_of_the_objects_in_a_list_is_named_alone():
    row = {"instruction": ASK, "completions": [{"response": BAD, "s": 1}, {"response": GOOD, "s": 2}]}
    with pytest.raises(MalformedRowError, match="of the objects in a list it is 's' alone"):
        read(row, columns=(("overall_score", "completions.s"),))
    assert read(row, columns=(("overall_score", "s"),)).preference.responses == (GOOD, BAD)
    deep = [{"response": text, "by": {"judge": {"s": score}}} for text, score in ((BAD, 1), (GOOD, 2))]
    found = read({"instruction": ASK, "completions": deep}, columns=(("overall_score", "by.judge.s"),))
    assert (found.preference.responses, found.preference.scores) == ((GOOD, BAD), (2.0, 1.0))


def test_a_score_inside_a_list_may_be_named_too():
    items = [{"response": t, "overall_score": 1, "fine-grained_score": s} for t, s in ((BAD, 2), (GOOD, 4))]
    found = read(
        {"instruction": ASK, "completions": items}, columns=(("overall_score", "fine-grained_score"),)
    )
    assert found.preference.scores == (4.0, 2.0)


@pytest.mark.parametrize("opens", ["", "<extra_id_1>User\n"])
@pytest.mark.parametrize("closes", ["", "\n", "\n<extra_id_1>Assistant\n"])
def test_turns_between_the_marks_of_nemo_are_messages(opens, closes):
    """As HelpSteer2 has prompts of several turns, a third of it."""
    prompt = f"{opens}Hi\n<extra_id_1>Assistant\nHello.\n\nWell?\n<extra_id_1>User\n{ASK}{closes}"
    expected = tuple(say("Hi", "Hello.\n\nWell?", ASK))
    found = read({**PAIRS["helpsteer2_preference"], "prompt": prompt}).preference
    assert (found.prompt, found.responses) == (expected, (GOOD, BAD))
    assert read({**PAIRS["pair"], "prompt": prompt}).preference.prompt == expected
    ends = {**PAIRS["pair"], "prompt": "Hi\n<extra_id_1>Assistant\nHello."}
    with pytest.raises(MalformedRowError, match="ends with an assistant message"):
        read(ends)
    for text in ("Fill in <extra_id_1> and <extra_id_1>User\n", "<extra_id_1>Robot\n"):
        assert read({**PAIRS["pair"], "prompt": text}).preference.prompt == text


def test_rated_rows_with_one_prompt_are_one(tmp_path):
    rows = [
        {"prompt": "a", "response": "x", "helpfulness": 1, "verbosity": 2},
        {"prompt": "a", "response": "y", "helpfulness": 4, "verbosity": 1},
        {"prompt": "alone", "response": "z", "helpfulness": 4, "verbosity": 1},
        {"prompt": "b", "response": "v", "helpfulness": 3, "verbosity": 2},
        {"prompt": "b", "response": "w", "helpfulness": 3, "verbosity": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_preferences(path, on_error="skip")
    assert [(p.responses, p.ranks, p.scores) for p in found.preferences] == [
        (("y", "x"), (0, 1), (4, 1)),
        (("v", "w"), (0, 0), (3, 3)),
    ]
    assert found.skipped == {"lone_response": 1}
    assert found.layouts == {"helpsteer2": 5}


def test_a_prompt_has_as_many_responses_as_are_compared_with_each_other(tmp_path):
    many = [str(k) for k in range(MOST_RESPONSES + 1)]
    rows: list[dict[str, object]] = [{"prompt": "a", "responses": many, "scores": list(range(len(many)))}]
    rows += [{"prompt": "b", "responses": many[1:], "scores": list(range(1, len(many)))}]
    lone = [{"prompt": "c", "response": one, "helpfulness": 1, "verbosity": 1} for one in many]
    for table, kept in ((rows, 1), (lone, 0)):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, table)))
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*has 1001 responses; allowed are 1000"):
            read_preferences(path)
        if kept:
            found = read_preferences(path, on_error="skip")
            assert (len(found.preferences), found.skipped) == (kept, {"too_many_responses": 1})


def test_a_conversation_of_several_turns_is_compared_from_where_it_parts():
    row = {"conversation_a": say("q", "x", "more", "y"), "conversation_b": say("q", "v"), "winner": "model_a"}
    found = read(row).preference
    assert found.prompt == tuple(say("q"))
    assert found.responses == (tuple(say("q", "x", "more", "y")[1:]), "v")


def test_capybaras_exchanges_are_the_turns_that_both_responses_share():
    """`conversation` has the preferred response at its end, and is what the conversations say."""
    exchanges = [{"input": "Hi.", "output": "Yes?"}, {"input": ASK, "output": GOOD}]
    row = {
        "conversation": exchanges,
        "original_response": GOOD,
        "chosen": say("Hi.", "Yes?", ASK, GOOD),
        "rejected": say("Hi.", "Yes?", ASK, BAD),
    }
    found = read(row).preference
    assert found.prompt == tuple(say("Hi.", "Yes?", ASK))
    assert (found.responses, found.ranks) == ((GOOD, BAD), (0, 1))


def test_the_other_response_of_swift_takes_the_last_place():
    found = read({"messages": say("Hi.", "Yes?", ASK, GOOD), "rejected_response": BAD}).preference
    assert found.prompt == tuple(say("Hi.", "Yes?", ASK))
    assert (found.responses, found.ranks) == ((GOOD, BAD), (0, 1))
    with pytest.raises(MalformedRowError):
        read({"messages": say("Hi.", "Yes?", ASK), "rejected_response": BAD})


def test_a_battle_of_several_turns_is_two_conversations():
    row = {
        **PAIRS["arena_flags"],
        "prompt": '["q", "r"]',
        "response_a": '["a", "b"]',
        "response_b": '["a", "c"]',
    }
    found = read(row).preference
    assert found.prompt == tuple(say("q", "a", "r"))
    assert found.responses == ("b", "c")


# ---- columns ----


def test_a_system_column_is_the_first_message():
    found = read({**PAIRS["orca"], "system": "Be brief."}).preference
    assert found.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK})
    with pytest.raises(MalformedRowError, match="one system text"):
        read({**PAIRS["pair"], "prompt": list(found.prompt), "system": "Be long."})


def test_an_instruction_has_its_input_and_its_history():
    row = {**PAIRS["alpaca"], "input": "In Africa.", "history": [["Hi", "Hello."]]}
    assert read(row).preference.prompt == tuple(say("Hi", "Hello.", f"{ASK}\nIn Africa."))


@pytest.mark.parametrize(
    "column", sorted(MEANING - {*SYSTEM_COLUMNS, "tools", "documents", "chat_template_kwargs"})
)
def test_a_column_that_changes_the_meaning_is_refused_unless_it_says_nothing_new(column):
    row = {**PAIRS["pair"], column: "Something else."}
    with pytest.raises(MalformedRowError) as caught:
        read(row)
    assert (caught.value.field, caught.value.reason) == (column, "unused_meaning")
    assert column in read(row, ignored=frozenset({column})).unused
    assert read({**row, column: f" {ASK}\n"}).unused == (column,)
    assert read({**row, column: ""}).unused == ()


def test_a_prompt_is_never_guessed_beside_a_column_that_has_it():
    row = {"question": ASK, "chosen": "The answer is Nile.", "rejected": "The answer is Moon."}
    assert read(row).preference.prompt == ASK
    del row["question"]
    assert read(row).preference.prompt == "The answer is"


def test_a_prompt_that_is_null_is_not_guessed():
    """Some rows of a table may lack it; the words that two answers begin with alike are no prompt."""
    row = {"prompt": None, "chosen": "The answer is Nile.", "rejected": "The answer is Moon."}
    with pytest.raises(MalformedRowError, match="found null") as caught:
        read(row)
    assert (caught.value.field, caught.value.reason) == ("prompt", "null")
    with pytest.raises(MalformedRowError, match="found null"):
        read({**row, "ask": None}, columns=(("prompt", "ask"),))
    assert read(row, ignored=frozenset({"prompt"})).preference.prompt == "The answer is"
    shared = {"prompt": None, "chosen": say(ASK, GOOD), "rejected": say(ASK, BAD)}
    assert text_of(read(shared).preference.prompt) == ASK
    told = {
        name: f"\n\nHuman: {ASK}\n\nAssistant: {text}" for name, text in (("chosen", GOOD), ("rejected", BAD))
    }
    assert read({"prompt": None, **told}).preference.responses == (GOOD, BAD)


@pytest.mark.parametrize("name", ["question", "instruction", "query", "conversations", "input", "Problem"])
@pytest.mark.parametrize(("value", "reason"), [("", "empty"), (" ", "empty"), ([], "empty"), (None, "null")])
def test_a_prompt_of_any_name_that_says_nothing_is_not_guessed(name, value, reason):
    row = {name: value, **SHARED}
    with pytest.raises(MalformedRowError, match="is not taken for the prompt") as caught:
        read(row)
    assert (caught.value.field, caught.value.reason) == (name, reason)
    assert read(row, ignored=frozenset({name})).preference.prompt == "The answer is"
    shared = {name: value, "chosen": say(ASK, GOOD), "rejected": say(ASK, BAD)}
    assert text_of(read(shared).preference.prompt) == ASK


def test_an_empty_column_of_another_name_is_no_prompt_and_an_empty_prompt_is_refused():
    row = {"query": "", "input": ASK, "chosen": GOOD, "rejected": BAD}
    assert read(row).preference.prompt == ASK
    with pytest.raises(MalformedRowError, match="nothing but white space"):
        read({**PAIRS["pair"], "prompt": "", "question": ASK})


def test_columns_of_no_layout_are_refused_with_those_of_the_usual_ones():
    with pytest.raises(MalformedRowError, match=r"pair: chosen rejected; ranking: responses") as caught:
        read({"text": ASK, "good": GOOD})
    assert "nectar" not in str(caught.value)


def test_columns_that_nobody_reads_are_named():
    assert read({**PAIRS["pair"], "id": 3, "model": "m", "nothing": None, "blank": ""}).unused == (
        "id",
        "model",
    )


def test_a_column_that_is_to_be_ignored_is_not_read():
    row = {**PAIRS["pair"], "tools": [{"name": "f"}], "system": "S", "responses": [1]}
    found = read(row, ignored=frozenset({"tools", "system", "responses"}))
    assert (found.preference.prompt, found.preference.context) == (ASK, None)
    assert found.unused == ("responses", "system", "tools")


def test_names_are_mapped_for_any_layout():
    row = {"ask": ASK, "first": BAD, "second": GOOD, "better": "response_b", "prompt": "another"}
    mapping = {"prompt": "ask", "response_a": "first", "response_b": "second", "winner": "better"}
    found = read_row(row, location="f:1", source="f", reading=row_reading(None, mapping, []))
    assert found.preference.prompt == ASK
    assert found.preference.responses == (GOOD, BAD)


def test_a_mapping_to_a_column_that_is_not_there_is_refused():
    with pytest.raises(MalformedRowError, match=r"'good'.*data.columns.*chosen"):
        read(PAIRS["pair"], columns=(("chosen", "good"),))


def test_settings_that_name_no_layout_or_a_column_twice_are_refused():
    with pytest.raises(ValueError, match=r"data.row_layout is 'pears'; allowed are pair, orca"):
        row_reading("pears", {}, [])
    with pytest.raises(ValueError, match="names 'x' twice"):
        row_reading(None, {"chosen": "x", "rejected": "x"}, [])


def test_columns_of_two_layouts_need_a_name():
    row = {**PAIRS["pair"], "responses": [GOOD, BAD], "ranks": [1, 2]}
    with pytest.raises(MalformedRowError, match=r"layouts pair, ranking.*data.row_layout"):
        read(row)
    assert read(row, layout="ranking").layout == "ranking"
    with pytest.raises(MalformedRowError, match="the layout nectar needs prompt answers"):
        read(row, layout="nectar")


def test_the_columns_of_well_known_mixes_are_recognised():
    """With what else their rows have: the best response once more, ratings, models, ids."""
    both = {"chosen": say(ASK, GOOD), "rejected": say(ASK, BAD)}
    mixes = [
        {"id": "1", "source": "flan", "prompt": ASK, **both},
        {
            "prompt": ASK,
            "prompt_id": "1",
            **both,
            "messages": both["chosen"],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        {**both, "chosen_model": "m", "rejected_model": "n", "prompt_id": "1", "preference_type": "delta"},
        {**both, "source": "helpsteer2"},
        {"source": "s", **both, "prompt": ASK, "question": ASK},
        {
            "input": ASK,
            "system": "",
            "chosen": GOOD,
            "rejected": BAD,
            "generations": [BAD, GOOD],
            "rating": [1, 2],
        },
        {
            "source": "s",
            "prompt": ASK,
            **both,
            "chosen-rating": 5.0,
            "rejected-rating": 1.0,
            "chosen-model": "m",
        },
        {"messages": both["chosen"], **both},
    ]
    for row in mixes:
        found = read(row)
        assert found.layout == "pair"
        assert text_of(found.preference.prompt) == ASK
        assert found.preference.responses == (GOOD, BAD)


def test_every_layout_is_found_by_its_own_columns():
    for name, layout in LAYOUTS.items():
        names = [alternatives.split("|") for alternatives in layout.needs.split()]
        assert find_layout(tuple(choices[0] for choices in names)) in (name, "safe_rlhf")


# ---- messages ----


def test_messages_stay_whole():
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": None}}}
    turns = [
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
    ]
    best = [{"role": "assistant", "content": "a", "reasoning_content": "since"}]
    found = read({"prompt": turns, "chosen": best, "rejected": "b", "tools": [{"name": "f"}]}).preference
    assert found.prompt == tuple(turns)
    assert found.responses == (tuple(best), "b")
    assert found.context == {"tools": [{"name": "f"}]}


NAMES = st.sampled_from(
    ["tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "weight", "note"]
)
VALUES = st.one_of(st.text("xyz", min_size=1, max_size=3), st.integers(1, 9), st.just({"a": [None, 1]}))
ADDED = st.dictionaries(NAMES, VALUES, max_size=3)


def layouts_of_messages(ask, best, worst):
    """The same three messages in every layout that has messages."""
    whole = {"chosen": [ask, best], "rejected": [ask, worst]}
    return {
        "prompt": {"prompt": [ask], "chosen": [best], "rejected": [worst]},
        "shared": whole,
        "beside text": {"prompt": ask["content"], **whole},
        "JSON text": {name: json.dumps(turns) for name, turns in whole.items()},
        "lone message": {"prompt": [ask], "chosen": best, "rejected": worst},
        "ranking": {"prompt": [ask], "responses": [[best], [worst]], "ranks": [1, 2]},
        "openai": {
            "input": {"messages": [ask]},
            "preferred_output": [best],
            "non_preferred_output": [worst],
        },
        "arena": {"conversation_a": [ask, best], "conversation_b": [ask, worst], "winner": "model_a"},
        "helpsteer3": {
            "context": [ask],
            "response1": [best],
            "response2": [worst],
            "overall_preference": -1,
        },
        "sharegpt": {"conversations": [ask], "chosen": best, "rejected": worst},
    }


@given(asked=ADDED, better=ADDED, worse=ADDED)
def test_no_field_of_a_message_is_lost_in_silence(asked, better, worse):
    ask = {"role": "user", "content": "Which?", **asked}
    best = {"role": "assistant", "content": "This.", **better}
    worst = {"role": "assistant", "content": "That.", **worse}
    for name, row in layouts_of_messages(ask, best, worst).items():
        try:
            found = read(row).preference
        except MalformedRowError:
            continue  # refused by name: not in silence
        turns = [
            turn for turns in (as_turns(found.prompt), *map(answer_turns, found.responses)) for turn in turns
        ]
        assert turns == [ask, best, worst], name


def test_the_layouts_of_messages_are_read_where_nothing_is_odd():
    ask = {"role": "user", "content": "Which?", "name": "Ann"}
    best = {"role": "assistant", "content": "This.", "reasoning_content": "since"}
    worst = {"role": "assistant", "content": "That.", "tool_calls": [{"function": {"name": "f"}}]}
    for row in layouts_of_messages(ask, best, worst).values():
        found = read(row).preference
        assert [found.prompt, *found.responses] == [(ask,), (best,), (worst,)]


def test_tools_documents_and_arguments_may_be_json_text():
    row = {**PAIRS["pair"], "tools": '[{"name": "f"}]', "documents": [{"text": "d"}]}
    row["chat_template_kwargs"] = '{"enable_thinking": false}'
    assert read(row).preference.context == {
        "tools": [{"name": "f"}],
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with pytest.raises(MalformedRowError, match=r"chat_template_kwargs.*names messages"):
        read({**PAIRS["pair"], "chat_template_kwargs": {"messages": []}})


def test_tools_may_stand_beside_the_messages_of_an_input():
    row = {**PAIRS["openai"], "input": {"messages": say(ASK), "tools": [{"name": "f"}]}}
    assert read(row).preference.context == {"tools": [{"name": "f"}]}


def test_messages_as_json_text_are_messages():
    row = {"chosen": json.dumps(say(ASK, GOOD)), "rejected": json.dumps(say(ASK, BAD))}
    found = read(row).preference
    assert (found.prompt, found.responses) == (tuple(say(ASK)), (GOOD, BAD))
    with pytest.raises(MalformedRowError, match="allowed is JSON"):
        read({**row, "chosen": str(say(ASK, GOOD))})


def test_text_that_is_json_of_something_else_stays_text():
    row = {"prompt": "List two.", "chosen": '["a", "b"]', "rejected": '{"role": "x"}'}
    assert read(row).preference.responses == ('["a", "b"]', '{"role": "x"}')


def test_parts_of_text_are_read_and_images_refused_by_name():
    parts = [{"type": "text", "text": "Hi"}, "there"]
    found = read({"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}).preference
    assert not isinstance(found.prompt, str)
    assert found.prompt[0]["content"] == [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(MalformedRowError) as caught:
        read({"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"})
    assert caught.value.field == "prompt[0].content[0]"
    assert "'image_url'" in caught.value.detail


def test_parts_of_text_by_other_names_are_text_for_a_template():
    """A template looks for parts of the type text, and leaves out others."""
    row = {"prompt": [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]}
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": GOOD, "annotations": []}]}
    found = read({**row, "chosen": [answer], "rejected": BAD}).preference
    assert as_turns(found.prompt)[0]["content"] == [{"type": "text", "text": ASK}]
    (best,) = answer_turns(found.responses[0])
    assert best["content"] == [{"type": "text", "text": GOOD, "annotations": []}]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("User", "user"), ("human", "user"), ("GPT", "assistant"), ("model", "assistant"), ("Tool", "tool"),
     ("observation", "observation")],
)  # fmt: skip
def test_roles_are_read_in_any_case_and_by_names_of_sharegpt(theirs, ours):
    """A template knows its own names alone."""
    turn = {"role": theirs, "content": ASK, "name": "x"}
    found = read({"prompt": [turn, *say(ASK)], "chosen": GOOD, "rejected": BAD}).preference
    assert as_turns(found.prompt)[0] == {"role": ours, "content": ASK, "name": "x"}
    if ours in ("user", "assistant"):
        shared = [{"from": theirs, "value": ASK}, *share(ASK)]
        row = {"conversations": shared, "chosen": share("", GOOD)[1], "rejected": share("", BAD)[1]}
        assert as_turns(read(row).preference.prompt)[0]["role"] == ours


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": ASK, "chosen": GOOD, "rejected": [BAD, "No."]},
         r"rejected.*a list of 2 strings; .*are a ranking: responses"),
        ({"prompt": ASK, "response_a": {"content": GOOD, "model": "m"}, "response_b": BAD, "winner": "a"},
         r"response_a.*an object with \['content', 'model'\]; allowed is a string or a list of messages"),
        ({"chosen": [{"role": "system", "content": "Be kind."}, *say(ASK, GOOD)],
          "rejected": [{"role": "system", "content": "Be rude."}, *say(ASK, BAD)]},
         r"share no first message: system 'Be kind\.' and system 'Be rude\.'; allowed is the same one"),
        ({"prompt": [{"role": "function_call", "content": "{}"}], "chosen": GOOD, "rejected": BAD},
         r"prompt\[0\]\.role.*found 'function_call'; allowed are system, .*human"),
        ({"prompt": 5, "chosen": GOOD, "rejected": BAD}, "prompt.*found a number; allowed is a string"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_was_found_and_what_helps(row, says):
    with pytest.raises(MalformedRowError, match=says):
        read(row)


def test_a_csv_of_another_coding_is_refused_by_what_is_allowed(tmp_path):
    for coding, said in (
        ("utf-16", "its first bytes are those of UTF-16; allowed is UTF-8: iconv"),
        ("latin-1", "cannot be read as CSV: .*; allowed is UTF-8"),
    ):
        (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\né,b,c\n", encoding=coding)
        with pytest.raises(ValueError, match=rf"rows\.csv: {said}"):
            read_preferences(tmp_path / "rows.csv")


def test_a_column_without_a_name_is_called_by_its_place(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,chosen,rejected, \n0,Name a river.,The Nile.,The moon.,\n")
    assert read_preferences(path).unused == {"column 1": 1}


def test_values_are_parted_by_what_the_name_of_the_file_says(tmp_path):
    rows = [["prompt", "chosen", "rejected"], [ASK, f"{GOOD}, really;", "4"]]
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows(rows)
        (found,) = read_preferences(tmp_path / name).preferences
        assert (found.prompt, *found.responses) == tuple(rows[1])
    for name, mark in (("rows.csv", ";"), ("rows.csv", "\t"), ("rows.tsv", ",")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows(rows)
        with pytest.raises(
            ValueError, match=rf"{name}:1: one column, named 'prompt.*seems to part its values"
        ):
            read_preferences(tmp_path / name)


def test_calls_and_observations_of_sharegpt_are_tool_messages():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "7"},
    ]
    row = {"conversations": turns, "chosen": share("", "a")[1], "rejected": share("", "b")[1]}
    prompt = read(row).preference.prompt
    assert not isinstance(prompt, str)
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "tool"]
    assert prompt[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_an_empty_system_message_is_kept_and_an_empty_question_is_not():
    row = {**PAIRS["pair"], "prompt": [{"role": "system", "content": ""}, *say(ASK)]}
    assert read(row).preference.prompt[0] == {"role": "system", "content": ""}
    with pytest.raises(MalformedRowError, match="empty"):
        read({**PAIRS["pair"], "prompt": say("")})


def test_a_text_prompt_beside_whole_conversations_is_a_part_of_what_they_share():
    start = [{"role": "system", "content": "Be kind."}, *say(ASK)]
    row = {"prompt": ASK, "chosen": [*start, *say("", GOOD)[1:]], "rejected": [*start, *say("", BAD)[1:]]}
    assert read(row).preference.prompt == tuple(start)
    with pytest.raises(MalformedRowError, match="is not among the messages"):
        read({**row, "prompt": "Another question."})


def test_a_text_prompt_is_how_conversations_of_several_turns_begin():
    """Capybara's, and those of mixes: the prompt's text is the first message, and they share more."""
    turns = say(ASK, "Which one?", "Any.")
    row = {"prompt": ASK, "chosen": [*turns, *say("", GOOD)[1:]], "rejected": [*turns, *say("", BAD)[1:]]}
    found = read(row).preference
    assert (found.prompt, found.responses) == (tuple(turns), (GOOD, BAD))
    without = {name: row[name] for name in ("chosen", "rejected")}
    assert read(without).preference == found
    as_messages = read({**row, "prompt": say(ASK)}).preference  # which say where the responses begin
    assert as_messages.prompt == tuple(say(ASK))
    assert [len(answer_turns(response)) for response in as_messages.responses] == [3, 3]
    apart = {**row, "chosen": say(ASK, "So?", "A.", GOOD), "rejected": say(ASK, "So?", "B.", BAD)}
    found = read(apart).preference  # what they share ends with the assistant: only the text is the prompt
    assert as_turns(found.prompt) == tuple(say(ASK))
    assert [len(answer_turns(response)) for response in found.responses] == [3, 3]


def test_a_call_that_tools_answer_otherwise_is_a_part_of_the_responses():
    start = [*say(ASK), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]

    def whole(reply, answer):
        return [*start, {"role": "tool", "content": reply}, {"role": "assistant", "content": answer}]

    found = read({"chosen": whole("1", GOOD), "rejected": whole("2", BAD)}).preference
    assert found.prompt == tuple(say(ASK))
    assert [len(answer_turns(response)) for response in found.responses] == [3, 3]
    with pytest.raises(MalformedRowError, match="shared messages end with the assistant"):
        read({"chosen": say(ASK, "a", "1", GOOD), "rejected": say(ASK, "a", "2", BAD)})


def test_columns_of_when2call_are_pairs_with_their_tools():
    row = {
        "messages": say(ASK),
        "chosen_response": {"role": "assistant", "content": GOOD},
        "rejected_response": {"role": "assistant", "content": BAD},
        "tools": ['{"name": "f", "parameters": {"type": "object"}}'],
    }
    found = read(row)
    assert (found.layout, found.preference.responses) == ("argilla", (GOOD, BAD))
    assert found.preference.context == {"tools": [{"name": "f", "parameters": {"type": "object"}}]}


def test_a_response_ends_with_the_assistant_and_something_of_it_is_learned():
    with pytest.raises(MalformedRowError, match="first and last is the assistant"):
        read({**PAIRS["pair"], "chosen": say("", GOOD, "thanks")[1:]})
    silent = [{"role": "assistant", "content": GOOD, "weight": 0}]
    with pytest.raises(MalformedRowError, match="weight other than 0"):
        read({**PAIRS["pair"], "chosen": silent})


# ---- scores, tables ----


def test_a_score_that_is_not_a_number_is_no_score():
    found = read({**PAIRS["pair"], "score_chosen": float("nan"), "score_rejected": 2}).preference
    assert found.scores is not None
    assert math.isnan(found.scores[0])
    assert found.scores[1] == 2
    row = {"prompt": ASK, "responses": [GOOD, BAD], "ranks": [1, 2], "scores": [None, 1.0]}
    scores = read(row).preference.scores
    assert scores is not None
    assert math.isnan(scores[0])


def test_a_table_of_text_stays_text(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [("2+2?", "4", "5", "8.5", "1"), ("Any?", "None", "NA", "nan", "0")]
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "rows.csv", folder / "train.csv"):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [("prompt", "chosen", "rejected", "score_chosen", "score_rejected"), *rows]
            )
    alone, inside = read_preferences(tmp_path / "rows.csv"), read_preferences(folder)
    for found in (alone, inside):
        assert [p.responses for p in found.preferences] == [("4", "5"), ("None", "NA")]
        assert found.preferences[0].scores == (8.5, 1.0)


def test_a_table_with_a_line_too_long_names_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n"a, b",c,d\ne,f,g,h\n')
    found = read_preferences(path, on_error="skip")
    assert found.preferences[0].prompt == "a, b"
    assert found.skipped == {"length_mismatch": 1}
    path.write_text("prompt,chosen,prompt\na,b,c\n")
    with pytest.raises(ValueError, match="twice"):
        read_preferences(path)


def test_keys_that_only_other_rows_have_are_not_there(tmp_path):
    rows = [
        {
            "prompt": say(ASK),
            "chosen": [{"role": "assistant", "content": GOOD, "tool_calls": [{"function": {name: 1}}]}],
            "rejected": say("", BAD)[1:],
        }
        for name in ("a", "b")
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name, found in zip("ab", read_preferences(tmp_path / "rows.parquet").preferences, strict=True):
        called = found.responses[0]
        assert not isinstance(called, str)
        assert called[0]["tool_calls"] == [{"function": {name: 1}}]
        assert found.responses[1] == BAD


def test_the_page_about_data_has_a_line_for_every_layout():
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    assert {line.split("|")[2].strip(" `") for line in text.splitlines() if line.startswith("|")} >= set(
        LAYOUTS
    )


SHARED = {"chosen": "The answer is four.", "rejected": "The answer is five."}


@pytest.mark.parametrize(
    "column",
    [
        {"Question": "2+2?"},
        {"problem": "2+2?"},
        {"title of it": "What is two and two?"},
        {"turns": say("What is two and two?")},
        {"messages": say("2+2?", "Four.")},
    ],
)
def test_words_that_responses_share_are_no_prompt_beside_a_column_that_may_be_one(column):
    (name,) = column
    with pytest.raises(MalformedRowError, match=rf"{name}'.*may be the prompt.*data\.columns"):
        read({**SHARED, **column})
    ignored = read({**SHARED, **column}, ignored=frozenset(column))
    assert ignored.preference.prompt == "The answer is"


def test_words_that_responses_share_are_the_prompt_beside_what_is_none():
    row = {
        **SHARED,
        "id": "a-1",
        "source": "a set of ours",
        "score": 3,
        "tags": ["a", "b"],
        "of it": "The answer",
    }
    found = read({**row, "system": "Be kind."})
    assert [turn["content"] for turn in found.preference.prompt] == ["Be kind.", "The answer is"]  # pyright: ignore
    assert found.unused == ("id", "of it", "score", "tags")


@pytest.mark.parametrize("name", ["Context", "SYSTEM", "Chat History", "System-Instruction"])
def test_the_name_of_a_column_says_what_it_is_in_any_case(name):
    with pytest.raises(MalformedRowError, match="would change what is learned"):
        read({"prompt": ASK, "chosen": GOOD, "rejected": BAD, name: "More."})


@pytest.mark.parametrize("name", SYSTEM_COLUMNS)
def test_a_system_text_may_have_several_names(name):
    found = read({"prompt": ASK, "chosen": GOOD, "rejected": BAD, name: "Be kind."})
    assert as_turns(found.preference.prompt)[0] == {"role": "system", "content": "Be kind."}


def test_a_column_in_whose_place_another_is_read_is_named():
    row = {"prompt": "old", "query2": ASK, "chosen": GOOD, "rejected": BAD}
    found = read(row, columns=(("prompt", "query2"),))
    assert (found.preference.prompt, found.unused) == (ASK, ("prompt (for it query2 is read)",))
    swapped = read(
        {**row, "chosen": BAD, "rejected": GOOD}, columns=(("chosen", "rejected"), ("rejected", "chosen"))
    )
    assert (swapped.preference.responses, swapped.unused) == ((GOOD, BAD), ("query2",))


@pytest.mark.parametrize(
    "given",
    [
        {"role": "assistant", "content": GOOD},
        {"content": GOOD, "role": "Assistant"},
        {"from": "gpt", "value": GOOD},
        [{"weight": None, "role": "assistant", "content": GOOD}],
        {"messages": [{"id": None, "role": "assistant", "content": GOOD}]},
    ],
)
def test_messages_in_json_text_are_read_whatever_stands_first(given):
    row = {"prompt": ASK, "chosen": json.dumps(given), "rejected": BAD}
    assert read(row).preference.responses == (GOOD, BAD)


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "admin", "name": "x"}',
        '{"role": "user"}',
        '{"messages": []}',
        '[{"a": 1}]',
        '{"a',
        "{}",
        "[{ x }]",
    ],
)
def test_other_json_text_is_text(text):
    assert read({"prompt": ASK, "chosen": text, "rejected": BAD}).preference.responses == (text, BAD)


@pytest.mark.parametrize("weight", ["0", 0.5, -1, float("nan"), "none"])
def test_a_weight_that_is_neither_0_nor_1_is_refused(weight):
    turns = [{"role": "assistant", "content": GOOD, "weight": weight}]
    with pytest.raises(MalformedRowError, match=r"chosen\[0\]\.weight.*allowed are 1, and 0"):
        read({"prompt": ASK, "chosen": turns, "rejected": BAD})


@pytest.mark.parametrize("tools", ["[]", "null", " ", []])
def test_no_tools_are_no_tools_in_json_text_too(tools):
    assert read({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "tools": tools}).preference.context is None


@pytest.mark.parametrize("tools", [['{"name": "f"}'], '["{\\"name\\": \\"f\\"}"]', [{"name": "f"}]])
def test_each_tool_may_be_json_text(tools):
    found = read({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "tools": tools})
    assert found.preference.context == {"tools": [{"name": "f"}]}


def test_two_sides_out_of_three_are_not_guessed():
    row = {"prompt": ASK, "response_0": "x", "response_1": BAD, "response_2": GOOD, "label": 2}
    with pytest.raises(MalformedRowError, match=r"response_1 \+ response_2 and response_0 \+ response_1"):
        read(row)
    assert read(row, ignored=frozenset({"response_0"})).preference.responses == (GOOD, BAD)


def test_a_query_has_its_history():
    row = {"query": ASK, "response": GOOD, "rejected_response": BAD, "history": [["Hi", "Hello"]]}
    assert [turn["content"] for turn in read(row).preference.prompt] == ["Hi", "Hello", ASK]  # pyright: ignore


def places_of(value, *above):
    """Where everything of a row stands, and what stands there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(above, value), *(place for key, item in items for place in places_of(item, *above, key))]


def name_of(place):
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)[1:] or "(row)"


SEVERAL_TURNS = {
    "capybara": {
        "conversation": [{"input": ASK, "output": "One?"}, {"input": "Yes.", "output": GOOD}],
        "chosen": say(ASK, "One?", "Yes.", GOOD), "rejected": say(ASK, "One?", "Yes.", BAD),
    },
    "alpaca": {**PAIRS["alpaca"], "history": [[ASK, "One?"], ["Yes.", "Sure."]]},
    "alpaca_outputs": {**PAIRS["alpaca_outputs"], "history": [[ASK, "One?"]]},
    "swift_query": {**PAIRS["swift_query"], "history": [[ASK, "One?"], ["Yes.", "Sure."]]},
    "swift": {"messages": say(ASK, "One?", "Yes.", GOOD), "rejected_response": BAD},
    "arena_flags": {
        **PAIRS["arena_flags"], "prompt": [ASK, "And?"], "response_a": [GOOD, "a"], "response_b": [BAD, "b"],
    },
    "arena": {
        **PAIRS["arena"], "turn": 2,
        "conversation_a": say(ASK, BAD, "And?", "a"), "conversation_b": say(ASK, GOOD, "And?", "b"),
    },
    "sharegpt": {**PAIRS["sharegpt"], "conversations": share(ASK, "One?", "Yes.")},
    "pair": {"chosen": say(ASK, "One?", "Yes.", GOOD), "rejected": say(ASK, "One?", "Yes.", BAD)},
}  # fmt: skip


def refusal_of(row):
    try:
        read(row)
    except MalformedRowError as error:
        return error
    return None


NO_TEXTS = ("", "user", "assistant", "human", "gpt")
PLACES = [
    (name, row, place)
    for rows in (PAIRS, LABELLED, SEVERAL_TURNS)
    for name, row in rows.items()
    for place, value in places_of(row)
    if isinstance(value, str) and value not in NO_TEXTS
]


@pytest.mark.parametrize(
    ("name", "row", "place"), PLACES, ids=[f"{name} {name_of(place)}" for name, _, place in PLACES]
)
@pytest.mark.parametrize("value", [7, None, [7]], ids=str)
def test_a_refusal_names_a_place_that_the_row_has(name, row, place, value):
    """Whatever messages are made of a row: its reader looks for the text where the row has it."""
    broken = json.loads(json.dumps(row))
    *above, last = place
    holder = broken
    for key in above:
        holder = holder[key]
    holder[last] = value
    found = refusal_of(broken)
    if found is not None:
        assert found.field in [name_of(place) for place, _ in places_of(broken)]
    if found is not None and value is not None and found.reason in ("wrong_type", "empty"):
        assert found.field in (name_of(place), name_of((*place, 0)))
