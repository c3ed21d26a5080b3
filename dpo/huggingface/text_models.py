"""The text model that a `config.json` describes: the whole model, or a part of one that sees as well.

A model of text and images (`text_config` in its configuration) is trained and scored on text alone, where its
text model is that of a family of `FAMILIES` under longer names. The rest is carried along by `carried`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from dpo.huggingface.families import FAMILIES, WRAPPERS, Family, decoder_config, find_family
from dpo.huggingface.foreign_json import JsonObject, show
from dpo.huggingface.weight_names import SPELLINGS, Rule, Spelling
from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError, told_by

_SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models that are another family on text alone, where the three axes of a position are equal."""


def read_config(config: Mapping[str, Any]) -> tuple[Family, DecoderConfig]:
    """The family and the decoder that a `config.json` describes."""
    require_supported(config)
    text = text_fields(config)
    for quantized in (config, text):
        if quantized.get("quantization_config"):
            raise UserError(
                f"quantization_config is {show(quantized['quantization_config'])}; supported are weights in "
                "float32, bfloat16 and float16, and GGUF files"
            )
    return family_of(config), decoder_config(parse_config(text))


def require_supported(config: Mapping[str, Any]) -> None:
    """Refuse a `config.json` without a `model_type`, or with one that nothing here reads.

    Raises:
      UserError: naming the field, with all that is supported.
    """
    if config.get("model_type") is None:
        raise UserError(f"model_type is not there; supported: {', '.join([*FAMILIES, *WRAPPERS])}")
    if str(config["model_type"]) not in WRAPPERS:
        find_family(str(config["model_type"]))


def family_of(config: Mapping[str, Any], spelling: Spelling = SPELLINGS[0]) -> Family:
    """The family of a configuration's text model; of a part, with the names that it has in the whole."""
    family = find_family(text_fields(config)["model_type"])
    if config["model_type"] not in WRAPPERS:
        return family
    body, head = spelling

    def renamed(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(rule._replace(theirs=_renamed(rule.theirs)) for rule in rules)

    def _renamed(name: str) -> str:
        if name.startswith(family.prefix):
            return body + name.removeprefix(family.prefix)
        return head.removesuffix(".") if name == "lm_head" else name

    rules = family.rules
    assert not callable(rules), "families with rules of their own are no part of a larger model"
    return family._replace(
        architecture=WRAPPERS[config["model_type"]],
        prefix=body,
        rules=renamed(rules),
        constants={_renamed(name): value for name, value in family.constants.items()},
        is_part=True,
    )


def text_fields(config: Mapping[str, Any]) -> JsonObject:
    """The text model's own `config.json`.

    Raises:
      ValueError: where the whole is of a supported kind, and its text model is of no supported family.
    """
    if config.get("model_type") not in WRAPPERS:
        return dict(config)
    whole = parse_config(config)
    fields = whole.text_config.to_dict()
    found = fields["model_type"]
    model_type = _SAME_AS.get(found, found)
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {config['model_type']!r} with a text_config of model_type {show(found)} is not "
            f"supported; supported: {', '.join([*FAMILIES, *_SAME_AS])}"
        )
    rope = fields.get("rope_parameters")
    if rope:  # without images, sections of a rotation turn by the same position
        fields["rope_parameters"] = {key: value for key, value in rope.items() if key not in _SECTIONS}
    return fields | {"model_type": model_type, "tie_word_embeddings": whole.tie_word_embeddings}


_SECTIONS = ("mrope_section", "mrope_interleaved")


def parse_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration as transformers reads it.

    Raises:
      ValueError: whatever it says against its values.
    """
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # transformers makes it, and raises whatever its values lead to
        what = f"the configuration of a {show(config.get('model_type'))} is not valid"
        raise UserError(f"{what}: {told_by(error)}") from error
