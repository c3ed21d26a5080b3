import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from dpo.config import DataConfig
from dpo.data.preferences import Preference, read_preferences
from dpo.data.tokenization import tokenize, tokenize_answers, tokenize_prompts

SHARED = Path(os.environ.get("DPO_SHARED_DIR", Path(__file__).resolve().parents[2] / ".." / "shared"))
EOS = 2


def make(prompt, *responses, **fields):
    ranks = tuple(range(len(responses)))
    return Preference(prompt, responses, ranks, None, "s", "data.jsonl:1")._replace(**fields)


def texts(tokenizer, dataset, row=0):
    return [tokenizer.decode(dataset.prompt(row)).replace(" ", ""), *decoded(tokenizer, dataset, row)]


def decoded(tokenizer, dataset, row=0):
    return ["".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in dataset.responses(row)]


def test_a_string_prompt_becomes_the_users_message(tokenizer):
    wrapped = tokenize([make("hi", "yes", "no")], tokenizer)
    given = tokenize([make(({"role": "user", "content": "hi"},), "yes", "no")], tokenizer)
    assert texts(tokenizer, wrapped) == ["<s>u:hi<e>\n<s>a:", "yes<e>\n", "no<e>\n"]
    assert wrapped.prompt_tokens.tolist() == given.prompt_tokens.tolist()


@pytest.mark.parametrize(
    ("end_token", "responses"),
    [("template", ["yes<e>\n", "no<e>\n"]), ("eos_only", ["yes<e>", "no<e>"]), ("none", ["yes", "no"])],
)
def test_what_ends_a_response(tokenizer, end_token, responses):
    assert (
        decoded(tokenizer, tokenize([make("hi", "yes", "no")], tokenizer, end_token=end_token)) == responses
    )


def test_the_end_token_is_scored_although_it_is_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    dataset = tokenize([make("hi", "yes", "no")], tokenizer)
    assert [EOS in ids for ids in dataset.responses(0)] == [True, True]


@pytest.mark.parametrize(("end_token", "ending"), [("template", [EOS]), ("eos_only", [EOS]), ("none", [])])
def test_without_a_template_strings_are_joined_as_they_are(tokenizer, end_token, ending):
    tokenizer.chat_template = None
    dataset = tokenize([make("The film is", " good", " bad")], tokenizer, end_token=end_token)
    raw = tokenizer("The film is")["input_ids"]
    assert dataset.prompt(0).tolist() == raw
    assert dataset.responses(0)[0].tolist() == tokenizer(" good")["input_ids"] + ending


def test_without_a_template_a_conversation_is_an_error(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data.jsonl:1: the prompt is a conversation.*allowed"):
        tokenize([make(({"role": "user", "content": "hi"},), "a", "b")], tokenizer)


def test_a_given_template_replaces_the_tokenizers_own(tokenizer):
    template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    dataset = tokenize([make("hi", "yes", "no")], tokenizer, chat_template=template, end_token="eos_only")
    assert texts(tokenizer, dataset) == ["[hi][", "yes<e>", "no<e>"]
    assert dataset.fingerprint != tokenize([make("hi", "yes", "no")], tokenizer).fingerprint


def test_a_template_that_writes_the_date_writes_the_one_that_is_given(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ strftime_now('%Y') }}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}{{ strftime_now('%Y') }}[{% endif %}"
    )
    rows = [make("hi", "yes", "no")]
    default, given = tokenize(rows, tokenizer), tokenize(rows, tokenizer, template_date="2031-02-03")
    assert texts(tokenizer, default)[0] == "2024[hi]2024["
    assert texts(tokenizer, given)[0] == "2031[hi]2031["
    assert default.fingerprint != given.fingerprint
    assert [tokenizer.decode(ids) for ids in tokenize_prompts(["hi"], tokenizer)] == [
        tokenizer.decode(default.prompt(0))
    ]


def test_a_template_that_opens_the_turn_otherwise_than_it_writes_it_shares_what_comes_before(tokenizer):
    """As thinking templates do: the opened turn differs from the same turn once it is closed."""
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if add_generation_prompt %}T{% endif %}"
        "{% if messages|length > 1 %}F{{ messages[1]['content'] }}{% endif %}"
    )
    fine = make("hi", "x", "y", location="data.jsonl:9")
    dataset = tokenize([make("hi", "x", "y"), fine], tokenizer)
    assert texts(tokenizer, dataset) == ["hi", "Fx", "Fy"]
    ((remark, count),) = dataset.remarks.items()
    assert "by 'T', with which its written turns do not begin" in remark
    assert "data.template_kwargs" in remark
    assert (count, dataset.first_remarks[remark]) == (2, "data.jsonl:1")
    assert dataset.scored is None


def test_texts_that_a_template_has_written_already_are_counted(tokenizer):
    """ChatML in the prompt's text and at the responses' end: the template writes both once more."""
    in_prompt = make("<s>u:hi<e>\n<s>a:", "x", "y", location="data.jsonl:4")
    in_response = make(({"role": "user", "content": "hi"},), "x<e>", ({"role": "assistant", "content": "y"},))
    plain = make("a < b, <e, s> and [e]", "x", "y")
    dataset = tokenize([plain, in_prompt, in_response], tokenizer)
    words = "texts have {} in them, a special token, as if a chat template had written them already"
    assert dataset.remarks == {words.format("<s>"): 1, words.format("<e>"): 1}
    assert dataset.first_remarks[words.format("<s>")] == "data.jsonl:4"


def test_a_template_that_refuses_a_conversation_is_counted(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    system = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"})
    dataset = tokenize([make(system, "a", "b"), make("hi", "a", "b")], tokenizer)
    assert dataset.dropped == {"template_error": 1}
    said = dataset.first_dropped["template_error"]
    assert "no system role" in said
    assert "data.chat_template" in said
    assert "null" not in said
    assert dataset.origin.tolist() == [1]


def test_a_template_that_takes_null_for_text_is_told_from_others(tokenizer):
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'][0] + ':' + turn['content'] + '<e>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    prompt = ({"role": "user", "content": "hi"}, call, {"role": "tool", "content": "it is there"})
    dataset = tokenize([make(prompt, "a", "b"), make("hi", "a", "b")], tokenizer)
    said = dataset.first_dropped["template_error"]
    assert "a message has no content, which this template reads" in said
    assert "data.chat_template" in said


# prompt "<s>u:hi<e>\n<s>a:" has 10 tokens, a response of n characters n + 2
@pytest.mark.parametrize(
    ("truncation", "lengths", "dropped"),
    [
        ("drop", [(10, 4, 3)], {"too_long": 1}),
        ("truncate_prompt_left", [(10, 4, 3)], {"too_long_to_cut": 1}),
        ("truncate_response_right", [(10, 4, 3), (10, 6, 3)], {}),
    ],
)
def test_truncation_policies(tokenizer, truncation, lengths, dropped):
    rows = [make("hi", "ab", "c"), make("hi", "abcdefg", "c")]
    dataset = tokenize(rows, tokenizer, max_length=16, truncation=truncation)
    got = [(len(dataset.prompt(i)), *map(len, dataset.responses(i))) for i in range(len(dataset))]
    assert got == lengths
    assert dataset.dropped == dropped
    assert dataset.num_truncated == len(lengths) - 1
    assert dataset.response_lengths.tolist() == [list(mine[1:]) for mine in lengths]


def test_the_prompt_keeps_its_end_and_the_response_its_start(tokenizer):
    rows = [make("hi", "abcdefg", "c")]
    right = tokenize(rows, tokenizer, max_length=16, truncation="truncate_response_right")
    rows = [make("oh hi", "abcdefg", "c")]
    left = tokenize(rows, tokenizer, max_length=19, truncation="truncate_prompt_left")
    assert texts(tokenizer, left)[0] == "<s>u:hi<e>\n<s>a:"
    assert left.remarks == {"the beginning of the prompt's last turn is cut off": 1}
    assert decoded(tokenizer, right) == ["abcdef", "c<e>\n"]


@pytest.mark.parametrize(
    ("truncation", "row", "reason"),
    [
        ("truncate_prompt_left", make("hi", "a" * 30, "b"), "response_too_long"),
        ("truncate_response_right", make("h" * 30, "a", "b"), "prompt_too_long"),
        ("truncate_response_right", make("hi", "aaaaaaaab", "aaaaaaaac"), "identical_after_truncation"),
    ],
)
def test_what_truncation_cannot_save_is_dropped_and_counted(tokenizer, truncation, row, reason):
    rows = [make("hi", "a", "b"), row]
    assert tokenize(rows, tokenizer, max_length=16, truncation=truncation).dropped == {reason: 1}


def test_what_fits_exactly_is_kept_and_one_token_more_is_not(tokenizer):
    rows = [make("hi", "ab", "c")]  # 10 and 4
    assert tokenize(rows, tokenizer, max_length=14).dropped == {}
    with pytest.raises(ValueError, match=r"too_long .*10 \+ 4 tokens, allowed are 13"):
        tokenize(rows, tokenizer, max_length=13)


@pytest.mark.parametrize(
    ("truncation", "row", "max_length", "reason"),
    [
        ("truncate_prompt_left", make("hi", "a" * 14, "b"), 16, "response_too_long"),
        ("truncate_prompt_left", make("hi", "a" * 13, "b"), 16, "too_long_to_cut"),
        ("truncate_response_right", make("hi", "aa", "bb"), 10, "prompt_too_long"),
        ("truncate_response_right", make("hi", "aa", "bb"), 11, None),
        ("truncate_response_right", make("hi", "aa", "ab", "bb"), 11, None),
    ],
)
def test_each_reason_begins_where_there_is_no_room_left(tokenizer, truncation, row, max_length, reason):
    dataset = tokenize([make("", "w", "x"), row], tokenizer, max_length=max_length, truncation=truncation)
    assert dataset.dropped == ({} if reason is None else {reason: 1})
    if reason is None:
        assert set(dataset.responses(1)[0].tolist()) == set(tokenizer("a")["input_ids"])


@pytest.mark.parametrize(("max_length", "kept"), [(9, "defghi"), (4, "i"), (3, None)])
def test_without_a_template_a_prompt_keeps_what_the_longest_response_leaves(tokenizer, max_length, kept):
    """Responses of 3 and 2 tokens with their end."""
    tokenizer.chat_template = None
    rows = [make("abcdefghi", "yy", "n"), make("a", "x", "y")]
    dataset = tokenize(rows, tokenizer, max_length=max_length, truncation="truncate_prompt_left")
    if kept is None:
        assert dataset.dropped == {"response_too_long": 1}
        return
    assert texts(tokenizer, dataset) == [kept, "yy<e>", "n<e>"]
    assert dataset.remarks == {"the beginning of the prompt is cut off": 1}


def test_a_prompt_that_is_cut_leaves_room_for_bos(tokenizer):
    tokenizer.chat_template = None
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    rows = [make("abcdefghi", "yy", "n")]
    dataset = tokenize(rows, tokenizer, max_length=9, truncation="truncate_prompt_left")
    assert texts(tokenizer, dataset) == ["<s>efghi", "yy<e>", "n<e>"]


def test_a_response_alone_may_be_cut(tokenizer):
    dataset = tokenize(
        [make("hi", "yesyesyes")], tokenizer, max_length=16, truncation="truncate_response_right"
    )
    assert len(dataset.prompt(0)) + len(dataset.responses(0)[0]) == 16
    assert dataset.num_truncated == 1


def test_a_prompt_or_a_response_without_tokens_is_left_out(tokenizer):
    tokenizer.chat_template = None
    rows = [make("hi", "yes", "no"), make("hi", "", "no"), make("", "yes", "no")]
    dataset = tokenize(rows, tokenizer, end_token="none")
    assert dataset.origin.tolist() == [0]
    assert dataset.dropped == {"no_tokens": 2}


def test_a_template_that_is_none_is_named_by_where_it_comes_from(tokenizer):
    with pytest.raises(ValueError, match=r"data\.chat_template"):
        tokenize([make("hi", "yes", "no")], tokenizer, chat_template="{% if %}")
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ValueError, match="the tokenizer's chat template"):
        tokenize([make("hi", "yes", "no")], tokenizer)


def test_an_added_token_that_is_not_called_special_ends_a_response(tokenizer):
    tokenizer.add_tokens(["<end>"])
    template = tokenizer.chat_template.replace("<e>", "<end>")
    dataset = tokenize([make("hi", "yes", "no")], tokenizer, end_token="eos_only", chat_template=template)
    assert decoded(tokenizer, dataset) == ["yes<end>", "no<end>"]


def test_prompts_answers_and_contexts_are_as_many(tokenizer):
    with pytest.raises(ValueError, match="zip"):
        tokenize_answers(["hi", "ho"], ["yes"], tokenizer)
    with pytest.raises(ValueError, match="zip"):
        tokenize_prompts(["hi", "ho"], tokenizer, contexts=[None])


def test_rows_are_the_same_whatever_is_encoded_at_a_time(tokenizer, monkeypatch):
    rows = [make("hi", "a" * n, "b") for n in (1, 30, 2, 3, 4)]
    whole = tokenize(rows, tokenizer, max_length=16)
    monkeypatch.setattr("dpo.data.tokenization._CHUNK", 2)
    assert tokenize(rows, tokenizer, max_length=16).fingerprint == whole.fingerprint
    assert whole.origin.tolist() == [0, 2, 3, 4]


def test_the_defaults_are_those_of_the_settings(tokenizer):
    rows, given = [make("hi", "a", "b")], DataConfig()
    named = tokenize(
        rows,
        tokenizer,
        max_length=given.max_length,
        truncation=given.truncation,
        end_token=given.end_token,
        template_date=given.template_date,
    )
    assert named.fingerprint == tokenize(rows, tokenizer).fingerprint


def test_a_prompt_that_cannot_be_written_is_named_by_its_number(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^prompt 2: the prompt is a conversation"):
        tokenize_prompts(["hi", ({"role": "user", "content": "hi"},)], tokenizer)
    with pytest.raises(ValueError, match=r"^prompt 2: the prompt is a conversation"):
        tokenize_answers(["hi", ({"role": "user", "content": "hi"},)], ["a", "b"], tokenizer)


def test_without_a_template_a_space_at_the_end_belongs_to_the_response(tokenizer):
    tokenizer.chat_template = None
    found = tokenize_prompts(["hi  ", "  ", "hi"], tokenizer)
    assert found == [tokenizer(text)["input_ids"] for text in ("hi", "  ", "hi")]


def test_an_answer_is_the_conversation_with_its_turn_closed(tokenizer):
    (ids,) = tokenize_answers(["hi"], ["yes"], tokenizer)
    assert tokenizer.decode(ids).replace(" ", "") == "<s>u:hi<e>\n<s>a:yes<e>\n"
    tokenizer.chat_template = None
    (ids,) = tokenize_answers(["hi "], ["yes"], tokenizer)
    assert ids == [*tokenizer("hi yes")["input_ids"], EOS]


def test_error_lists_every_long_preference(tokenizer):
    rows = [make("hi", "a" * n, "b", location=f"data.jsonl:{n}") for n in (1, 30, 2, 40)]
    with pytest.raises(ValueError, match=r"(?s)2 preferences are longer.*:30: 42.*:40: 52") as caught:
        tokenize(rows, tokenizer, max_length=16, truncation="error")
    assert "Raise max_length" in str(caught.value)


def test_unknown_policies_name_what_is_allowed(tokenizer):
    with pytest.raises(ValueError, match=r"truncation is 'keep_end'; allowed are drop, error"):
        inspect.unwrap(tokenize)([make("hi", "a", "b")], tokenizer, truncation="keep_end")


def test_ragged_rankings_keep_ranks_and_scores(tokenizer):
    rows = [
        make("hi", "a", "bb", "ccc", ranks=(0, 0, 1), scores=(2.0, 2.0, 1.0)),
        make("hi", "a"),
    ]
    dataset = tokenize(rows, tokenizer)
    assert dataset.num_responses.tolist() == [3, 1]
    assert dataset.response_lengths.tolist() == [[3, 4, 5], [3, 0, 0]]
    assert dataset.ranks.tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(dataset.scores, np.array([2, 2, 1, np.nan], np.float32))


def test_the_fingerprint_is_a_function_of_everything_that_counts(tokenizer):
    rows = [make("hi", "a", "b"), make("ho", "c", "d")]
    variants = [
        tokenize(rows, tokenizer),
        tokenize(rows[::-1], tokenizer),
        tokenize(rows[:1], tokenizer),
        tokenize(rows, tokenizer, end_token="none"),
        tokenize(rows, tokenizer, max_length=99),
        tokenize([rows[0]._replace(ranks=(0, 0)), rows[1]], tokenizer),
        tokenize([rows[0]._replace(scores=(1.0, 0.0)), rows[1]], tokenizer),
    ]
    assert len({dataset.fingerprint for dataset in variants}) == len(variants)
    assert tokenize(rows, tokenizer).fingerprint == variants[0].fingerprint


@pytest.mark.slow
def test_token_ids_are_those_of_trl_on_real_pairs():
    golden = SHARED / "golden" / "trl_trajectory.json"
    if not golden.is_file():
        pytest.skip(f"{golden} is not there (DPO_SHARED_DIR names its folder)")
    from dpo.huggingface.tokenizer_files import load_tokenizer

    rows = read_preferences(SHARED / "data" / "hh_pairs_512.jsonl", limit=40).preferences
    dataset = tokenize(rows, load_tokenizer("embedded:smollm2-135m-instruct"))
    examples = json.loads(golden.read_text())["examples"]
    assert [example["line"] for example in examples] == list(range(40))
    for row, example in enumerate(examples):
        assert dataset.prompt(row).tolist() == example["prompt_ids"]
        ids = [response.tolist() for response in dataset.responses(row)]
        assert ids == [example["chosen_ids"], example["rejected_ids"]]
