"""Held-out figures as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from dpo.data.remaining import drawn_or_not
from dpo.evaluation.accuracy import BASELINES, cautions, part_interval
from dpo.evaluation.figures import HeldoutFigures, PartFigures, RankingFigures
from dpo.terminal import plural


def figures_as_text(figures: HeldoutFigures) -> str:
    """The figures of `accuracy.describe`, and what was left out of them, in a few lines."""
    lines = [
        _counts(figures)
        + "".join(f"; {count} left out: {reason}" for reason, count in figures.get("left_out", {}).items())
        + (
            f"; {count} truncated{drawn_or_not(figures.get('left_out', {}))}"
            if (count := figures.get("truncated"))
            else ""
        ),
        _line("accuracy", figures["accuracy"], note=_ties(figures["ties"])),
        *(
            _line(f"  {words}", figures["baselines"][name], note=_gain(figures["over_baselines"][name]))
            for name, words in BASELINES.items()
        ),
        _line("margin (beta x log-ratio)", figures["margin"], note=f"beta {figures['beta']:g}"),
        f"{'log-ratio, nats':<28}"
        + ", ".join(
            f"{name} {figures['log_ratio'][name][0]:+z.2f}"
            for name in ("chosen", "rejected")
            if name in figures["log_ratio"]
        ),
        f"{'calibration error':<28}{figures['calibration']['ece']:z.3f}",
    ]
    lines += [] if "rankings" not in figures else _ranking_lines(figures["rankings"])
    lines += _part_lines(figures)
    return "\n".join([*lines, *(f"! {text}" for text in cautions(figures))])


def _counts(figures: HeldoutFigures) -> str:
    if figures["unpaired"]:
        return (
            f"held out: {figures['rows']} labelled responses, {figures['prompts']} prompts; right is "
            "likelier than under the reference if desirable, less likely if not"
        )
    rows, pairs = plural(figures["rows"], "row"), plural(figures["pairs"], "pair")
    return f"held out: {rows}, {pairs}, {plural(figures['prompts'], 'prompt')}"


def _ranking_lines(rankings: RankingFigures) -> list[str]:
    chance = rankings["chance"]
    return [
        _line("Kendall's tau", rankings["kendall_tau"]),
        _line("best one found", rankings["top_1"], note=f"chance {chance['top_1']:z.3f}"),
        _line("NDCG", rankings["ndcg"]),
        _line("log-likelihood", rankings["log_likelihood"], note=f"chance {chance['log_likelihood']:z.3f}"),
    ]


def _part_lines(figures: HeldoutFigures) -> list[str]:
    """By length, and by source."""
    lines = []
    for name, part in figures["by_length"].items():
        lines.append(_part_line(f"where {name.replace('_', ' ')}", part))
    sources = figures.get("by_source", {})
    width = max(map(len, sources), default=0)
    for source, part in sources.items():
        lines.append(
            _part_line(f"  {source:<{width}}", part, note=f", longer is better {part['longer'][0]:z.3f}")
        )
    if "mean_of_sources" in figures:
        part = figures["mean_of_sources"]
        note = f"longer is better {part['longer'][0]:z.3f}"
        lines.append(_line("  mean of the sources", part["accuracy"], note=note))
    return lines


def _gain(interval: Sequence[float]) -> str:
    """The accuracy beside that of a baseline."""
    estimate, low, high = interval
    return f"policy {estimate:+z.3f}, 95% {low:+z.3f} to {high:+z.3f}"


def _part_line(name: str, part: PartFigures, *, note: str = "") -> str:
    interval, remark = part_interval(part)
    counts = ", ".join(filter(None, (plural(part["pairs"], "pair"), _ties(part["ties"]))))
    found = f"margin {part['margin'][0]:z.3f}, calibration error {part['calibration']['ece']:z.3f}"
    note = ", ".join(text for text in (counts, remark, found + note) if text)
    return (
        _line(name, interval, note=note) if interval else f"{name:<27} {part['accuracy'][0]:z.3f}  ({note})"
    )


def _line(name: str, interval: Sequence[float], *, note: str = "") -> str:
    estimate, low, high = interval
    text = f"{name:<27} {estimate:z.3f}  95% {low:z.3f} to {high:z.3f}"
    return f"{text}  ({note})" if note else text


def _ties(count: int) -> str:
    return f"{count} tie{'' if count == 1 else 's'}" if count else ""
