"""What a data set holds, and what could be wrong with it: a plain dict, and the same for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpo.data.mixing import NOT_DRAWN
from dpo.data.preferences import Preference, ReadPreferences, ReadSummary
from dpo.data.remaining import drawn_or_not, warnings
from dpo.data.text_counts import TextCounts
from dpo.data.tokenized import TokenizedDataset
from dpo.data.tokenizer_calls import decode_ids
from dpo.intervals import wilson
from dpo.terminal import show_controls

Report = dict[str, Any]
"""Numbers, strings, lists and dicts with string keys only, so that `json.dumps` takes it."""


FOUND_IN_TEXTS = (
    ("duplicates (copies of an earlier row)", "duplicates"),
    ("with ties", "tied"),
    ("all tied (no preference)", "all_tied"),
    ("with identical responses", "identical_responses"),
    ("conflicting labels", "conflicting"),
    ("scores against ranks", "scores_against_ranks"),
)
"""What is looked for in the texts: in words, and its name in a report."""
QUANTILES = ("mean", "p50", "p90", "p99", "max")
"""What a report says of lengths."""


def inspect_dataset(
    read: ReadPreferences, dataset: TokenizedDataset, *, heldout: Sequence[Preference] | None = None
) -> Report:
    """Everything that `dpo inspect` says about preferences, as read and as token ids.

    `heldout` are the preferences to look for shared prompts with. Quantiles and the longer-is-better rate are
    about the tokens that are kept; counts of texts are about all preferences that are given.
    """
    texts = TextCounts(with_first_messages=heldout is not None)
    for preference in read.preferences:
        texts.add(preference)
    return inspect_counted(read.summary, texts, dataset, heldout=heldout)


def inspect_counted(
    read: ReadSummary,
    texts: TextCounts,
    dataset: TokenizedDataset,
    *,
    heldout: Sequence[Preference] | None = None,
) -> Report:
    """The same of preferences that were counted: with first messages where there are `heldout`."""
    report: Report = {
        "rows": read.num_rows,
        "preferences": texts.count,
        "kept": len(dataset),
        "skipped": read.skipped,
        "problems": [str(problem) for problem in read.problems],
        "layouts": read.layouts,
        "unused_columns": read.unused,
        "dropped": dataset.dropped,
        "first_dropped": dataset.first_dropped,
        "truncated": dataset.num_truncated,
        "warnings": warnings(read, dataset),
        "remarks": dataset.remarks,
        "first_remarks": dataset.first_remarks,
        "sources": dict(texts.sources.most_common(20)),
        "responses": {str(size): texts.sizes[size] for size in sorted(texts.sizes)},
        "with_scores": texts.with_scores,
        "lengths": _lengths(dataset),
        "longer_is_better": longer_is_better(dataset),
        **texts.figures(),
        "first_found": texts.first,
    }
    if max(texts.sizes) == 1:
        report["labels"] = {"desirable": texts.desirable, "undesirable": texts.count - texts.desirable}
    if heldout is not None:
        report["overlap"] = texts.overlap(heldout)
    return report


def longer_is_better(dataset: TokenizedDataset) -> Report:
    """How often the best response has more tokens than the worst, with Wilson's 95% interval.

    One comparison a prompt: its first response against its last, unless their ranks are equal. Comparisons of
    equal length are counted apart and are not part of the rate. Without a comparison the interval is [0, 1].
    """
    lengths = dataset.scored_counts
    best, worst = dataset.row_offsets[:-1], dataset.row_offsets[1:] - 1
    untied = dataset.ranks[best] != dataset.ranks[worst]
    difference = (lengths[best] - lengths[worst])[untied]
    longer, unequal = int((difference > 0).sum()), int((difference != 0).sum())
    _, low, high = wilson(longer, unequal) if unequal else (None, 0.0, 1.0)
    return {
        "rate": longer / unequal if unequal else None,
        "low": low,
        "high": high,
        "comparisons": unequal,
        "equal_length": int((difference == 0).sum()),
    }


# ---- lengths ----


def _lengths(dataset: TokenizedDataset) -> Report:
    responses = np.diff(dataset.response_offsets)
    best, worst = dataset.row_offsets[:-1], dataset.row_offsets[1:] - 1
    longest = np.maximum.reduceat(responses, best)
    together = np.add.reduceat(responses, best)
    return {
        "prompt": _quantiles(dataset.prompt_lengths),
        "response": _quantiles(responses),
        "best response": _quantiles(responses[best]),
        "worst response": _quantiles(responses[worst]),
        "prompt + longest response": _quantiles(dataset.prompt_lengths + longest),
        "prompt + all responses": _quantiles(dataset.prompt_lengths + together),
    }


def _quantiles(lengths: Int[np.ndarray, " _"]) -> dict[str, float]:
    p50, p90, p99 = np.quantile(lengths, [0.5, 0.9, 0.99], method="inverted_cdf")
    return {
        "mean": round(float(lengths.mean()), 1),
        "p50": int(p50),
        "p90": int(p90),
        "p99": int(p99),
        "max": int(lengths.max()),
    }


# ---- in colour ----


def render_report(report: Report) -> RenderableType:
    """The report of `inspect_dataset` as tables for `rich`."""
    return Group(_render_counts(report), Text(), _render_lengths(report["lengths"]), Text(), *_notes(report))


def render_example(
    dataset: TokenizedDataset, row: int, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int = 200
) -> Text:
    """One prompt and its responses: grey is read, colour is scored, one shade a token; line ends show."""
    prompt = dataset.prompt(row).tolist()
    text = Text(f"prompt ({len(prompt)} tokens, not scored)\n", style="bold")
    if len(prompt) > max_prompt_tokens:
        text.append(f"… {len(prompt) - max_prompt_tokens} tokens left out …", style="italic dim")
    for piece in _decode_pieces(prompt[-max_prompt_tokens:], tokenizer):
        text.append(show_controls(piece), style="bright_black")
    ranks = dataset.ranks[dataset.row_offsets[row] : dataset.row_offsets[row + 1]]
    responses = zip(dataset.responses(row), dataset.scored_of(row), ranks, strict=True)
    for k, (response, flags, rank) in enumerate(responses):
        text.append(f"\n\nresponse {k + 1} (rank {rank}, {flags.sum()} tokens scored)\n", style="bold")
        for is_scored, part in groupby(zip(flags, response.tolist(), strict=True), key=lambda pair: pair[0]):
            _append_tokens(text, _decode_pieces((token for _, token in part), tokenizer), bool(is_scored))
    return text


def _append_tokens(text: Text, pieces: Iterable[str], is_scored: bool) -> None:
    for i, piece in enumerate(pieces):
        shown = show_controls(piece)
        if is_scored:
            text.append(shown.replace("\n", "⏎\n"), style=_TOKEN_STYLES[i % len(_TOKEN_STYLES)])
        else:
            text.append(shown, style="bright_black")


_TOKEN_STYLES = ("black on green", "black on bright_green")


def _render_counts(report: Report) -> Table:
    table = Table("preferences", "", box=None, header_style="bold")
    table.add_row("rows read", str(report["rows"]))
    more = report["dropped"].get(NOT_DRAWN, 0)
    table.add_row(
        "preferences",
        f"{report['preferences']}, of {report['distinct_prompts']} distinct prompts"
        + (f" ({more} more are not drawn)" if more else ""),
    )
    cut = f"{report['truncated']} truncated{drawn_or_not(report['dropped'])}"
    table.add_row("kept as tokens", f"{report['kept']} ({cut})")
    for title, key in (("malformed or tied, left out", "skipped"), ("dropped", "dropped")):
        table.add_row(title, join_counts(report[key]))
    table.add_row("layout", join_counts(report["layouts"]))
    if report["unused_columns"]:
        table.add_row("columns not used", Text(show_controls(", ".join(report["unused_columns"]))))
    sizes = (f"{count} with {size}" for size, count in report["responses"].items())
    table.add_row("responses a prompt", ", ".join(sizes))
    table.add_row("with scores", str(report["with_scores"]))
    table.add_row("sources", Text(show_controls(join_counts(report["sources"]))))
    for name, counts in report.get("mixture", {}).items():
        table.add_row(
            "in the mixture",
            Text(show_controls(f"{counts['drawn']} drawn of {counts['kept']} of {name}")),
        )
    for title, key in FOUND_IN_TEXTS:
        counted = _with_places(str(report[key]), report["first_found"].get(key, ()), report[key])
        table.add_row(title, counted, style="yellow" if report[key] else "")
    if "labels" in report:
        table.add_row("labels", join_counts(report["labels"]))
    table.add_row("longer is better", _describe_longer(report["longer_is_better"]))
    if "overlap" in report:
        overlap = report["overlap"]
        counts = (
            f"{overlap['same_prompt']} whole, {overlap['same_first_message']} by the first message, "
            f"of {overlap['heldout']}"
        )
        style = "red" if overlap["same_prompt"] else ""
        found = _with_places(counts, overlap["examples"], overlap["same_prompt"])
        table.add_row("held-out prompts also trained on", found, style=style)
    return table


def _with_places(text: str, places: Sequence[str], count: int) -> Text:
    """What was found with where it stands; the last of more than are named is an ellipsis."""
    return Text(show_controls(text + in_brackets(places, count)))


def in_brackets(places: Sequence[str], count: int) -> str:
    """Where something stands, after what it is; nothing without a place."""
    more = ", …" if count > len(places) else ""
    return f" ({', '.join(places)}{more})" if places else ""


def _render_lengths(lengths: Report) -> Table:
    table = Table("tokens", box=None, header_style="bold")
    for column in QUANTILES:
        table.add_column(column, justify="right")
    for name, quantiles in lengths.items():
        table.add_row(name, *(str(quantiles[column]) for column in QUANTILES))
    return table


def _notes(report: Report) -> Iterator[Text]:
    """Where the first rows that were left out stand."""
    for warning in report["warnings"]:
        yield Text(show_controls(f"WARNING: {warning}"), style="bold red")
    for problem in report["problems"][:5]:
        yield Text(show_controls(f"malformed: {problem}"), style="yellow")
    for reason, where in report["first_dropped"].items():
        yield Text(show_controls(f"first dropped as {reason}: {where}"), style="yellow")
    for remark, count in report["remarks"].items():
        where, of_all = report["first_remarks"][remark], drawn_or_not(report["dropped"])
        yield Text(show_controls(f"{count} x {remark}{of_all} (first: {where})"), style="yellow")


def join_counts(counts: Mapping[str, int]) -> str:
    """Each name with its count, or none."""
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _describe_longer(longer: Report) -> str:
    if longer["rate"] is None:
        return "no comparison"
    interval = f"[{longer['low']:.1%}, {longer['high']:.1%}]"
    counts = f"{longer['comparisons']} comparisons, {longer['equal_length']} more of equal length"
    return f"{longer['rate']:.1%} {interval} of {counts}"


def _decode_pieces(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Text of each token; tokens that are parts of one character come together."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = decode_ids(tokenizer, waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or len(waiting) == 4:
            yield text
            waiting = []
    if waiting:
        yield decode_ids(tokenizer, waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
