"""Small files of kinds that users have reported trouble with, each with what has to be read from it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dpo.config import DataConfig
from dpo.data.mismatched import add_mismatched
from dpo.training.reading import Dataset, read_dataset

sys.path.append(str(Path(__file__).parents[1] / "data"))
from toy_tokenizer import make_tokenizer

SHOWS_ALL = (
    "{% if tools %}<s>t:{{ tools[0].function.name }}<e>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.name }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<e>\n{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
)


@pytest.fixture
def cases(shared_dir):
    path = shared_dir / "cases"
    if not path.is_dir():
        pytest.skip(f"{path} is not there (set DPO_SHARED_DIR)")
    return path


@pytest.fixture
def read(cases, tmp_path):
    """Reads a file of the cases, with a template that shows all that a message may have."""
    (tmp_path / "all.jinja").write_text(SHOWS_ALL)

    def read(name, *, template=str(tmp_path / "all.jinja"), tokenizer=None, **settings) -> Dataset:
        config = DataConfig(train=str(cases / name), chat_template=template, **settings)
        return read_dataset(config, tokenizer or make_tokenizer(), log=lambda _: None)

    return read


def texts(dataset, row=0):
    """The prompt, and of each response, best first, the characters that are scored."""
    convert = make_tokenizer().convert_ids_to_tokens
    tokens = dataset.tokens
    prompt = "".join(convert(tokens.prompt(row).tolist()))
    both = zip(tokens.responses(row), tokens.scored_of(row), strict=True)
    return prompt, ["".join(convert(response[flags].tolist())) for response, flags in both]


HI = "<s>u:Hi<e>\n<s>a:"
HELLO = ["Hello!<e>\n", "What.<e>\n"]
EGG = ("<s>u:How do I boil an egg?<e>\n<s>a:", ["Eight minutes.<e>\n", "No idea.<e>\n"])
COLOUR = ("<s>u:Name a colour.<e>\n<s>a:", ["Green, like grass.<e>\n", "Green.<e>\n", "Cheese.<e>\n"])
OSLO, PARIS = '{"city": "Oslo"}<e>\n', '{"city": "Paris"}<e>\n'
WEATHER = "<s>t:get_weather<e>\n<s>u:Weather in Oslo?<e>\n<s>a:"
FIRST_ROWS = {
    "question.jsonl": (
        "<s>s:One word.<e>\n<s>u:Which gas do plants take in?<e>\n<s>a:",
        ["The answer is carbon dioxide.<e>\n", "The answer is helium.<e>\n"],
    ),
    "alpaca.jsonl": (
        "<s>u:Translate to German.\nGood morning<e>\n<s>a:",
        ["Guten Morgen, mein Freund<e>\n", "Guten Abend, mein Freund<e>\n"],
    ),
    "system_column.jsonl": (
        "<s>s:Answer only in French.<e>\n<s>u:How do you say hello?<e>\n<s>a:",
        ["Bonjour.<e>\n", "Hello.<e>\n"],
    ),
    "tool_call.jsonl": (WEATHER, [f"Let me look.{OSLO}", f"Let me look.{PARIS}"]),
    "tool_call_null.jsonl": (WEATHER, [OSLO, PARIS]),
    "tool_history.jsonl": (
        f'{WEATHER}{OSLO}<s>t:get_weather{{"celsius": 12}}<e>\n<s>a:',
        ["It is 12 degrees in Oslo.<e>\n", "I do not know.<e>\n"],
    ),
    "json_strings.jsonl": (
        "<s>u:Name a fruit.<e>\n<s>a:",
        ["A pear is a fruit.<e>\n", "A brick is a fruit.<e>\n"],
    ),
    "reasoning.jsonl": ("<s>u:6*7?<e>\n<s>a:", ["(6*7=42)42<e>\n", "(6*7 is 36)36<e>\n"]),
    "content_parts.jsonl": (HI, HELLO),
    "sharegpt.jsonl": (HI, HELLO),
    "helpsteer3.jsonl": (HI, HELLO),
    "arena.jsonl": (HI, HELLO),
    "shp.jsonl": EGG,
    "safe_rlhf.jsonl": EGG,
    "nectar.jsonl": COLOUR,
    "ultrafeedback_raw.jsonl": COLOUR,
    "trajectory.jsonl": ("<s>u:Book a table.<e>\n<s>a:", ["For how many?<e>\nDone.<e>\n", "No.<e>\n"]),
    "string_prompt_conversation.jsonl": (f"<s>s:Be kind.<e>\n{HI}", HELLO),
    "empty_system.jsonl": (f"<s>s:<e>\n{HI}", HELLO),
    "numbers.csv": ("<s>u:2+2?<e>\n<s>a:", ["4<e>\n", "5<e>\n"]),
    "none_text.csv": ("<s>u:Any issues?<e>\n<s>a:", ["None<e>\n", "Several<e>\n"]),
    "nan_score.jsonl": (HI, HELLO),
    "identical.jsonl": ("<s>u:Say hello.<e>\n<s>a:", ["Hello!<e>\n", "No.<e>\n"]),
}
TIES = {"arena.jsonl": 1, "helpsteer3.jsonl": 2}
"""Rows that state no preference, by their place in the file."""


@pytest.mark.parametrize("name", FIRST_ROWS)
def test_a_row_is_read_as_it_is_meant(read, name):
    dataset = read(name)
    assert texts(dataset) == FIRST_ROWS[name]
    assert dataset.tokens.remarks == {}


@pytest.mark.parametrize("name", TIES)
def test_a_tie_stays_a_tie(read, name):
    tokens = read(name).tokens
    row = TIES[name]
    assert tokens.ranks[tokens.row_offsets[row] : tokens.row_offsets[row + 1]].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["tool_call.jsonl", "tool_history.jsonl"])
def test_a_template_that_cannot_show_calls_is_refused(read, name):
    with pytest.raises(ValueError, match=r"tool_calls_not_shown.*data\.chat_template"):
        read(name, template=None)


def test_reasoning_that_a_template_leaves_out_is_counted(read):
    dataset = read("reasoning.jsonl", template=None)
    assert dataset.tokens.remarks == {"the chat template leaves out reasoning_content (of the response)": 1}


def test_a_block_that_the_template_opens_belongs_to_what_is_learned(read, cases):
    dataset = read("think.jsonl", template=str(cases / "opens_think.jinja"))
    prompt, responses = texts(dataset)
    assert prompt.endswith("assistant\n")
    assert [one.startswith("\n42") or one.startswith("\n36") for one in responses] == [True, True]
    opens, leaves_out = sorted(dataset.tokens.remarks, reverse=True)
    assert "opens the assistant's turn by '<think>" in opens
    assert leaves_out == "the chat template leaves out part of the content of a response"


def test_arguments_of_a_template_reach_it(read, cases):
    template = str(cases / "enable_thinking.jinja")
    dataset = read("system_column.jsonl", template=template, template_kwargs={"enable_thinking": False})
    assert texts(dataset)[0].endswith("<think>\n\n</think>\n\n")
    assert texts(dataset)[1][0].startswith("Bonjour.")
    assert dataset.tokens.remarks == {}


def test_an_image_is_refused_by_name(read, tmp_path):
    path = tmp_path / "image.jsonl"
    path.write_text(
        '{"prompt": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], '
        '"chosen": "a", "rejected": "b"}\n'
    )
    with pytest.raises(ValueError, match="image"):
        read(str(path))


def test_identical_responses_are_left_out_and_counted(read):
    dataset = read("identical.jsonl")
    assert (len(dataset.tokens), dataset.tokens.dropped) == (1, {"identical_responses": 3})


def test_a_score_that_nobody_needs_may_be_missing(read):
    dataset = read("nan_score.jsonl")
    assert dataset.location_without_score() is not None, "an objective that reads scores is refused there"


def test_a_prompts_last_space_goes_to_the_responses_without_a_template(read):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    dataset = read("trailing_space.jsonl", template=None, tokenizer=tokenizer)
    prompt, responses = texts(dataset)
    assert (prompt + responses[0]).removesuffix("<e>") == "Q: Capital of Norway?\nA: Oslo"


def test_a_cut_prompt_keeps_system_text_and_what_opens_each_message(read):
    dataset = read("long_prompt.jsonl", truncation="truncate_prompt_left", max_length=60)
    prompt, responses = texts(dataset)
    assert prompt.startswith("<s>s:Always rhyme.<e>\n<s>u:")
    assert prompt.endswith("word59<e>\n<s>a:")
    assert len(dataset.tokens.prompt(0)) + len(dataset.tokens.responses(0)[0]) <= 60
    assert responses == HELLO
    assert dataset.tokens.num_truncated == 1


def test_kto_takes_another_prompts_response(read):
    tokens = read("kto_interleaved.jsonl").tokens
    mismatched = add_mismatched(tokens, seed=0)
    answers = {tuple(tokens.responses(row)[0]): tokens.prompt(row).tobytes() for row in range(len(tokens))}
    for row in range(len(mismatched)):
        other = mismatched.responses(row)[-1]
        assert answers[tuple(other)] != mismatched.prompt(row).tobytes()


def test_an_own_template_is_what_is_trained_with(read, cases):
    dataset = read("shp.jsonl", template=str(cases / "own.jinja"))
    prompt, (better, _) = texts(dataset)
    assert prompt == "<<user>>\nHow do I boil an egg?<</user>>\n<<assistant>>\n"
    assert better == "Eight minutes.<</assistant>>\n"


def test_every_file_has_its_test(cases):
    tested = {
        *FIRST_ROWS,
        "think.jsonl",
        "trailing_space.jsonl",
        "long_prompt.jsonl",
        "kto_interleaved.jsonl",
    }
    there = {path.name for path in cases.iterdir() if path.suffix in (".jsonl", ".csv")}
    assert there <= tested
    assert np.all([(cases / name).is_file() for name in tested])
