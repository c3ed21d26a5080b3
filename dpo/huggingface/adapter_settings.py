"""What an adapter's adapter_config.json may say, and of which of the adapted modules it may say it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dpo.huggingface.config_rules import MAX_LAYERS
from dpo.huggingface.foreign_json import (
    JsonObject,
    check_fields,
    either,
    flag,
    list_of,
    mapping_of,
    optional,
    read_small_json,
    real,
    show,
    text,
    whole,
)
from dpo.outcomes import UserError

PATTERN_SECONDS = 10.0
"""Time for all matches of an adapter's patterns."""
REMEDY = "Merge it with peft, `model.merge_and_unload().save_pretrained(DIR)`, and give DIR as model.source"
"""What opens every adapter that peft can merge, weights of the base that it brings along included."""


def read_adapter_config(path: Path) -> JsonObject:
    """The object in it.

    Raises:
      UserError: with the path, for all in it that is not supported.
    """
    config = read_small_json(path)
    check_fields(path, config, _RULES)
    problems = [
        f"{name} is {show(config.get(name))}; supported: {', '.join(map(repr, allowed))}"
        for name, allowed in _SUPPORTED.items()
        if config.get(name, allowed[0]) not in allowed
    ]
    problems += [
        f"{show(name)[1:-1]} is {show(value)}; supported: not set"
        for name, value in config.items()
        if value and name not in _SUPPORTED and name not in _READ
    ]
    if "lora_alpha" not in config:
        problems.append("lora_alpha is not there; supported: a number above 0")
    problems += [
        problem
        for field in ("rank_pattern", "alpha_pattern")
        for key in config.get(field) or {}
        if (problem := _pattern_problem(field, key))
    ]
    if problems:
        raise UserError("\n  ".join([f"{path}: this adapter is not supported:", *problems]) + f"\n{REMEDY}")
    return config


def base_of(config: JsonObject, path: Path) -> str:
    """Source of the model that an adapter was trained on.

    Raises:
      UserError: when the adapter does not say, or names what no model can be.
    """
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise UserError(f"{path} has no base_model_name_or_path")
    if base.startswith("~") or not base.isprintable():
        raise UserError(
            f"{path}: base_model_name_or_path is {show(base)}; allowed is a path or a hub "
            "id, and no home directory"
        )
    is_here = os.path.exists(base)
    return f"{base}@{revision}" if revision and not is_here and "@" not in base else base


def require_matches(path: Path, config: JsonObject, modules: Sequence[str], *, until: float) -> None:
    """What a configuration says of layers and modules is of those that the tensors adapt.

    Raises:
      UserError: otherwise, or where that takes longer than `until` by the monotonic clock.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or {}:
            require_time(path, field, until)
            pattern = compiled(key)
            if not any(map(pattern.match, modules)):
                raise UserError(
                    f"{path}: {field} has {show(key)}, which is none of the adapted modules, such as "
                    f"{modules[0]}"
                )
    layers = _listed(config.get("layers_to_transform"))
    if not layers:
        return
    patterns = _listed(config.get("layers_pattern"))
    for module in modules:
        if _layer_of(module) not in layers:
            raise UserError(
                f"{path}: layers_to_transform is {show(layers)}; allowed are the layers of the adapted "
                f"modules, and {module} is adapted"
            )
        if patterns and not any(f".{pattern}.{_layer_of(module)}." in f".{module}." for pattern in patterns):
            raise UserError(
                f"{path}: layers_pattern is {show(patterns)}; allowed are names before the numbers of "
                f"layers, and {module} is adapted"
            )


def require_layers(path: Path, config: JsonObject, modules: Iterable[str]) -> None:
    """The base, of whose linears these are the names, has the layers that are to have adapters.

    Raises:
      UserError: otherwise.
    """
    there = {_layer_of(module) for module in modules}
    layers = _listed(config.get("layers_to_transform"))
    if not there.issuperset(layers):
        raise UserError(
            f"{path}: layers_to_transform is {show(layers)}; allowed are layers of "
            f"the base model, which are 0 to {max(layer for layer in there if layer is not None)}"
        )


def require_time(path: Path, field: str, until: float) -> None:
    """Refuse patterns that take too long to be matched."""
    if time.monotonic() > until:
        raise UserError(
            f"{path}: the patterns of {field} take more than {PATTERN_SECONDS} s; "
            "allowed are names of modules"
        )


def _listed(value: Any) -> list[Any]:
    """Of what may be one value, several, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _layer_of(module: str) -> int | None:
    """The last number within a module's name, as peft takes it."""
    numbers = [part for part in module.split(".")[1:-1] if part.isdecimal()]
    return int(numbers[-1]) if numbers else None


def compiled(key: str) -> re.Pattern[str]:
    """A key of a pattern: a module's name, or an end of one."""
    return re.compile(rf"(.*\.)?({key})$")


def _pattern_problem(field: str, key: str) -> str | None:
    """Why a pattern of modules is none that is matched: it could be matched without end."""
    quantifiers = len(re.findall(r"(?<!\\)(?<!\()[*+?{]", key))
    try:
        compiled(key)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{field} has {show(key)}, which is no regular expression: {error}"
    if len(key) > 300 or quantifiers > 2 or re.search(r"\)[*+?{]|\\[1-9]|\(\?P?[=!<(]", key):
        return (
            f"{field} has {show(key)}; supported: at most 300 characters with two repetitions, none of "
            "them of a group"
        )
    return None


_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Those that leave the base model's weights alone; dropout has no effect on a trained adapter.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Values with which peft computes what is computed here."""
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("base_model_name_or_path", "target_modules", "lora_dropout"),
    *("revision", "inference_mode", "auto_mapping", "peft_version"),
    # Which modules have an adapter is read off the tensors.
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
    # Settings of initialisations and of other methods, without effect here.
    *("loftq_config", "eva_config", "runtime_config", "qalora_group_size", "megatron_core"),
)
"""Fields that are understood, or that do not matter."""
_ALPHA = real(0, 1e6, above=True)
_RANK = whole(1, 1 << 16)
_LAYER = whole(0, MAX_LAYERS - 1)
_MODULES = optional(either(text, list_of(text, 10_000)))
_RULES = {
    "lora_alpha": _ALPHA,
    "alpha_pattern": optional(mapping_of(_ALPHA, 10_000)),
    "r": _RANK,
    "rank_pattern": optional(mapping_of(_RANK, 10_000)),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), optional(text)),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), optional(flag)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _MODULES),
    "layers_to_transform": optional(either(_LAYER, list_of(_LAYER, MAX_LAYERS))),
    "lora_dropout": real(0, 1),
}
"""What each field may be that is read or handed on."""
