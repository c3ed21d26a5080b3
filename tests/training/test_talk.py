"""What is written and sampled of a model talks as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import byte_tokenizer, tiny_config, write_tiny_model

from dpo.config import DataConfig
from dpo.huggingface.pretrained import load_pretrained, open_shapes, stop_tokens
from dpo.huggingface.saving import save_pretrained
from dpo.training.talk import as_trained, find_end_of_turn

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A base model: no chat template, but special tokens for turns."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = None
    model = load_pretrained(write_tiny_model(directory)).model
    config = tiny_config(tokenizer) | {"vocab_size": model.config.vocab_size}
    return save_pretrained(model, directory / "in", hf_config=config, tokenizer=tokenizer)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATE)
    return DataConfig(train="x.jsonl", chat_template=str(path))


def test_a_template_of_the_settings_goes_with_the_model(
    source: Path, data: DataConfig, tmp_path: Path
) -> None:
    given = load_pretrained(source)
    assert given.tokenizer.chat_template is None
    trained = as_trained(given, data)
    assert given.tokenizer.chat_template is None  # the one that was handed in stays as it is
    end: Any = trained.tokenizer.convert_tokens_to_ids("<|end|>")
    eos: Any = trained.tokenizer.eos_token_id
    assert trained.generation_config["eos_token_id"] == [eos, end]
    assert set(stop_tokens(trained)) == {eos, end}
    export = save_pretrained(
        trained.model,
        tmp_path / "out",
        hf_config=trained.config,
        tokenizer=trained.tokenizer,
        generation_config=trained.generation_config,
    )
    again = open_shapes(export)
    assert again.tokenizer.chat_template == TEMPLATE
    assert set(stop_tokens(again)) == {eos, end}
    assert json.loads((export / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert as_trained(again, DataConfig(train="x.jsonl")).generation_config == again.generation_config


ARGUED = """
  {% if think is defined and not think %}<no>{% endif %}{% macro name() %}{{ who.names[0] }}{% endmacro %}
{{ name() }}{{ depth + 1 }}{{ none_given is none }}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ who.mark }}{% endfor %}"""
ARGUMENTS: dict[str, Any] = {
    "think": False,
    "depth": 2,
    "none_given": None,
    "who": {"names": ['Ann "O\'N" {% x %} \\n\n'], "mark": "<|end|>"},
}


def test_arguments_of_the_template_go_with_it(source: Path, tmp_path: Path) -> None:
    """The same text as with them in hand, to the blank; who gives others is heard; and ends are found."""
    path = tmp_path / "argued.jinja"
    path.write_text(ARGUED, encoding="utf-8")
    data = DataConfig(train="x.jsonl", chat_template=str(path), template_kwargs=ARGUMENTS)
    trained = as_trained(open_shapes(source), data)
    messages = [{"role": "user", "content": "Hi"}]
    plain = open_shapes(source).tokenizer
    expected = plain.apply_chat_template(messages, tokenize=False, chat_template=ARGUED, **ARGUMENTS)
    carried = trained.tokenizer
    assert carried.apply_chat_template(messages, tokenize=False) == expected
    assert "<no>" in expected
    others = {**ARGUMENTS, "think": True, "depth": 7}
    assert carried.apply_chat_template(messages, tokenize=False, think=True, depth=7) == (
        plain.apply_chat_template(messages, tokenize=False, chat_template=ARGUED, **others)
    )
    end: Any = carried.convert_tokens_to_ids("<|end|>")
    assert end in stop_tokens(trained)
    again = as_trained(trained, data)
    assert as_trained(again, data).tokenizer.chat_template == again.tokenizer.chat_template


def test_arguments_go_with_each_of_several_templates(source: Path) -> None:
    given = open_shapes(source)
    given.tokenizer.chat_template = {"default": ARGUED, "tool_use": "{{ depth }}"}
    trained = as_trained(
        given, DataConfig(train="x.jsonl", template_kwargs={"depth": 2, "who": ARGUMENTS["who"]})
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert trained.tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "2"
    assert "3" in trained.tokenizer.apply_chat_template(messages, tokenize=False)


def test_without_a_template_nothing_changes(source: Path) -> None:
    given = open_shapes(source)
    assert find_end_of_turn(given.tokenizer, DataConfig()) is None
    assert as_trained(given, DataConfig(train="x.jsonl")).generation_config == given.generation_config


def test_a_turn_ends_with_the_first_special_token_behind_it() -> None:
    tokenizer = byte_tokenizer()
    assert find_end_of_turn(tokenizer, DataConfig()) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert find_end_of_turn(tokenizer, DataConfig()) is None
