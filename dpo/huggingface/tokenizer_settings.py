"""What a tokenizer's small files may say before transformers makes anything of them: types of every field.

Where a field has another type than it expects, transformers ends with an error of Python that names neither
the file nor the field, or goes on with something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo.huggingface.foreign_json import (
    Rule,
    check_fields,
    either,
    flag,
    list_of,
    mapping_of,
    optional,
    real,
    show,
    text,
    whole,
)
from dpo.outcomes import UserError


def check_tokenizer_file(path: Path, values: Mapping[str, Any]) -> None:
    """A `tokenizer_config.json`, `special_tokens_map.json` or `added_tokens.json`.

    Raises:
      UserError: with the path, every field whose value is not allowed, and what is.
    """
    if path.name == "added_tokens.json":
        check_fields(path, values, dict.fromkeys(values, whole(0, (1 << 31) - 1)))
        return
    if path.name == "special_tokens_map.json":
        check_fields(path, values, _token_fields(_token))
        return
    for name in values:
        if name in ("self", "cls") or callable(getattr(PreTrainedTokenizerBase, name, None)):
            raise UserError(f"{path}: {show(name)} is no field of a tokenizer")
    check_fields(path, values, _CONFIG)


def _token(value: Any) -> str | None:
    """A token, as a text or with what it does to the text around it."""
    if text(value) is None:
        return None
    fits = isinstance(value, dict) and text(value.get("content")) is None
    fits = fits and all(isinstance(value[name], bool) for name in _FLAGS if name in value)
    return None if fits else f"a token: a text of at most 1000 characters, or {_AS_OBJECT}"


def _typed_token(value: Any) -> str | None:
    """The same where an object has to say what it is."""
    allowed = _token(value)
    if allowed is None and isinstance(value, dict) and value.get("__type") != "AddedToken":
        allowed = _token(None)
    return None if allowed is None else f'{allowed}, with "__type": "AddedToken"'


def _token_object(value: Any) -> str | None:
    """A token that has to be an object."""
    return None if isinstance(value, dict) and _token(value) is None else f"a token: {_AS_OBJECT}"


def _templates(value: Any) -> str | None:
    """One chat template, or several by name; what names are allowed is said where they are files."""
    if isinstance(value, list):
        named = [one for one in value if isinstance(one, dict) and isinstance(one.get("name"), str)]
        if len({one["name"] for one in named}) < len(value):
            return _NAMED_TEMPLATES
        value = {one["name"]: one.get("template") for one in named}
    texts = value.values() if isinstance(value, dict) else [value]
    return None if all(isinstance(one, str) for one in texts) else _NAMED_TEMPLATES


def _tokens_by_id(value: Any) -> str | None:
    allowed = mapping_of(_token_object, _MOST_TOKENS)(value)
    if allowed is None and not all(re.fullmatch(r"[0-9]{1,9}", name) for name in value):
        allowed = "an object whose names are token ids"
    return allowed


def _side(value: Any) -> str | None:
    return None if value in ("left", "right") else "'left' or 'right'"


def _nothing(value: Any) -> str | None:
    """Of what transformers alone gives a tokenizer, or would open as a file elsewhere."""
    return None if value in (None, [], {}) else "null"


def _token_fields(token: Rule) -> dict[str, Rule]:
    """Fields that hold tokens."""
    some = list_of(token, _MOST_TOKENS)
    return {
        **dict.fromkeys((f"{name}_token" for name in _NAMED), optional(token)),
        "additional_special_tokens": optional(some),
        "extra_special_tokens": optional(either(some, mapping_of(token, _MOST_TOKENS))),
    }


_MOST_TOKENS = 1 << 17
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_AS_OBJECT = f"an object of content, a text, and true or false as {', '.join(_FLAGS)}"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMED_TEMPLATES = 'a text, or a list of {"name": a text, "template": a text} whose names differ'
_MODULES = either(
    list_of(optional(text), 10), mapping_of(either(optional(text), list_of(optional(text), 10)), 100)
)
_CONFIG: dict[str, Rule] = {
    **_token_fields(_typed_token),
    "model_specific_special_tokens": optional(mapping_of(_typed_token, _MOST_TOKENS)),
    "added_tokens_decoder": _tokens_by_id,
    "chat_template": optional(_templates),
    "chat_control_tokens": optional(list_of(text, _MOST_TOKENS)),
    **dict.fromkeys(("model_max_length", "max_len"), optional(real(-1, 1e40))),
    **dict.fromkeys(("padding_side", "truncation_side"), _side),
    **dict.fromkeys(("model_input_names", "fast_tokenizer_files"), list_of(text, 1000)),
    **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens"), optional(flag)),
    **dict.fromkeys(("add_prefix_space", "add_bos_token", "add_eos_token"), optional(flag)),
    **dict.fromkeys(("legacy", "fix_mistral_regex"), optional(flag)),
    **dict.fromkeys(("tokenizer_class", "processor_class", "name_or_path"), optional(text)),
    "auto_map": optional(_MODULES),
    **dict.fromkeys(("init_inputs", "gguf_file", "vocab", "merges", "post_processor"), _nothing),
    **dict.fromkeys(("tokenizer_object", "tokenizer_padding", "tokenizer_truncation"), _nothing),
    **dict.fromkeys(("_json_padding", "_json_truncation"), _nothing),
}
