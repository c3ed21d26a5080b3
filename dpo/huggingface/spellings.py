"""Configurations and tokenizer files under all the names that their readers know.

transformers 5 keeps rotary parameters in `rope_parameters`; 4, vLLM and mlx-lm read `rope_theta`,
`rope_scaling` and their companions, and silently take 10,000 where they find none. Both are written, and so
is every field that a file leaves to its reader's default: readers have different ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from dpo.huggingface.foreign_json import JsonObject


def spelled_for_all(config: JsonObject) -> JsonObject:
    """A `config.json` that transformers 4 and 5 read alike, vLLM and mlx-lm too; what it says already stays.

    Modules of the source's own code are not named: they are not beside it.
    """
    config = {name: value for name, value in config.items() if name != "auto_map"}
    inner = config.get("text_config") or {}
    if "model_type" not in inner:
        return _spelled(config)
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    return {
        "tie_word_embeddings": parsed.tie_word_embeddings,
        **config,
        "text_config": _spelled(inner),
        **_both_ropes(config["model_type"], parsed),
    }


def _spelled(config: JsonObject) -> JsonObject:
    """The same of one model of text."""
    model_type = config["model_type"]
    parsed = CONFIG_MAPPING[model_type].from_dict(config)
    defaults = {
        name: value
        for name, value in parsed.to_dict().items()
        if name not in _OF_ALL_MODELS and not name.startswith("_") and value is not None
    }
    defaults |= _global_heads(defaults, parsed)
    return defaults | config | _both_ropes(model_type, parsed) | _for_mlx(model_type, parsed)


def _global_heads(fields: JsonObject, parsed: PreTrainedConfig) -> JsonObject:
    """Sizes of heads by layer as published files name them, where transformers says them layer by layer."""
    if fields.pop("per_layer_config", None) is None or "full_attention" not in parsed.layer_types:
        return {}
    by_type: Any = parsed.per_layer_config
    wide = by_type["full_attention"]
    return {"global_head_dim": wide.head_dim, "num_global_key_value_heads": wide.num_key_value_heads}


_OF_ALL_MODELS = PreTrainedConfig().to_dict().keys()


def _for_mlx(model_type: str, parsed: PreTrainedConfig) -> JsonObject:
    """What mlx-lm reads under names of its own, and has wrong defaults for."""
    if model_type == "gpt2":
        return {"n_ctx": parsed.n_positions}
    if model_type not in _PATTERNS or not parsed.sliding_window:
        return {}
    pattern = _PATTERNS[model_type]([kind == "sliding_attention" for kind in parsed.layer_types])
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def _period(windows: Sequence[bool]) -> int | None:
    """The n of which every n-th layer sees all."""
    places = range(1, len(windows) + 1)
    return next((n for n in range(1, len(windows) + 2) if windows == [i % n != 0 for i in places]), None)


def _letters(windows: Sequence[bool]) -> str | None:
    """What is repeated along the layers, L for a window; the last layer sees all whatever it says."""
    if windows[-1]:
        return None
    text = "".join("L" if window else "G" for window in windows[:-1])
    return next((text[:n] for n in range(1, len(text) + 1) if (text[:n] * len(text)).startswith(text)), None)


_PATTERNS: Mapping[str, Callable[[list[bool]], int | str | None]] = {
    "gemma3_text": _period,
    "exaone4": _letters,
}


def _both_ropes(model_type: str, parsed: PreTrainedConfig) -> JsonObject:
    """Rotary parameters under both names; nothing where there are none."""
    parameters = getattr(parsed, "rope_parameters", None)
    if not parameters:
        return {}
    older = {} if model_type in NEWER else _older_rope(model_type, parameters)
    return older | {"rope_parameters": parameters}


NEWER = ("lfm3", "gemma4_text", "gemma4")
"""Models that transformers 4 does not have, and whose rotations it has no names for."""


def _older_rope(model_type: str, parameters: JsonObject) -> JsonObject:
    """Rotary parameters as transformers 4 names them."""
    names: JsonObject = {}
    if "rope_theta" not in parameters and {"full_attention", "sliding_attention"} <= parameters.keys():
        # Gemma 3: one kind for layers that see all, one for the others
        names["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    if "rope_theta" not in parameters:  # of a family that turns nothing
        return names
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
    named_twice = {"type": kind} if model_type == "hunyuan_v1_dense" else {}  # mlx-lm asks for it
    return names | {"rope_scaling": {"rope_type": kind, **named_twice, **scaling}}


def respell_tokenizer(directory: Path) -> None:
    """Name the tokenizer's class as both versions do, and put the chat template where each reader looks."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # names modules that are not beside it
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
