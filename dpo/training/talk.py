"""A model that talks as it is trained: its chat template, and the tokens that end its turns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig
from dpo.data.tokenization import tokenize_answers
from dpo.huggingface.pretrained import Pretrained
from dpo.training.reading import given_chat_template


def as_trained(pretrained: Pretrained, data: DataConfig) -> Pretrained:
    """The model with the chat template of the settings, ending where that template ends a turn.

    What is written of it, and what is sampled, then is as it was in training: arguments of the template are
    in it as well, for who gives none. Where the settings name no template the tokenizer's own stays; without
    any, the model is as it came.

    Raises:
      ValueError: when the template cannot be read, or refuses a question and its answer.
    """
    tokenizer = pretrained.tokenizer
    template = given_chat_template(data) or tokenizer.chat_template
    if isinstance(template, str):
        template = with_arguments(template, data.template_kwargs)
    elif template is not None:  # several by name
        template = {name: with_arguments(text, data.template_kwargs) for name, text in template.items()}
    if template != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    end = None if data.end_token == "none" else find_end_of_turn(tokenizer, data)
    known = pretrained.generation_config or {
        name: pretrained.config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if pretrained.config.get(name) is not None
    }
    ends = known.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [token for token in [ends] if token is not None]
    if end is not None and end not in ends:
        known = known | {"eos_token_id": [*ends, end] if ends else end}
    return pretrained._replace(tokenizer=tokenizer, generation_config=known)


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """A chat template that takes these arguments where its caller gives none of their names.

    Names are Jinja's and values JSON's: `dpo.config.data.check_template_arguments` refuses others.
    """
    sets = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in arguments.items()
    ]
    if not sets:
        return template
    # The newline is the block's, by `trim_blocks`: the template begins a line, as it did.
    start = "".join(sets) + "\n"
    return template if template.startswith(start) else start + template


def _literal(value: Any) -> str:
    """A value of a settings file as Jinja writes it."""
    if isinstance(value, str):
        return '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> int | None:
    """The first special token that the tokenizer's chat template puts after an answer; None without one."""
    if tokenizer.chat_template is None:
        return None
    questions, answers = ["Hello", "Hello"], ["Good morning", "42"]
    first, second = tokenize_answers(
        questions,
        answers,
        tokenizer,
        template_date=data.template_date,
        template_characters=data.template_characters,
    )
    pairs = zip(reversed(first), reversed(second), strict=False)
    after = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in reversed(after) if token in special), None)
