"""The report's section on the training data: sentences, the lengths in tokens, the sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo.data.inspection import FOUND_IN_TEXTS, QUANTILES, in_brackets, join_counts
from dpo.data.remaining import drawn_or_not
from dpo.outcomes import UserError, told_by
from dpo.pages.page import percent
from dpo.typed_json import read_typed

Report = Mapping[str, Any]


class DataSection(NamedTuple):
    """What the page shows of data.json."""

    warnings: list[str]
    sentences: list[str]
    tables: list[list[list[str]]]
    """The cells of each, its heading first."""


def read_data(path: Path) -> DataSection | None:
    """The section of a run's data.json; None where it has none.

    Raises:
      UserError: for a file that is not what a run writes there.
    """
    if not path.is_file():
        return None
    report: Report = read_typed(path, dict, remedy="; without the file the page has no section on data")
    try:
        return DataSection(list(map(str, report["warnings"])), list(_sentences(report)), _tables(report))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the data report of a run ({told_by(error)}); without the file the "
            "page has no section on data"
        ) from error


def _sentences(report: Report) -> Iterator[str]:
    rows = f"{report['rows']} rows were read ({join_counts(report['layouts'])})"
    kept = f"{report['kept']} of {report['preferences']} preferences are tokens to train on"
    cut, of_all = report["truncated"], drawn_or_not(report["dropped"])
    yield f"{rows}; {kept}{f', {cut} truncated{of_all}' if cut else ''}."
    sizes = ", ".join(f"{count} with {size}" for size, count in report["responses"].items())
    scores = report["with_scores"]
    yield (
        f"{report['distinct_prompts']} distinct prompts; responses a prompt: {sizes}; "
        f"{scores or 'none'} with scores."
    )
    if "labels" in report:
        yield f"Labels: {join_counts(report['labels'])}."
    if report["skipped"]:
        yield f"Malformed or tied, left out: {join_counts(report['skipped'])}."
    yield from (f"Malformed: {problem}." for problem in report["problems"][:5])
    if report["dropped"]:
        yield f"Left out: {_with_first(report['dropped'], report['first_dropped'])}."
    for remark, count in report["remarks"].items():
        yield f"{count} times{of_all}: {remark} (first: {report['first_remarks'][remark]})."
    if report["unused_columns"]:
        yield f"Columns that were not read, and in how many rows: {join_counts(report['unused_columns'])}."
    yield _longer(report["longer_is_better"])
    found = [(title, key) for title, key in FOUND_IN_TEXTS if report[key]]
    for title, key in found:
        places = report["first_found"].get(key, [])
        yield f"{report[key]} {title}{in_brackets(places, report[key])}."
    absent = [title for title, key in FOUND_IN_TEXTS if not report[key]]
    if absent:
        yield f"Looked for and not found: {', '.join(absent)}."
    if "overlap" in report:
        yield _overlap(report["overlap"])


def _tables(report: Report) -> list[list[list[str]]]:
    lengths = [["tokens", *QUANTILES]]
    lengths += [[name, *(str(row[one]) for one in QUANTILES)] for name, row in report["lengths"].items()]
    if report.get("mixture"):
        sources = [["source", "preferences", "fit to train on", "drawn"]]
        sources += [
            [name, str(counts.get("read", "")), str(counts["kept"]), str(counts["drawn"])]
            for name, counts in report["mixture"].items()
        ]
    else:
        sources = [["source", "rows"], *([name, str(n)] for name, n in report["sources"].items())]
    return [lengths, sources]


def _with_first(counts: Mapping[str, int], first: Mapping[str, str]) -> str:
    return ", ".join(
        f"{count} {reason} (first: {first[reason]})" if reason in first else f"{count} {reason}"
        for reason, count in counts.items()
    )


def _longer(longer: Report) -> str:
    if longer["rate"] is None:
        return "No two responses of a prompt can be compared by length."
    return (
        f"The better response has more tokens in {percent(longer['rate'])} ({percent(longer['low'])} to "
        f"{percent(longer['high'])}) of {longer['comparisons']} comparisons; "
        f"{longer['equal_length']} more are of equal length."
    )


def _overlap(overlap: Report) -> str:
    if not overlap["same_prompt"]:
        return f"None of {overlap['heldout']} held-out prompts is trained on."
    places = in_brackets(overlap["examples"], overlap["same_prompt"])
    return f"{overlap['same_prompt']} of {overlap['heldout']} held-out prompts are also trained on{places}."
