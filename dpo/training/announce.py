"""What a run says of itself before its first step, in a few lines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from dpo.config import Config, OptimizerConfig
from dpo.config.sources import show_source
from dpo.data.distinct import prompt_digests
from dpo.data.remaining import drawn_or_not, left_out, remarks, warnings
from dpo.data.tokenized import TokenizedDataset
from dpo.huggingface.adapter_files import AdapterDirectory
from dpo.models.attention import choose_implementation, skips_blocks
from dpo.parallel.partition import Partition
from dpo.terminal import plural
from dpo.training.model_card import show_parameters
from dpo.training.preflight import describe_reference
from dpo.training.preparation import Run
from dpo.training.reading import Dataset
from dpo.training.step import Params


def introduction(run: Run) -> list[str]:
    """What is about to happen: model, text, reference, data, batches, memory, the number of steps."""
    config = run.config
    trained_on = prompt_digests(run.dataset.tokens)
    first = (run.loader.indices(step) for step in range(min(run.num_steps, _STEPS_LOOKED_AT)))
    step = _a_step(config.training.batch_size, first, trained_on)
    heldout = [] if run.heldout is None else _about_heldout(run.heldout, config, set(trained_on))
    return [
        f"model      {_model(run)}",
        f"text       {_text(config.data.chat_template, run.policy.pretrained.tokenizer.chat_template)}",
        f"reference  {describe_reference(config)}",
        f"data       {show_source(config.data.train)}: {_counts(run.dataset, trained_on)}",
        *_remarks("data", run.dataset),
        *heldout,
        f"batches    {_batches(run)}",
        *_attention(
            config,
            Partition(run.mesh),
            alibi=run.policy.pretrained.model.config.alibi is not None,
            row=max(shape.row_length for shape in run.loader.shapes),
            longest=_longest(run.dataset.tokens),
        ),
        *([] if run.memory is None else [run.memory.text]),
        *_advice(config),
        f"training   {plural(run.num_steps, 'step')} of {step} into {config.run_dir}",
    ]


def _attention(config: Config, partition: Partition, *, alibi: bool, row: int, longest: int) -> list[str]:
    """That attention visits all pairs of rows that are long because other attention would not.

    `row` is the length of the longest row, `longest` that of the longest prompt with a response.
    """
    settings = config.model.attention
    how = choose_implementation(settings, partition=partition, length=row, has_key_bias=alibi)
    skips = how not in ("plain", "cudnn") or not skips_blocks(partition.platform)
    if skips or config.data.row_length is not None or row < 2 * longest:
        return []
    why = "the model has ALiBi" if alibi else f"model.attention is {settings}"
    return [
        f"attention  {how} ({why}): all pairs of a row's {row} tokens are visited; "
        f"--data.row_length={longest} makes rows shorter"
    ]


def _longest(tokens: TokenizedDataset) -> int:
    return int((tokens.prompt_lengths + tokens.response_lengths.max(axis=1)).max())


def _model(run: Run) -> str:
    policy = run.policy
    trained, frozen = _count(policy.params), _count(policy.frozen)
    if not run.config.lora.is_on:
        return f"{policy.pretrained.source}: all {show_parameters(trained)} parameters are trained"
    return (
        f"{policy.pretrained.source}: {show_parameters(trained)} parameters are trained, "
        f"{show_parameters(frozen)} in {run.config.lora.base_dtype} are not"
    )


def _text(given: str | None, own: str | Mapping[str, str] | None) -> str:
    """How a row becomes the text that is read, by the file of the settings' template and the model's own."""
    if given is not None:
        return f"written with the chat template {given} (data.chat_template)"
    if own is not None:
        return "written with the model's own chat template"
    return (
        "plain, prompt and response one after the other: the model has no chat template "
        "(a base model; data.chat_template gives it one)"
    )


def _about_heldout(heldout: Dataset, config: Config, trained_on: Collection[bytes]) -> list[str]:
    prompts = prompt_digests(heldout.tokens)
    seen = sum(prompt in trained_on for prompt in prompts)
    known = f"{seen} of them also trained on" if seen else "none of them trained on"
    warning = (
        f"WARNING: held out: {seen} of {len(prompts)} prompts are also trained on; figures of them say "
        "little about new prompts; take them out of data.train or data.eval"
    )
    return [
        f"held out   {show_source(config.data.eval)}: {_counts(heldout, prompts)}, {known}",
        *_remarks("held out", heldout),
        *([warning] if seen else []),
    ]


def _batches(run: Run) -> str:
    report = run.loader.report()
    shapes = ", ".join(f"{shape.rows} x {shape.row_length}" for shape in run.loader.shapes)
    return (
        f"{shapes} tokens (rows x length, layout {report['layout']}): {report['fill']:.0%} filled, "
        f"{report['saving_versus_padded']:.1f}x fewer positions than padded, "
        f"{plural(len(run.loader.shapes), 'program')} to compile"
    )


def _a_step(size: int, first: Iterable[Int[np.ndarray, " P"]], trained_on: Sequence[bytes]) -> str:
    """What a step of `size` rows learns from, of which `first` are the first steps' rows.

    Pairs that were made of one ranking share their prompts, as copies do.
    """
    if len(set(trained_on)) == len(trained_on):
        return plural(size, "prompt")
    distinct = [len({trained_on[row] for row in rows if row >= 0}) for rows in first]
    return f"{size} preferences (about {sum(distinct) / len(distinct):.0f} different prompts a step)"


_STEPS_LOOKED_AT = 16


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


def _counts(dataset: Dataset, prompts: Sequence[bytes]) -> str:
    """How many prompts and responses there are of how many rows, what was left out, and what was cut."""
    tokens, distinct = dataset.tokens, len(set(prompts))
    why = [f"{n} {reason}" for reason, n in left_out(dataset.read, tokens).items()]
    what = f"{len(tokens)} prompts"
    if distinct < len(tokens):
        what = f"{len(tokens)} preferences of {distinct} different prompts"
    return (
        f"{what}, {int(tokens.num_responses.sum())} responses, from {plural(dataset.read.num_rows, 'row')}"
        + (f" (left out: {', '.join(why)})" if why else "")
        + (
            f" ({tokens.num_truncated} truncated{drawn_or_not(tokens.dropped)})"
            if tokens.num_truncated
            else ""
        )
    )
