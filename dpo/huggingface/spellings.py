"""Configurations and tokenizer files under all the names that their readers know.

transformers 5 keeps rotary parameters in `rope_parameters`; 4, vLLM and mlx-lm read `rope_theta`,
`rope_scaling` and their companions, and silently take 10,000 where they find none. Both are written.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from dpo.huggingface.foreign_json import JsonObject


def spelled_for_all(config: JsonObject) -> JsonObject:
    """A `config.json` that transformers 4 and 5 read alike; what it says already stays."""
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    spelled = {"tie_word_embeddings": parsed.tie_word_embeddings, **config}
    inner = config.get("text_config") or {}
    if "model_type" in inner:
        part = CONFIG_MAPPING[inner["model_type"]].from_dict(inner)
        spelled["text_config"] = inner | _both_ropes(inner["model_type"], part)
    return spelled | _both_ropes(config["model_type"], parsed)


def _both_ropes(model_type: str, parsed: PreTrainedConfig) -> JsonObject:
    """Rotary parameters under both names; nothing where there are none."""
    parameters = getattr(parsed, "rope_parameters", None)
    return _older_rope(model_type, parameters) | {"rope_parameters": parameters} if parameters else {}


def _older_rope(model_type: str, parameters: JsonObject) -> JsonObject:
    """Rotary parameters as transformers 4 names them."""
    names: JsonObject = {}
    if "full_attention" in parameters:  # Gemma 3: one kind for layers that see all, one for the others
        names["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    theta, share = parameters["rope_theta"], parameters.get("partial_rotary_factor")
    names["rope_theta"] = theta
    if share is not None:
        names["partial_rotary_factor"] = share
    if model_type == "gpt_neox":
        names |= {"rotary_emb_base": theta, "rotary_pct": 1.0 if share is None else share}
    kind = parameters.get("rope_type", "default")
    if kind == "default" and "mrope_section" in parameters:  # which 4 reads there
        return names | {"rope_scaling": {k: v for k, v in parameters.items() if k != "rope_theta"}}
    scaling = {
        key: value
        for key, value in parameters.items()
        if key not in ("rope_theta", "partial_rotary_factor", "rope_type", "type") and value is not None
    }
    if kind == "default":
        return names | {"rope_scaling": None}
    if model_type == "phi3":  # which refuses other fields, and reads the length beside them
        original = scaling.pop("original_max_position_embeddings", None)
        names |= {} if original is None else {"original_max_position_embeddings": original}
        return names | {"rope_scaling": {"type": kind, **scaling}}
    return names | {"rope_scaling": {"rope_type": kind, **scaling}}


def respell_tokenizer(directory: Path) -> None:
    """Name the tokenizer's class as both versions do, and put the chat template where each reader looks."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 has a mapping there, and ends with an error
        del config["extra_special_tokens"]
        if extra:
            config["additional_special_tokens"] = extra
    template = directory / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
