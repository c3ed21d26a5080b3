"""Responses of several turns, templates that open blocks or mark turns, fields that templates leave out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import make_tokenizer
from transformers import BatchEncoding

from dpo.data.preferences import Preference
from dpo.data.rows import read_row
from dpo.data.tokenization import tokenize, tokenize_prompts

ASK = ({"role": "user", "content": "q"},)
CHATML = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>a:{% generation %}{{ m.content }}<e>"
    "{% endgeneration %}\n{% else %}<s>{{ m.role[0] }}:{{ m.content }}<e>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
LAST_HAS_BLOCK = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{% if m.role == 'assistant' and loop.last %}(){% endif %}"
    "{{ m.content }}<e>\n{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
)
OPENS_BLOCK = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content.split(')')[-1] }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:({% endif %}"
)
REASONS = (
    "{% for m in messages %}<s>{{ m.role[0] }}:"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<e>\n{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
)


def say(*texts, role="assistant"):
    roles = (role, "user") if role == "assistant" else ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))


def make(*responses, prompt=ASK, **fields):
    ranks = tuple(range(len(responses)))
    return Preference(prompt, responses, ranks, None, "s", "d.jsonl:1")._replace(**fields)


def encode(rows, template, **settings):
    return tokenize(rows, make_tokenizer(), chat_template=template, **settings)


def shown(dataset, row=0):
    """The prompt, and of each response the scored characters, with a bar where they are interrupted."""
    tokenizer = make_tokenizer()
    found = ["".join(tokenizer.convert_ids_to_tokens(dataset.prompt(row).tolist()))]
    for response, flags in zip(dataset.responses(row), dataset.scored_of(row), strict=True):
        tokens = tokenizer.convert_ids_to_tokens(response.tolist())
        pieces = "".join(t if flag else "\0" for t, flag in zip(tokens, flags, strict=True)).split("\0")
        found.append("|".join(piece for piece in pieces if piece))
    return found


@pytest.mark.parametrize("template", [CHATML, LAST_HAS_BLOCK])
def test_the_assistants_turns_are_scored_and_the_others_read(template):
    dataset = encode([make(say("one?", "2", "done"), "no")], template)
    block = "()" if template == LAST_HAS_BLOCK else ""
    assert shown(dataset) == ["<s>u:q<e>\n<s>a:", f"one?<e>\n|{block}done<e>\n", f"{block}no<e>\n"]
    whole = str(make_tokenizer().decode(dataset.responses(0)[0])).replace(" ", "")
    assert whole == f"one?<e>\n<s>u:2<e>\n<s>a:{block}done<e>\n"
    assert dataset.scored_lengths.tolist() == [[6 + 6 + len(block), 4 + len(block)]]


@pytest.mark.parametrize(
    ("end_token", "scored"), [("eos_only", ["one?<e>|done<e>", "no<e>"]), ("none", ["one?|done", "no"])]
)
def test_what_ends_a_turn_is_scored_as_far_as_it_is_wanted(end_token, scored):
    dataset = encode([make(say("one?", "2", "done"), "no")], CHATML, end_token=end_token)
    assert shown(dataset)[1:] == scored


def test_marks_of_the_template_say_what_is_scored():
    prompt = say("q", "old", "r", role="user")
    dataset = encode([make(say("one?", "2", "done"), "no", prompt=prompt)], MARKED)
    assert shown(dataset)[1:] == ["one?<e>|done<e>", "no<e>"]
    theirs = make_tokenizer().apply_chat_template(
        [*prompt, *say("one?", "2", "done")],
        chat_template=MARKED,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert isinstance(theirs, BatchEncoding)
    ids = [*dataset.prompt(0).tolist(), *dataset.responses(0)[0].tolist()]
    assert ids == theirs["input_ids"]
    mask = np.array(theirs["assistant_masks"], bool)
    assert (
        dataset.responses(0)[0][dataset.scored_of(0)[0]].tolist()
        == np.array(ids)[mask][len("old") + 1 :].tolist()
    )


def test_a_turn_without_weight_is_read_only():
    turns = say("one?", "2", "done")
    silent = ({**turns[0], "weight": 0}, *turns[1:])
    assert shown(encode([make(silent, "no")], CHATML))[1:] == ["done<e>\n", "no<e>\n"]


def test_a_response_cut_between_turns_is_kept_as_long_as_something_is_scored():
    """Ten tokens are left of it: the first turn, and what the user says."""
    turns = say("one?", "2", "done")
    silent = ({**turns[0], "weight": 0}, *turns[1:])
    rows = [make(turns, "no"), make(silent, "no")]
    dataset = encode(rows, CHATML, max_length=19, truncation="truncate_response_right")
    assert shown(dataset)[1:] == ["one?<e>\n", "no<e>\n"]
    assert dataset.dropped == {"nothing_scored_after_truncation": 1}


def test_a_block_that_the_template_opens_ends_the_prompt_before_it():
    dataset = encode([make("(6)six", "(7)seven")], OPENS_BLOCK)
    assert shown(dataset) == ["<s>u:q<e>\n<s>a:", "six<e>\n", "seven<e>\n"]
    said = " ".join(dataset.remarks)
    assert "opens the assistant's turn by '('" in said
    assert "leaves out part of the content of a response" in said


def test_a_block_that_one_response_writes_itself_is_no_part_of_the_prompt():
    dataset = encode([make("(six", "seven")], CHATML + "{% if add_generation_prompt %}({% endif %}")
    assert shown(dataset) == ["<s>u:q<e>\n<s>a:", "six<e>\n", "seven<e>\n"]


def test_a_response_of_which_nothing_is_scored_is_left_out():
    silent = tuple({**turn, "weight": 0} for turn in say("one?", "2", "done"))
    dataset = encode([make("yes", "no"), make("yes", silent), make(silent, "yes")], CHATML)
    assert dataset.origin.tolist() == [0]
    assert dataset.dropped == {"no_tokens": 2}


def test_of_several_answers_the_one_that_differs_first_is_shown():
    hides = (
        "{% if add_generation_prompt %}ab?{% else %}{{ 'ab' if messages[-1].content | length > 2 else 'a' }}!"
        "{% endif %}"
    )
    for answers in (("xx", "yyy"), ("yyy", "xx")):
        with pytest.raises(ValueError, match=r"from character 1 the prompt alone has 'b\?', .* '!'"):
            encode([make(*answers)], hides)


def test_a_template_that_hides_the_answer_names_the_characters_that_differ():
    hides = "{% if add_generation_prompt %}?{% else %}!{{ messages[-1].content | length }}{% endif %}"
    differs = r"does not write.*has '\?', with its response '!2'.*data\.chat_template"
    with pytest.raises(ValueError, match=f"prompt_not_prefix.*{differs}"):
        encode([make("xx", "yyy")], hides)


def test_a_template_that_marks_nothing_is_refused_with_its_reason():
    nothing = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(ValueError, match=r"turns_not_found.*marks 0 turns.*has 1"):
        encode([make("x", "y")], nothing)


# ---- fields ----


def test_a_field_that_the_template_reads_changes_tokens_and_another_is_counted():
    thought = tuple({**turn, "reasoning_content": "so"} for turn in say("yes"))
    with_it = encode([make(thought, "no")], REASONS)
    assert shown(with_it)[1] == "(so)yes<e>\n"
    assert with_it.remarks == {}
    without = encode([make(thought, "no")], CHATML)
    assert shown(without)[1] == "yes<e>\n"
    assert without.remarks == {"the chat template leaves out reasoning_content (of the response)": 1}


REASONING = ("reasoning_content", "thinking", "reasoning")
fields = st.sampled_from([*REASONING, "name", "tool_call_id", "audio_id", "note"])


def seen(there):
    """The fields of a message as a template finds them: its reasoning by each name that templates read."""
    found = next((there[name] for name in REASONING if name in there), None)
    return there if found is None else {"thinking": found, **there, "reasoning_content": found}


@settings(max_examples=25, deadline=None)
@given(read=st.sets(fields), there=st.dictionaries(fields, st.sampled_from("xyz"), min_size=1))
def test_every_field_is_read_or_counted(read, there):
    """Reasoning that stands there by two names is one field as long as both say the same."""
    names = sorted(read)
    reading = "".join(f"{{{{ m.{name} or '' }}}}|" for name in names)
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + reading)
    dataset = encode([make(({"role": "assistant", "content": "yes", **there},), "no")], template)
    written = [seen(there).get(name, "") for name in names]
    assert shown(dataset)[1] == f"yes{''.join(f'{text}|' for text in written)}<e>\n"
    left_out = set()
    for name in there:
        same = REASONING if name in REASONING else (name,)
        rest = {n: text for n, text in there.items() if n not in same or text != there[name]}
        if [seen(rest).get(n, "") for n in names] == written:
            left_out.add(f"the chat template leaves out {name} (of the response)")
    assert set(dataset.remarks) == left_out


def call(city):
    function = {"name": "f", "arguments": {"city": city}}
    return (
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
    )


def test_tool_calls_reach_the_template_or_the_row_is_left_out():
    assert shown(encode([make(call("A"), call("B"))], REASONS))[1:] == [
        '{"city": "A"}<e>\n',
        '{"city": "B"}<e>\n',
    ]
    dataset = encode([make(call("A"), call("B")), make("x", "y")], CHATML)
    assert dataset.dropped == {"tool_calls_not_shown": 1}
    assert "data.chat_template" in dataset.first_dropped["tool_calls_not_shown"]


def test_tools_reach_the_template_or_the_row_is_left_out():
    rows = [make("x", "y", context={"tools": [{"name": "f"}]}), make("x", "y")]
    dataset = encode(rows, "{% if tools %}<s>T{{ tools[0].name }}{% endif %}" + CHATML)
    assert shown(dataset)[0].startswith("<s>Tf<s>u:q")
    assert encode(rows, CHATML).dropped == {"tools_not_shown": 1}


def test_arguments_of_settings_and_rows_reach_the_template():
    template = "{{ mode }}" + CHATML
    rows = [make("x", "y"), make("x", "y", context={"chat_template_kwargs": {"mode": "R"}})]
    dataset = encode(rows, template, template_kwargs={"mode": "S"})
    assert [shown(dataset, row)[0][0] for row in (0, 1)] == ["S", "R"]
    assert dataset.fingerprint != encode(rows, template).fingerprint
    (ids,) = tokenize_prompts([ASK], make_tokenizer(), chat_template=template, template_kwargs={"mode": "S"})
    assert ids == dataset.prompt(0).tolist()


def test_parts_of_text_are_written_as_their_text():
    prompt = ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},)
    assert shown(encode([make("x", "y", prompt=prompt)], CHATML))[0] == "<s>u:ab<e>\n<s>a:"


def test_text_arguments_are_not_quoted_twice():
    function = {"name": "f", "arguments": '{"city": "A"}'}
    text = ({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},)
    assert shown(encode([make(text, "no")], REASONS))[1] == '{"city": "A"}<e>\n'


@pytest.mark.parametrize("nothing", [[], "[]", "", None])
def test_no_tool_calls_are_none_in_any_spelling(nothing):
    turn = {"role": "assistant", "content": "yes", "tool_calls": nothing, "function_call": None}
    row = {"prompt": list(ASK), "chosen": [turn], "rejected": "no"}
    dataset = encode([read_row(row, location="f:1", source="f").preference], CHATML)
    assert shown(dataset)[1:] == ["yes<e>\n", "no<e>\n"]
    assert not dataset.remarks


def test_tool_calls_may_be_json_text():
    (turn,) = call("A")
    row = {"prompt": list(ASK), "chosen": [{**turn, "tool_calls": json.dumps(turn["tool_calls"])}]}
    read = read_row({**row, "rejected": "no"}, location="f:1", source="f").preference
    assert shown(encode([read], REASONS))[1] == '{"city": "A"}<e>\n'


@pytest.mark.parametrize("name", ["function_call", "function_calls"])
def test_calls_by_other_names_are_shown_or_the_row_is_left_out(name):
    turn = ({"role": "assistant", "content": "", name: "f(city='A')"},)
    assert encode([make(turn, "no"), make("x", "y")], CHATML).dropped == {f"{name}_not_shown": 1}
    shows = CHATML.replace("m.content }}", "m.content }}{{ m." + name + " }}")
    assert shown(encode([make(turn, "no")], shows))[1] == "f(city='A')<e>\n"
    empty = ({"role": "assistant", "content": "yes", name: ""},)
    assert not encode([make(empty, "no")], CHATML).dropped


PARTS = [
    {"type": "thinking", "thinking": "why"},
    {"type": "thinking", "thinking": [{"type": "text", "text": "why"}]},
    {"type": "reasoning", "text": "why"},
    {"type": "reasoning", "reasoning": "why"},
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_parts_of_reasoning_are_reasoning_to_a_template_of_texts(part):
    """They are no text of the answer, and where a template has no place for them that is said."""
    turn = {"role": "assistant", "content": [part, {"type": "text", "text": "yes"}]}
    read = read_row({"prompt": list(ASK), "chosen": [turn], "rejected": "no"}, location="f:1", source="f")
    dataset = encode([read.preference], REASONS)
    assert (shown(dataset)[1], dataset.remarks) == ("(why)yes<e>\n", {})
    dataset = encode([read.preference], CHATML)
    assert shown(dataset)[1] == "yes<e>\n"
    assert dataset.remarks == {"the chat template leaves out parts of reasoning (of the response)": 1}


def test_an_argument_that_opens_the_assistants_turn_is_not_left_out():
    """As thinking templates' that is off: what it changes is the end of the prompt."""
    template = CHATML.replace("<s>a:{% endif %}", "<s>a:{% if off %}-{% endif %}{% endif %}")
    assert template != CHATML
    off, unread = {"chat_template_kwargs": {"off": True}}, {"chat_template_kwargs": {"other": True}}
    dataset = encode([make("-x", "-y", context=off), make("-x", "-y", context=unread)], template)
    assert [shown(dataset, row)[0][-1] for row in (0, 1)] == ["-", ":"]
    assert dataset.remarks == {"the chat template leaves out chat_template_kwargs.other": 1}


# ---- odd rows ----


def test_identical_responses_are_left_out_and_counted():
    dataset = encode([make("x", "x"), make("x", "y"), make("x", "x", "y")], CHATML)
    assert dataset.dropped == {"identical_responses": 1}
    assert dataset.origin.tolist() == [1, 2]


def test_the_oldest_turns_go_first_and_the_system_text_stays():
    prompt = ({"role": "system", "content": "S"}, *say("aaaa", "bbbb", "cc dd", role="user"))
    row = make("x", "y", prompt=prompt)
    whole = encode([row], CHATML)
    length = len(whole.prompt(0)) + 3
    shorter = encode([row], CHATML, max_length=length - 1, truncation="truncate_prompt_left")
    assert shown(shorter)[0] == "<s>s:S<e>\n<s>u:cc dd<e>\n<s>a:"
    assert shorter.remarks == {"oldest turns of the prompt are left out": 1}
    shortest = encode([row], CHATML, max_length=20, truncation="truncate_prompt_left")
    assert shown(shortest)[0] == "<s>s:S<e>\n<s>u:dd<e>\n<s>a:"
    assert shortest.num_truncated == 1
    tight = encode([row, make("x", "y")], CHATML, max_length=18, truncation="truncate_prompt_left")
    assert tight.dropped == {"too_long_to_cut": 1}


def test_without_a_template_a_cut_prompt_keeps_bos():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    rows = [make("x", "y", prompt="abcdefgh")]
    whole = tokenize(rows, tokenizer)
    cut = tokenize(rows, tokenizer, max_length=len(whole.prompt(0)), truncation="truncate_prompt_left")
    bos = [token for token in whole.prompt(0).tolist()[:1] if token == tokenizer.bos_token_id]
    assert cut.prompt(0).tolist() == bos + whole.prompt(0).tolist()[-(len(cut.prompt(0)) - len(bos)) :]


def test_a_prompt_for_sampling_has_the_tools_of_its_row():
    template = "{% if tools %}T{{ tools[0].name }}{% endif %}" + CHATML
    contexts = [None, {"tools": [{"name": "f"}]}]
    found = tokenize_prompts([ASK, ASK], make_tokenizer(), chat_template=template, contexts=contexts)
    assert len(found[1]) == len(found[0]) + 2


CALLS = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
IN_PIECES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>a:{% generation %}{{ m.reasoning_content }}"
    "{% endgeneration %}|{% generation %}{{ m.content }}<e>{% endgeneration %}\n"
    "{% else %}<s>{{ m.role[0] }}:{{ m.content }}<e>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def of_transformers(turns, template, tools=None):
    """Ids, and which of them it takes for the assistant's."""
    found = make_tokenizer().apply_chat_template(
        [dict(turn) for turn in turns],
        chat_template=template,
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert isinstance(found, BatchEncoding)
    return found["input_ids"], np.array(found["assistant_masks"], bool)


def whole(dataset, row=0, response=0):
    return [*dataset.prompt(row).tolist(), *dataset.responses(row)[response].tolist()]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": "", "name": None}])
def test_a_null_in_a_message_is_written_as_transformers_writes_it(content):
    """It prints nothing, where a template that joins it as text would write the word None."""
    turn = {"role": "assistant", **content, "tool_calls": [CALL]}
    row = {"prompt": list(ASK), "chosen": [turn], "rejected": "no"}
    dataset = encode([read_row(row, location="f:1", source="f").preference], CALLS)
    assert shown(dataset)[1] == "[f]<e>\n"
    assert whole(dataset) == of_transformers([*ASK, turn], CALLS)[0]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_reaches_a_template_by_whichever_name_it_reads(name, read):
    template = REASONS.replace("reasoning_content", read)
    turn = {"role": "assistant", "content": "yes", name: "why"}
    dataset = encode([make((turn,), "no")], template)
    assert shown(dataset)[1] == "(why)yes<e>\n"
    assert whole(dataset) == of_transformers([*ASK, turn], template)[0]
    assert not dataset.remarks


def reason(*texts):
    return tuple(
        {**turn, "reasoning_content": f"r{turn['content']}"} if turn["role"] == "assistant" else turn
        for turn in say(*texts)
    )


def test_all_pieces_of_a_turn_that_the_template_marks_are_scored():
    prompt = (*ASK, *reason("old"), *ASK)
    turns = reason("one?", "2", "done")
    dataset = encode([make(turns, reason("no"), prompt=prompt)], IN_PIECES)
    assert shown(dataset)[1:] == ["rone?|one?<e>|rdone|done<e>", "rno|no<e>"]
    ids, mask = of_transformers([*prompt, *turns], IN_PIECES)
    assert whole(dataset) == ids
    assert dataset.scored_of(0)[0].tolist() == mask[len(dataset.prompt(0)) :].tolist()


def test_marks_in_pieces_do_not_say_which_turn_has_no_weight():
    turns = reason("one?", "2", "done")
    with pytest.raises(ValueError, match=r"marks 4 pieces of the assistant's 2 turns .* have the weight 0"):
        encode([make(({**turns[0], "weight": 0}, *turns[1:]), reason("no"))], IN_PIECES)


@pytest.mark.parametrize("role", ["system", "tool", "user"])
def test_messages_that_the_template_leaves_out_are_counted(role):
    """Of the prompt, and of a response of several turns."""
    template = CHATML.replace("<s>", f"{{% if m.role != '{role}' %}}<s>", 1).replace(
        "<e>\n", "<e>\n{% endif %}", 1
    )
    said = {"role": role, "content": "Be kind."}
    turns = (say("one?")[0], said, say("done")[0])
    prompt = (*ASK, say("old")[0], said) if role != "system" else (said, *ASK)
    dataset = encode(
        [
            make("yes", "no", prompt=prompt),
            make(turns, "no"),
            make("yes", "no", prompt=say("q", role="user")),
        ],
        template,
    )
    assert (
        dataset.remarks.pop(f"the chat template leaves out the content of {role} messages (of the prompt)")
        >= 1
    )
    assert (
        dataset.remarks.pop(f"the chat template leaves out the content of {role} messages (of the response)")
        == 1
    )
    assert not dataset.remarks


def test_a_content_that_is_written_in_another_form_is_not_taken_for_left_out():
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    )
    turns = (say("one?")[0], {"role": "tool", "content": 'a "b"'}, say("done")[0])
    assert not encode([make(turns, "no")], template).remarks


def test_reasoning_that_is_stripped_from_earlier_turns_is_counted():
    template = CHATML.replace("m.content", "(m.content if loop.last else m.content.split(')')[-1])")
    turns = say("(a)one?", "2", "(b)done")
    dataset = encode(
        [make(turns, "no"), make("yes", "no", prompt=say("q", "(c)old", "r", role="user"))], template
    )
    assert shown(dataset)[1] == "one?<e>\n|(b)done<e>\n"
    assert dataset.remarks == {
        "the chat template leaves out part of the content of a response": 1,
        "the chat template leaves out part of what the assistant says in the prompt": 1,
    }


def test_of_templates_by_name_the_one_for_tools_writes_rows_with_tools():
    """As transformers takes them; the others are written by the default one."""
    tokenizer = make_tokenizer()
    shows_tools = "{% if tools %}<s>t:{{ tools[0].name }}<e>\n{% endif %}" + CALLS
    tokenizer.chat_template = {"tool_use": shows_tools, "default": CHATML}  # pyright: ignore[reportAttributeAccessIssue]
    tools = [{"name": "f"}]
    rows = [make("yes", "no"), make("yes", "no", context={"tools": tools}), make("yes", say("a", "b", "c"))]
    dataset = tokenize(rows, tokenizer)
    assert [shown(dataset, row)[0] for row in range(3)] == [
        "<s>u:q<e>\n<s>a:",
        "<s>t:f<e>\n<s>u:q<e>\n<s>a:",
        "<s>u:q<e>\n<s>a:",
    ]
    assert whole(dataset, 1) == of_transformers([*ASK, *say("yes")], shows_tools, tools)[0]
    opened = tokenize_prompts([ASK], tokenizer, contexts=[{"tools": tools}])
    assert opened == [dataset.prompt(1).tolist()]
    tokenizer.chat_template = {"tool_use": shows_tools}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match=r"chat templates tool_use and none named default; .* data.chat_template"
    ):
        tokenize(rows, tokenizer)
