"""What makes a step fit that does not: settings that were tried by compiling the step with them.

In the order of what they cost: first what gives the same results in more time (recomputing, micro-batches,
chunks of the vocabulary), then adapters in place of all weights, then adapters on weights held in fewer bits.
Of each kind the first that fits is named, with the memory that it takes; what was not tried is not advised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from dpo.config import Config, LoraConfig
from dpo.models.decoder_config import DecoderConfig
from dpo.planning.chips import GIB
from dpo.planning.plan import Memory
from dpo.planning.planner import make_plan
from dpo.planning.search import choices_of
from dpo.planning.targets import Target
from dpo.planning.workloads import Lengths
from dpo.training.memory_choices import Choice

RANK = 16
"""Of the adapters that are tried."""
BASES = ("float32", "bfloat16", "int8")


class Remedy(NamedTuple):
    """Settings in the place of others, as options of a command, and what they cost."""

    options: str
    config: Config
    cost: str


def find_remedies(
    config: Config,
    memory: Memory,
    target: Target,
    *,
    decoder: DecoderConfig,
    lengths: Lengths,
    log: Callable[[str], None],
) -> Iterator[str]:
    """Sentences about what fits in the place of a step with this memory, the cheapest first."""

    def peak(remedy: Remedy) -> float:
        total = make_plan(remedy.config, target, decoder=decoder, lengths=lengths).memory.total
        log(f"tried {remedy.options}: {total / GIB:.2f} GiB")
        return total

    limit = memory.limit
    choices = list(choices_of(config, target, lengths))
    for kind in _kinds(config, memory, choices):
        if not kind or (len(kind) > 2 and peak(kind[-1]) > limit):  # the last takes the least
            continue
        for remedy in kind:
            total = peak(remedy)
            if total <= limit:
                yield f"{remedy.options}: {total / GIB:.2f} of {limit / GIB:.2f} GiB; {remedy.cost}"
                break


def _kinds(config: Config, memory: Memory, choices: list[Choice]) -> Iterator[list[Remedy]]:
    """Remedies of one kind together, each list from the quickest step to the one with the least memory."""
    held = memory.parameters + memory.optimizer
    if config.training.memory_limit is None and held < memory.limit:
        yield [_traded(config, choice) for choice in choices[1:]]
    if config.lora.init is not None:
        return
    start = BASES.index(config.lora.base_dtype) + 1 if config.lora.is_on else 0
    for base in BASES[start:]:
        yield [_adapted(config, base, choice) for choice in dict.fromkeys([choices[0], choices[-1]])]


def _traded(config: Config, choice: Choice) -> Remedy:
    return Remedy(_options(config, choice), choice.apply(config), "the same results, in more time")


def _adapted(config: Config, base: str, choice: Choice) -> Remedy:
    rank = config.lora.rank or RANK
    settings = replace(config.lora if config.lora.is_on else LoraConfig(), rank=rank, base_dtype=base)
    options = "" if config.lora.is_on else f"--lora.rank={rank} "
    options += "" if base == "float32" else f"--lora.base_dtype={base} "
    cost = "adapters are trained, not all weights (docs/lora.md; their learning rate is ten times as high)"
    if base != "float32":
        cost = f"adapters on weights rounded to {base}"
    made = replace(choice.apply(config), lora=settings)
    return Remedy((options + _options(config, choice)).strip(), made, cost)


def _options(config: Config, choice: Choice) -> str:
    """The choice as options, those that the settings have already left out."""
    pairs = [
        ("--model.remat", choice.remat, config.model.remat),
        ("--training.micro_batches", choice.micro_batches, config.training.micro_batches),
        ("--model.log_prob_chunk", choice.log_prob_chunk, config.model.log_prob_chunk),
    ]
    return " ".join(f"{option}={value}" for option, value, given in pairs if value != given)
