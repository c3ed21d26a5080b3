"""Token ids are those that transformers' `apply_chat_template` makes of the same messages."""

import datetime

import numpy as np
import pytest
from family_templates import FAMILIES
from toy_tokenizer import make_tokenizer
from transformers import BatchEncoding

from dpo.data.preferences import Preference
from dpo.data.tokenization import tokenize, tokenize_prompts

TODAY = datetime.date.today().isoformat()
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}


def say(*texts):
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def call(city, content=None):
    function = {"name": "get", "arguments": {"city": city}}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


ASK = say("Weather?")
ANSWER = {"role": "assistant", "content": "It is 12."}
CASES = {
    "plain": (ASK, ("Cold.", "Warm."), None),
    "system": (
        ({"role": "system", "content": "Be brief."}, *say("Hi", "Hello.", "Weather?")),
        ("A", "B"),
        None,
    ),
    "parts": (({"role": "user", "content": [{"type": "text", "text": "Hi"}]},), ("A", "B"), None),
    "reasoning": (ASK, (({**ANSWER, "reasoning_content": "Oslo, so"},), "no"), None),
    "thought": (say("a", "<think>\nx\n</think>\n\nb", "c"), ("<think>\ny\n</think>\n\nd", "e"), None),
    "several": (ASK, (say("-", "Where?", "Oslo", "Cold.")[1:], "No."), None),
    "call": (ASK, ((call("Oslo"),), (call("Rome"),)), {"tools": [TOOL]}),
    "history": (
        (*ASK, call("Oslo"), {"role": "tool", "content": "12", "name": "get"}),
        ("12.", "13."),
        {"tools": [TOOL]},
    ),
    "trajectory": (ASK, ((call("Oslo"), {"role": "tool", "content": "12"}, ANSWER), "no"), {"tools": [TOOL]}),
}
SHOWS_CALLS = {"qwen3", "llama", "hermes"}
SHOWS_PARTS = {"gemma3"}
PAIRS = [
    (family, case) for family in FAMILIES for case in CASES if CASES[case][2] is None or family in SHOWS_CALLS
]


def turns_of(response):
    return ({"role": "assistant", "content": response},) if isinstance(response, str) else response


def theirs(family, case, response, **arguments):
    """What transformers makes of the same, where parts are text that the template does not read as parts."""
    prompt, _, context = CASES[case]
    if case == "parts" and family not in SHOWS_PARTS:
        prompt = say("Hi")
    found = make_tokenizer().apply_chat_template(
        [dict(turn) for turn in (*prompt, *turns_of(response))],
        chat_template=FAMILIES[family],
        tools=(context or {}).get("tools"),
        return_dict=True,
        **arguments,
    )
    assert isinstance(found, BatchEncoding)
    return found


def ours(family, case, **settings):
    prompt, responses, context = CASES[case]
    row = Preference(prompt, responses, (0, 1), None, "s", "d.jsonl:1", context)
    template = FAMILIES[family]
    return tokenize(
        [row], make_tokenizer(), chat_template=template, template_date=TODAY, max_length=4000, **settings
    )


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_prompt_and_response_are_what_transformers_writes(family, case):
    dataset = ours(family, case)
    for response, tokens in zip(CASES[case][1], dataset.responses(0), strict=True):
        whole = [*dataset.prompt(0).tolist(), *tokens.tolist()]
        assert whole == theirs(family, case, response)["input_ids"]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_what_is_scored_is_each_turn_of_the_assistant(family, case):
    """Its text and the end of its turn, and nothing of what others say."""
    dataset, tokenizer = ours(family, case), make_tokenizer()
    for response, tokens, flags in zip(
        CASES[case][1], dataset.responses(0), dataset.scored_of(0), strict=True
    ):
        scored = "".join(tokenizer.convert_ids_to_tokens(tokens[flags].tolist()))
        read = "".join(tokenizer.convert_ids_to_tokens(tokens[~flags].tolist()))
        for turn in turns_of(response):
            text = (turn["content"] or "").split("</think>")[-1].strip()
            assert text in (scored if turn["role"] == "assistant" else read)
        assert "im_start" not in scored
        assert "header" not in scored


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2] is None])
@pytest.mark.parametrize("thinking", [True, False])
def test_what_is_scored_is_what_transformers_says_where_the_template_marks_it(case, thinking):
    arguments = {"enable_thinking": thinking}
    dataset = ours("smollm3", case, template_kwargs=arguments)
    start = len(dataset.prompt(0))
    for response, flags in zip(CASES[case][1], dataset.scored_of(0), strict=True):
        found = theirs("smollm3", case, response, return_assistant_tokens_mask=True, **arguments)
        expected = np.array(found["assistant_masks"], bool)[start:]
        assert flags.tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_prompt_for_sampling_is_what_transformers_opens(family, thinking):
    prompt = CASES["system"][0]
    arguments = {"enable_thinking": thinking}
    (ids,) = tokenize_prompts(
        [prompt],
        make_tokenizer(),
        chat_template=FAMILIES[family],
        template_date=TODAY,
        template_kwargs=arguments,
    )
    expected = make_tokenizer().apply_chat_template(
        list(prompt),
        chat_template=FAMILIES[family],
        add_generation_prompt=True,
        return_dict=True,
        **arguments,
    )
    assert isinstance(expected, BatchEncoding)
    assert ids == expected["input_ids"]


def test_a_template_that_cannot_show_calls_says_so():
    prompt, responses, context = CASES["call"]
    rows = [
        Preference(prompt, responses, (0, 1), None, "s", "d:1", context),
        Preference(prompt, ("x", "y"), (0, 1), None, "s", "d:2"),
    ]
    dropped = tokenize(rows, make_tokenizer(), chat_template=FAMILIES["gemma3"]).dropped
    assert list(dropped) == ["tool_calls_not_shown"] or list(dropped) == ["template_error"]


def test_a_space_at_the_prompts_end_goes_to_the_responses():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<u>", "<e>", "Capital", "?", " ", " Oslo", " Rome", "Oslo"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>", eos_token="<e>")
    row = Preference("Capital? ", ("Oslo", "Rome"), (0, 1), None, "s", "d.jsonl:1")
    dataset = tokenize([row], tokenizer)
    assert [words[i] for i in dataset.prompt(0)] == ["Capital", "?"]
    assert [[words[i] for i in ids] for ids in dataset.responses(0)] == [[" Oslo", "<e>"], [" Rome", "<e>"]]
    assert dataset.remarks == {"a space at the end of the prompt belongs to the responses": 1}
    assert tokenize_prompts(["Capital? "], tokenizer) == [dataset.prompt(0).tolist()]
