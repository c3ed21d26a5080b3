"""One self-contained HTML page about several runs: figures side by side, curves in one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from dpo.config import Config
from dpo.evaluation.accuracy import describe, outcomes
from dpo.evaluation.figures import HeldoutFigures
from dpo.evaluation.heldout import Heldout, load_heldout
from dpo.evaluation.rows import as_pairs, make_pairs
from dpo.evaluation.statistics import cluster_bootstrap
from dpo.intervals import Interval
from dpo.losses import reward_scale
from dpo.pages import plots
from dpo.pages.curves import OWN_SCALE, add_log_ratios, draw_runs
from dpo.pages.page import percent, percents, render, with_interval, write_page
from dpo.pages.report import describe_steps, require_metrics
from dpo.pages.report_match import ShownMatch, read_match
from dpo.runs import HELDOUT_FILE, METRICS_FILE, flat_settings, objective_title, read_metrics, specification


class ComparedRun(NamedTuple):
    """What a run left."""

    name: str
    path: Path
    config: Config
    metrics: list[dict[str, int | float]]
    heldout: Heldout | None
    figures: HeldoutFigures | None
    match: ShownMatch | None


def write_comparison(runs: Sequence[tuple[str | Path, Config]], *, output: str | Path | None = None) -> Path:
    """Write a page about at least two runs, by default comparison.html in the folder that holds them all.

    Raises:
      ValueError: for a directory that no run has written to.
    """
    read = [_read(name, Path(run), config) for name, (run, config) in zip(_names(runs), runs, strict=True)]
    path = Path(output or _common_folder(runs) / "comparison.html")
    return write_page(path, render("comparison.html.jinja", _gather(read)))


def accuracy_difference(run: Heldout, other: Heldout) -> Interval | None:
    """Accuracy of `run` minus that of `other` on the same pairs: paired, so much tighter than two intervals.

    None where the held-out preferences are not the same.
    """
    said, said_too = (
        [(p.prompt, p.responses, p.ranks) for p in heldout.preferences] for heldout in (run, other)
    )
    if said != said_too:
        return None
    ours, theirs = as_pairs(run.rows), as_pairs(other.rows)
    pairs = make_pairs(ours)
    gained = outcomes(pairs.gap(ours.log_ratio)) - outcomes(pairs.gap(theirs.log_ratio))
    return cluster_bootstrap(gained, ours.prompts[pairs.row], weights=pairs.weight)


def _read(name: str, path: Path, config: Config) -> ComparedRun:
    require_metrics(path)
    beta = reward_scale(specification(config))
    heldout = load_heldout(path, config) if (path / HELDOUT_FILE).is_file() else None
    return ComparedRun(
        name,
        path,
        config,
        add_log_ratios(read_metrics(path / METRICS_FILE), beta=beta),
        heldout,
        None if heldout is None else describe(heldout.rows, beta=beta),
        read_match(path, config),
    )


def _names(runs: Sequence[tuple[str | Path, Config]]) -> list[str]:
    """The paths without what they have in common at the front."""
    common = _common_folder(runs)
    return [str(Path(run).resolve().relative_to(common)) for run, _ in runs]


def _common_folder(runs: Sequence[tuple[str | Path, Config]]) -> Path:
    return Path(os.path.commonpath([Path(run).resolve().parent for run, _ in runs]))


def _gather(runs: Sequence[ComparedRun]) -> dict[str, object]:
    rows = _table(runs)
    return {
        "title": f"{len(runs)} runs",
        "subtitle": " · ".join(dict.fromkeys(objective_title(run.config) for run in runs)),
        "verdict_plots": _verdict_plots(runs),
        "rows": rows,
        "runs": [
            {
                "name": run.name,
                "path": run.path,
                "colour": index % len(plots.SERIES) + 1,
            }
            for index, run in enumerate(runs)
        ],
        "notes": _notes(runs, rows),
        "curves": draw_runs(
            {run.name: run.metrics for run in runs},
            left_out=() if _has_one_scale(runs) else OWN_SCALE,
        ),
        "settings": differing_settings([run.config for run in runs]),
    }


def _has_one_scale(runs: Sequence[ComparedRun]) -> bool:
    """Whether losses and δ of all runs are in the same units: one objective with one β."""
    return len({repr(specification(run.config)) for run in runs}) == 1


GAIN = "accuracy minus the first run's"
ROWS = (
    "objective",
    "win-rate",
    "at equal lengths",
    "held-out accuracy",
    GAIN,
    "log-ratio of better responses, nats",
    "log-ratio of worse responses, nats",
    "KL, nats",
    "steps",
)
"""What has one scale in all runs; δ, loss and calibration are in units of a run's own β and objective."""


def _table(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """What a row is, and a cell for each run; rows that are empty throughout are left out."""
    columns = [_cells(run, runs[0]) for run in runs]
    return [(name, list(cells)) for name, *cells in zip(ROWS, *columns, strict=True) if any(cells)]


def _cells(run: ComparedRun, first: ComparedRun) -> list[str]:
    win_rate, controlled, kl = _match_cells(run.match)
    objective, steps = objective_title(run.config), describe_steps(run.metrics)
    return [objective, win_rate, controlled, *_heldout_cells(run, first), kl, steps]


def _heldout_cells(run: ComparedRun, first: ComparedRun) -> list[str]:
    """Accuracy, what it is more than the first run's, and the log-ratios of both sides."""
    if run.figures is None or run.heldout is None:
        return ["", "", "", ""]
    difference, ratios = None, run.figures["log_ratio"]
    if run is not first and first.heldout is not None:
        difference = accuracy_difference(run.heldout, first.heldout)
    return [
        _rate(run.figures["accuracy"]),
        "" if difference is None else with_interval(difference),
        *(with_interval(ratios[side], 2) if side in ratios else "" for side in ("chosen", "rejected")),
    ]


def _match_cells(match: ShownMatch | None) -> tuple[str, str, str]:
    """Win-rate, the same at equal lengths, and KL on the policy's own samples."""
    if match is None:
        return "", "", ""
    controlled, kl = match["controlled"], match["kl"]
    return (
        f"{_rate(match['figures']['win_rate'])} over the {match['opponent']}"
        + (f"; cut off: {match['cut']}" if match["cut"] else ""),
        "" if controlled is None else _rate(controlled),
        "" if kl is None else with_interval(kl[1], 1),
    )


def _rate(interval: Sequence[float]) -> str:
    return f"{percent(interval[0])} ({percents(interval)})"


def _verdict_plots(runs: Sequence[ComparedRun]) -> list[Markup]:
    """Win-rate and accuracy of all runs that have them, with their intervals."""
    found = {
        "Win-rate, 95% intervals": [
            (run.name, run.match["figures"]["win_rate"], index)
            for index, run in enumerate(runs)
            if run.match is not None
        ],
        "Held-out accuracy, 95% intervals": [
            (run.name, run.figures["accuracy"], index)
            for index, run in enumerate(runs)
            if run.figures is not None
        ],
    }
    drawn = [
        Markup(
            plots.intervals(
                title,
                [(name, interval) for name, interval, _ in rows],
                level=0.5,
                colours=[index for _, _, index in rows],
            )
        )
        for title, rows in found.items()
        if rows
    ]
    return [*drawn, *_against_kl(runs)]


def _against_kl(runs: Sequence[ComparedRun]) -> list[Markup]:
    """What each run wins against how far it went for it: the upper left is better (DPO's Figure 2)."""
    placed = [
        (run.name, run.match["kl"][1], run.match["figures"]["win_rate"], index)
        for index, run in enumerate(runs)
        if run.match is not None and run.match["kl"] is not None
    ]
    return [Markup(plots.against("Win-rate against KL", "KL, nats", placed, level=0.5))] if placed else []


def _notes(runs: Sequence[ComparedRun], rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    """What a reader has to know before comparing columns."""
    notes = [
        "Intervals are 95%, by bootstrap over prompts. “Accuracy minus the first run's” is the paired "
        "difference on the same pairs: it says more than two intervals that overlap."
        if any(name == GAIN for name, _ in rows)
        else "Intervals are 95%, by bootstrap over prompts."
    ]
    apart = [
        run.name
        for run in runs[1:]
        if run.heldout is not None
        and runs[0].heldout is not None
        and accuracy_difference(run.heldout, runs[0].heldout) is None
    ]
    if apart:
        notes.append(f"Held-out preferences other than the first run's: {', '.join(apart)}.")
    if not _has_one_scale(runs):
        notes.append(
            "Losses, margins δ and gradient norms are in units of each run's own objective and β: they are "
            "in the runs' own reports and not on one axis here; log-ratios and KL are in nats everywhere."
        )
    judges = {f"{run.match['judge']}, temperature {run.match['temperature']}" for run in runs if run.match}
    if len(judges) > 1:
        notes.append(f"Win-rates are not of one kind: {'; '.join(sorted(judges))}.")
    return notes


def differing_settings(configs: Sequence[Config]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, run_dir apart, by their dotted names."""
    flat = [{name: str(value) for name, value in flat_settings(asdict(config)).items()} for config in configs]
    names = dict.fromkeys(name for one in flat for name in one if name != "run_dir")
    found = [(name, [one.get(name, "") for one in flat]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]
