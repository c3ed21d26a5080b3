"""Adapters as peft stores them: the writing of a directory."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from dpo.files import new_directory
from dpo.huggingface.adapter_files import PREFIX, WEIGHTS_FILE
from dpo.huggingface.adapters import Adapter, module_names
from dpo.huggingface.binding import Binding
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.model_names import CONFIG_FILE, is_adapter
from dpo.huggingface.spellings import respell_tokenizer
from dpo.huggingface.weight_names import SPELLINGS
from dpo.models.lora import Method
from dpo.outcomes import UserError


def save_adapters(
    directory: str | Path,
    adapters: Sequence[Adapter],
    method: Method,
    *,
    bindings: Sequence[Binding],
    base: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> Path:
    """Write adapters as peft does, whole or not at all; an adapter that is there is replaced.

    `bindings` are of the whole model, so that short names in target_modules mean nothing else in it.
    """
    directory = Path(directory)
    if directory.exists() and not is_adapter(directory) and (directory.is_file() or any(directory.iterdir())):
        raise UserError(
            f"{directory} holds something that is no adapter; allowed is a new, empty or adapter directory"
        )
    with new_directory("the adapters", directory) as target:
        safetensors.numpy.save_file(_tensors(adapters), target / WEIGHTS_FILE, metadata={"format": "pt"})
        (target / WEIGHTS_FILE).chmod(0o644)  # the library makes it readable by its owner only
        config = _describe(adapters, method, bindings, base)
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
            respell_tokenizer(target)
        if card is not None:
            (target / "README.md").write_text(card, encoding="utf-8")
    return directory


def _tensors(adapters: Iterable[Adapter]) -> dict[str, np.ndarray]:
    tensors = {}
    for adapter in adapters:
        for layer, module in _adapted(adapter):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = np.asarray(adapter.a[layer]).T
            tensors[f"{PREFIX}{module}.lora_B.weight"] = np.asarray(adapter.b[layer]).T
            if adapter.magnitude is not None:
                tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = np.asarray(adapter.magnitude[layer])
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def _adapted(adapter: Adapter) -> list[tuple[int, str]]:
    """Layers that have one, with their modules."""
    names = module_names(adapter.binding)
    return [(layer, name) for layer, name in enumerate(names) if adapter.alpha[layer] != 0]


def _describe(
    adapters: Sequence[Adapter], method: Method, bindings: Sequence[Binding], base: str
) -> JsonObject:
    ranks = {module: adapter.a.shape[-1] for adapter in adapters for _, module in _adapted(adapter)}
    alphas = {
        module: float(adapter.alpha[layer]) for adapter in adapters for layer, module in _adapted(adapter)
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_named(base),
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not adapters[0].binding.rule.transposed,
        "init_lora_weights": True,
        "target_modules": _short_names(list(ranks), bindings),
        **method._asdict(),
    }


def _named(base: str) -> JsonObject:
    """The base as peft names it: of a model of the hub the revision apart."""
    hub_id, _, revision = base.partition("@")
    if not revision or os.path.exists(base):
        return {"base_model_name_or_path": base}
    return {"base_model_name_or_path": hub_id, "revision": revision}


def _short_names(modules: Sequence[str], bindings: Iterable[Binding]) -> list[str]:
    """Ends of names (q_proj, attn.c_proj) that mean these modules and no others, or else whole names.

    A part of a larger model has whole names: ends may mean modules of the rest as well, a vision tower's.
    """
    if modules[0].startswith(SPELLINGS[0].body):
        return list(modules)
    others = {name for binding in bindings for name in module_names(binding)} - set(modules)
    names: dict[str, None] = {}
    for module in modules:
        ends = [module.rpartition(".")[2], re.split(r"\.\d+\.", module)[-1]]
        names[next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), module)] = None
    return list(names)
