"""What a run says of itself before its first step, in a few lines."""

from __future__ import annotations

from pathlib import Path

import jax

from dpo.config import Config, OptimizerConfig
from dpo.config.sources import show_source
from dpo.data.remaining import left_out, remarks, warnings
from dpo.huggingface.adapter_files import AdapterDirectory
from dpo.training.preparation import Run
from dpo.training.reading import Dataset
from dpo.training.step import Params


def introduction(run: Run) -> list[str]:
    """What is about to happen: the policy, the data, their layout, memory, the number of steps."""
    config, policy, report = run.config, run.policy, run.loader.report()
    num_params, num_frozen = _count(policy.params), _count(policy.frozen)
    on_frozen = f" on {num_frozen / 1e6:.1f} M in {config.lora.base_dtype}" if num_frozen else ""
    shapes = ", ".join(f"{shape.rows}x{shape.row_length}" for shape in run.loader.shapes)
    return [
        f"policy: {policy.pretrained.source}, {num_params / 1e6:.1f} M trained parameters{on_frozen}",
        f"data: {_counts(run.dataset)} from {show_source(config.data.train)}",
        *_remarks("data", run.dataset),
        *(
            []
            if run.heldout is None
            else [f"held out: {_counts(run.heldout)} from {show_source(config.data.eval)}"]
        ),
        *([] if run.heldout is None else _remarks("held out", run.heldout)),
        f"layout {report['layout']}: rows x tokens {shapes}; {report['fill']:.0%} filled; "
        f"{report['saving_versus_padded']:.1f}x fewer positions than padded; "
        f"{len(report['shapes'])} programs to compile",
        *([] if run.memory is None else [run.memory.text]),
        *_advice(config),
        f"training: {run.num_steps} steps of {config.training.batch_size} prompts into {config.run_dir}",
    ]


def _advice(config: Config) -> list[str]:
    """What of the settings is allowed and seldom meant."""
    return [*_rate_for_adapters(config), *_base_of_adapters(config)]


def _rate_for_adapters(config: Config) -> list[str]:
    """The default learning rate is one for all weights; adapters move as far with about ten times as much."""
    rate = config.optimizer.learning_rate
    if not config.lora.is_on or rate != OptimizerConfig().learning_rate:
        return []
    return [
        f"learning rate: {rate:g} is the default for training all weights; adapters usually need about ten "
        "times as much (optimizer.learning_rate; docs/lora.md)"
    ]


def _base_of_adapters(config: Config) -> list[str]:
    """An adapter of another model changes this one in ways that nobody chose; a model can have two names."""
    if config.lora.init is None:
        return []
    base, source = AdapterDirectory(config.lora.init).named_base, config.model.source
    if base is not None and _place(base) == _place(source):
        return []
    said = "says of no model that it was trained on it" if base is None else f"was trained on {base}"
    return [f"adapters: {config.lora.init} {said}, and model.source is {source}: make sure that they are one"]


def _place(source: str) -> str:
    """A model's directory, or its name where there is none."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _remarks(name: str, dataset: Dataset) -> list[str]:
    """What the data need to be told of, warnings last."""
    mixture = [f"{name}: {one.drawn} of {one.kept} prompts drawn from {one.name}" for one in dataset.mixture]
    said = mixture + [f"{name}: {remark}" for remark in remarks(dataset.read, dataset.tokens)]
    return said + [f"WARNING: {name}: {warning}" for warning in warnings(dataset.read, dataset.tokens)]


def _counts(dataset: Dataset) -> str:
    """How many prompts and responses there are of how many rows, what was left out, and what was cut."""
    tokens = dataset.tokens
    why = [f"{n} {reason}" for reason, n in left_out(dataset.read, tokens).items()]
    return (
        f"{len(tokens)} prompts, {int(tokens.num_responses.sum())} responses"
        + (f", of {dataset.read.num_rows} rows (left out: {', '.join(why)})" if why else "")
        + (f" ({tokens.num_truncated} truncated)" if tokens.num_truncated else "")
    )
