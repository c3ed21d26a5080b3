"""The model card (README.md) of an export: what it is, how to load it, how it was made, what it came to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx

from dpo.config import Config
from dpo.config.marks import OFF_THE_CARD, PLACE, marked
from dpo.config.sources import spellings
from dpo.huggingface.pretrained import Pretrained
from dpo.losses import reward_scale
from dpo.models.decoder import Decoder
from dpo.runs import objective_terms, specification, term_title, trained_title
from dpo.terminal import show_controls
from dpo.training.versions import versions

METRICS = {
    "loss": "mean of the objective",
    "rewards/accuracies": "share of pairs that the implicit reward orders as the data do",
    "rewards/margins": "implicit reward of the better response minus the worse one's",
    "rewards/chosen": "implicit reward of the better response",
    "rewards/rejected": "implicit reward of the worse response",
    "logps/chosen": "log-prob of the better response, nats",
    "logps/rejected": "log-prob of the worse response, nats",
}
"""Held-out metrics on the card, and what they are."""


def model_card(
    config: Config,
    base: Pretrained,
    *,
    num_steps: int,
    num_parameters: int,
    dtype: str,
    metrics: Mapping[str, float] | None,
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    `metrics` are those of the held-out data after `num_steps` updates, if they were evaluated then.
    """
    name = as_text(_base_name(config, base))
    title = as_text(_base_name(config, base).rpartition("/")[2])
    objectives = objective_terms(config)
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front_matter(config, base), sort_keys=False).rstrip(),
            "---",
            "",
            f"# {title}, {' + '.join(as_text(objective['name']) for objective in objectives)}",
            "",
            f"A causal language model ({base.config['model_type']}, "
            f"{show_parameters(num_parameters)} parameters, {dtype}), fine-tuned from {name} on preferences "
            "with `dpo`.",
            "",
            *_how_to_load(),
            *_how_it_was_made(config, base, num_steps),
            *_heldout(config, metrics),
            *_settings(config),
        ]
    )


def adapter_card(
    config: Config,
    base: Pretrained,
    *,
    num_steps: int,
    num_parameters: int,
    metrics: Mapping[str, float] | None,
) -> str:
    """The same for adapters alone: for which base they are, and how they are put on it."""
    name = config.lora.base_name or _base_name(config, base)
    base_name = as_text(_base_name(config, base).rpartition("/")[2])
    objectives = " + ".join(as_text(objective["name"]) for objective in objective_terms(config))
    matter = _front_matter(config, base) | {"library_name": "peft"}
    is_on_hub = _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    if config.lora.base_name is not None and "base_model" not in matter and is_on_hub:
        matter["base_model"] = name
    if "base_model" in matter:
        matter["base_model_relation"] = "adapter"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(matter, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {base_name}, {objectives}, adapters",
            "",
            f"{trained_title(config)} ({show_parameters(num_parameters)} parameters, float32) for "
            f"{as_text(_data(name))}, trained on preferences with `dpo`. They need that model.",
            "",
            *_how_to_load_adapters(str(matter.get("base_model", ""))),
            *_how_it_was_made(config, base, num_steps, trained=trained_title(config)),
            *_heldout(config, metrics),
            *_settings(config),
        ]
    )


def as_text(text: str) -> str:
    """A text from outside as Markdown that shows it: as it is where it is plain, else as a span of code.

    So no heading, markup, link or image of a stranger stands on the card, and none breaks a table.
    """
    if _PLAIN.fullmatch(text) and "://" not in text and "www." not in text.lower():
        return text
    line = show_controls(" ".join(text.split())).replace("|", "\\|")
    fence = _fence(line, shortest=1)
    return f"{fence} {line} {fence}"


def _fence(text: str, *, shortest: int) -> str:
    """More backticks than stand behind each other anywhere in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_PLAIN = re.compile(r"[\w .,:;=/@+()%'’–-]*")


def count_parameters(model: Decoder) -> int:
    """How many numbers a model has; a tied output projection counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def show_parameters(number: int) -> str:
    """In millions, or as it is where it is less than one."""
    return f"{number / 1e6:.1f} M" if number >= 1_000_000 else f"{number:,}"


def _front_matter(config: Config, base: Pretrained) -> dict[str, object]:
    objectives = objective_terms(config)
    matter: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": base.licence or "unknown",
        "tags": [
            "preference-optimization",
            *dict.fromkeys(objective["name"] for objective in objectives),
        ],
    }
    if base.hub_id is not None:
        matter |= {"base_model": base.hub_id, "base_model_relation": "finetune"}
    return matter


def _base_name(config: Config, base: Pretrained) -> str:
    """The hub's name for it, or the name of its directory or file; never a path on this machine."""
    return base.hub_id or Path(config.model.source).name


def _how_to_load() -> list[str]:
    return [
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS DIRECTORY OR HUB ID")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS DIRECTORY OR HUB ID")',
        "```",
        "",
        'or `dpo generate DIRECTORY "…"`.',
        "",
    ]


def _how_to_load_adapters(base: str) -> list[str]:
    """With the base's name on the hub, where it is known to be one."""
    named = base if _HUB_ID.fullmatch(base) else "THE BASE MODEL"
    return [
        "## How to load them",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{named}")',
        'model = PeftModel.from_pretrained(base, "THIS DIRECTORY OR HUB ID")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS DIRECTORY OR HUB ID")',
        "```",
        "",
        'or `dpo generate DIRECTORY "…"`.',
        "",
    ]


def _how_it_was_made(
    config: Config, base: Pretrained, num_steps: int, *, trained: str | None = None
) -> list[str]:
    data, training, optimizer = config.data, config.training, config.optimizer
    rows = {
        "base model": _base_name(config, base),
        "loaded from": _data(config.model.source),
        "licence of the base": base.licence or "not stated where it was loaded from",
        "reference": _reference(config),
        "trained": trained or _trained(config),
        "objective": "; ".join(map(term_title, objective_terms(config))),
        "beta": f"{reward_scale(specification(config)):g}",
        "training data": _sources(data.train),
        "held-out data": "none" if data.eval is None else _sources(data.eval),
        "steps": f"{num_steps} of {training.batch_size} prompts",
        "optimiser": f"AdamW, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "longest prompt plus response": f"{data.max_length} tokens ({data.truncation})",
        "seed": str(training.seed),
        "software": ", ".join(f"{name} {versions()[name]}" for name in ("dpo", "jax", "transformers")),
    }
    return [
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {as_text(value)} |" for key, value in rows.items()),
        "",
    ]


def _reference(config: Config) -> str:
    if config.model.reference is not None:
        return _data(config.model.reference)
    return "the base model" if config.lora.init is None else f"the base model with {_data(config.lora.init)}"


def _trained(config: Config) -> str:
    return trained_title(config) + (", merged into the weights" if config.lora.is_on else "")


def _data(source: str) -> str:
    """A hub id, or the name of a file or directory here."""
    return Path(source).name if Path(source).exists() else source


def _sources(given: str | list[Any]) -> str:
    """One source, or several that were mixed."""
    return ", ".join(map(_data, spellings(given)))


def _without_folder(given: str | list[Any]) -> str | list[Any]:
    """What a setting that is a place names, without this machine's folders."""
    if isinstance(given, str):
        return _data(given)
    return [
        {**one, "source": _data(one["source"])} if isinstance(one, Mapping) else _data(one) for one in given
    ]


def _heldout(config: Config, metrics: Mapping[str, float] | None) -> list[str]:
    if not metrics:
        return ["## Held-out metrics", "", "Not evaluated at this step.", ""]
    assert config.data.eval is not None
    rows = [f"| {METRICS[name]} (`{name}`) | {metrics[name]:.4f} |" for name in METRICS if name in metrics]
    return [
        "## Held-out metrics",
        "",
        f"On {as_text(_sources(config.data.eval))}, against the reference. "
        "Rewards are β (log policy − log reference).",
        "",
        "| metric | value |",
        "|---|---|",
        *rows,
        "",
        "They say how the policy ranks given responses, not whether its own are good, safe or true.",
        "",
    ]


def _settings(config: Config) -> list[str]:
    """What `dpo train --config FILE` needs to do it again; nothing of this machine or its network."""
    settings = asdict(config)
    for name in marked(Config, PLACE):
        section, _, last = name.partition(".")
        if settings[section][last] is not None:
            settings[section][last] = _without_folder(settings[section][last])
    for name in marked(Config, OFF_THE_CARD):
        section, _, last = name.partition(".")
        if last:
            del settings[section][last]
        else:
            del settings[section]
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    if show_controls(text) != text:
        text = yaml.safe_dump(settings, sort_keys=False).rstrip()
    fence = _fence(text, shortest=3)
    return [
        "## Settings",
        "",
        "`dpo train --config FILE` with this file repeats it; local files are named without their folders:",
        "",
        f"{fence}yaml",
        text,
        fence,
        "",
    ]
