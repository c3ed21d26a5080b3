"""`dpo inspect`: what preferences hold, and one of them as it is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any

from dpo.commands.checks import check_settings
from dpo.commands.output import write_json
from dpo.config import Config, DataConfig, InspectConfig, starting_source
from dpo.outcomes import UserError
from dpo.terminal import console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo.data.inspection import Report
    from dpo.training.reading import Dataset


def inspect_data(config: Config, given: InspectConfig, arguments: Sequence[str]) -> None:
    """Print the data report and, where asked for, one example; `given.output` keeps the report."""
    check_settings(config, arguments)
    if given.rows is not None:
        config = replace(config, data=with_rows(config.data, given.rows))
    from dpo.data.inspection import render_example, render_report
    from dpo.huggingface.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(starting_source(config))
    report, dataset = report_data(config, tokenizer, heldout=given.heldout)
    out = console()
    out.print(render_report(report))
    if given.example is not None:
        if given.example >= len(dataset.tokens):
            raise UserError(f"example is {given.example}; allowed is 0 to {len(dataset.tokens) - 1}")
        out.print(render_example(dataset.tokens, given.example, tokenizer))
    if given.output is not None:
        write_json(given.output, report)


def with_rows(data: DataConfig, rows: int) -> DataConfig:
    """The settings with at most so many rows of training and held-out data: the first of each source.

    Of these as many as a source's `rows` are not to be had, so that none are drawn by number.
    """
    return replace(
        data,
        train=_without_rows(data.train),
        eval=data.eval and _without_rows(data.eval),
        max_train=min(rows, data.max_train or rows),
        max_eval=min(rows, data.max_eval or rows),
    )


def _without_rows(sources: str | list[Any]) -> str | list[Any]:
    if isinstance(sources, str):
        return sources
    return [{**one, "rows": None} if isinstance(one, Mapping) else one for one in sources]


def report_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, heldout: bool = False
) -> tuple[Report, Dataset]:
    """The data report of the training (or held-out) preferences, and the data set itself."""
    import numpy as np

    from dpo.data.inspection import inspect_counted
    from dpo.data.text_counts import TextCounts
    from dpo.training.reading import each_text, read_dataset, read_texts_to_draw

    data, is_compared = config.data, config.data.eval is not None and not heldout
    texts = TextCounts(with_first_messages=is_compared)
    dataset = read_dataset(data, tokenizer, heldout=heldout, notice=texts.add)
    is_there = np.ones(len(dataset.locations), bool)
    if dataset.not_drawn is not None:
        is_there[dataset.not_drawn] = False
    if texts.count != len(is_there) or not is_there.all():  # kept or made elsewhere, or not all are drawn
        texts = TextCounts(with_first_messages=is_compared)
        for preference in compress(each_text(data, heldout=heldout), is_there):
            texts.add(preference)
    others = read_texts_to_draw(data, heldout=True) if is_compared else None
    report = inspect_counted(dataset.read, texts, dataset.tokens, heldout=others)
    if dataset.mixture:
        report["mixture"] = {
            one.name: {"drawn": one.drawn, "kept": one.kept, "read": one.read} for one in dataset.mixture
        }
    return report, dataset
