"""One self-contained HTML page about a run: no network, light and dark, a phone's width.

It reads what the run left (metrics.jsonl, summary.json, heldout.safetensors, evaluation.tokens.json,
data.json, winrate/) and shows the part that is there. Everything from data or a model is escaped.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dpo.config import Config
from dpo.config.sources import spellings
from dpo.distribution import find_data
from dpo.evaluation.accuracy import BASELINES, cautions, describe, part_interval
from dpo.evaluation.figures import Baseline, Estimate, HeldoutFigures, PartFigures, SourceFigures
from dpo.evaluation.heldout import Heldout, load_heldout
from dpo.evaluation.rows import as_pairs, make_pairs
from dpo.judging.prompts import all_shipped
from dpo.losses import reward_scale
from dpo.outcomes import EnvironmentFailure, UserError
from dpo.pages import plots
from dpo.pages.curves import add_log_ratios, draw_run
from dpo.pages.page import (
    REPORT_TEMPLATE,
    percent,
    percent_with_interval,
    percents,
    points_with_interval,
    render,
    with_interval,
    write_page,
)
from dpo.pages.report_data import read_data
from dpo.pages.report_match import all_warnings, matches_of_others, read_matches
from dpo.pages.report_pairs import LEGEND, describe_extremes
from dpo.runs import (
    CONFIG_FILE,
    DATA_FILE,
    HELDOUT_FILE,
    METRICS_FILE,
    REPORT_FILE,
    objective_terms,
    objective_title,
    read_metrics,
    read_summary,
    specification,
    trained_title,
)
from dpo.training.versions import versions

_GAINS: dict[Baseline, str] = {
    "longer": "“longer is better”",
    "reference_logp": "the reference's log-prob",
    "reference_logp_per_token": "its log-prob per token",
}
"""BASELINES where each stands for itself."""


def write_report(run_dir: str | Path, config: Config, *, output: str | Path | None = None) -> Path:
    """Write a page, RUN/report.html by default, from what is in the run directory.

    Raises:
      ValueError: when there are no metrics, so that there is nothing to report.
    """
    run_dir = Path(run_dir)
    require_metrics(run_dir)
    return write_page(
        Path(output or run_dir / REPORT_FILE), render(REPORT_TEMPLATE, _gather(run_dir, config))
    )


def require_metrics(run_dir: Path) -> None:
    """Raise `ValueError` for a directory that no run has written to."""
    if not (run_dir / METRICS_FILE).is_file():
        raise UserError(f"{run_dir} has no {METRICS_FILE}: there is nothing to report")


def _gather(run_dir: Path, config: Config) -> dict[str, object]:
    summary = read_summary(run_dir)
    metrics = read_metrics(run_dir / METRICS_FILE)
    beta = reward_scale(specification(config))
    matches = read_matches(run_dir, config)
    again = ["--config", f"{run_dir}/{CONFIG_FILE}", "--run_dir", f"{run_dir}_again"]
    names = [str(term["name"]) for term in objective_terms(config)]
    again += [f"--objective.name={name}" for name in names if ":" in name]  # code: on the user's word
    commands = [shlex.join(["dpo", "train", *again])]
    content: dict[str, object] = {
        "title": f"{objective_title(config)} on {_names(config.data.train)}",
        "subtitle": " · ".join(
            [config.model.source, trained_title(config), str(run_dir), describe_steps(metrics)]
        ),
        "finished": summary is not None,
        "figures": None,
        "lost": None,
        "matches": matches,
        "other_matches": ", ".join(matches_of_others(run_dir, config)),
        "warnings": all_warnings(matches) if matches else [],
        "measure": shlex.join(["dpo", "winrate", "--run", str(run_dir), *_judge_to_name(config)]),
        "curves": draw_run(add_log_ratios(metrics, beta=beta)),
        "data": read_data(run_dir / DATA_FILE),
        "commands": commands + [match["command"] for match in matches],
        "settings": (run_dir / CONFIG_FILE).read_text(encoding="utf-8"),
        "versions": (summary or {}).get("versions") or versions(),
        "versions_are_the_runs": "versions" in (summary or {}),
    }
    if (run_dir / HELDOUT_FILE).is_file():
        content |= _describe_kept(run_dir, config, beta=beta)
    return content


def _describe_kept(run_dir: Path, config: Config, *, beta: float) -> dict[str, object]:
    """What is shown of the log-probs that the run left, or why their data no longer tell what they are of."""
    try:
        heldout = load_heldout(run_dir, config)
    except (UserError, EnvironmentFailure) as error:
        return {"lost": str(error)}
    return {
        **describe_heldout(heldout, beta=beta),
        "pair_lists": describe_extremes(run_dir, heldout, beta=beta),
        "legend": LEGEND,
    }


def _judge_to_name(config: Config) -> list[str]:
    """What has to be said of the judge where the data are not those that come with one."""
    return [] if all_shipped(config.data.eval) else ["--judge", "JUDGE"]


def _names(sources: str | list[Any]) -> str:
    """Of data, without folders."""
    return ", ".join(Path(find_data(source)).name for source in spellings(sources))


def describe_steps(metrics: Sequence[dict[str, int | float]]) -> str:
    """How many steps, and how long they took."""
    trained = [row for row in metrics if "loss" in row]
    seconds = sum(row.get("seconds", 0.0) for row in trained)
    return f"{len(trained)} step{'' if len(trained) == 1 else 's'}" + (
        f" in {seconds / 60:z.1f} minutes" if seconds else ""
    )


def describe_heldout(heldout: Heldout, *, beta: float) -> dict[str, object]:
    """The verdict with its baselines, plots and tables."""
    figures, rows = describe(heldout.rows, beta=beta), as_pairs(heldout.rows)
    pairs = make_pairs(rows)
    delta = beta * pairs.gap(rows.log_ratio)
    named = [("policy", figures["accuracy"])]
    named += [(words, figures["baselines"][name]) for name, words in BASELINES.items()]
    return {
        "figures": figures,
        "cautions": cautions(figures),
        "not_above": [_GAINS[name] for name, (_, low, _) in figures["over_baselines"].items() if low <= 0],
        "verdict_plot": Markup(plots.intervals("Held-out accuracy, 95% intervals", named, level=0.5)),
        "verdict_rows": _verdict_rows(figures),
        "breakdown": breakdown(figures),
        "heldout_plots": [
            Markup(
                plots.histogram(
                    "Margins of held-out pairs", delta, "δ = β × difference of log-ratios", counted="pairs"
                )
            ),
            Markup(plots.reliability("Calibration", figures["calibration"])),
        ],
    }


def _verdict_rows(figures: HeldoutFigures) -> list[tuple[str, str]]:
    ratios = figures["log_ratio"]
    rows = [
        *(
            (f"accuracy minus that of {words}", points_with_interval(figures["over_baselines"][name]))
            for name, words in _GAINS.items()
        ),
        (f"margin, β {figures['beta']:g}", with_interval(figures["margin"])),
        *(
            (f"log-ratio of {word} responses, nats", with_interval(ratios[name], 2))
            for name, word in (("chosen", "better"), ("rejected", "worse"))
            if name in ratios
        ),
        ("expected calibration error", f"{figures['calibration']['ece']:z.3f}"),
        ("pairs with δ = 0", str(figures["ties"])),
    ]
    if "rankings" in figures:
        rankings, chance = figures["rankings"], figures["rankings"]["chance"]
        rows += [
            ("Kendall's τ", with_interval(rankings["kendall_tau"])),
            (f"best one found (chance {percent(chance['top_1'])})", percent_with_interval(rankings["top_1"])),
            ("NDCG", with_interval(rankings["ndcg"])),
            (
                f"log-likelihood (chance {chance['log_likelihood']:z.3f})",
                with_interval(rankings["log_likelihood"]),
            ),
        ]
    return rows


BREAKDOWN = (
    "part",
    "pairs",
    "ties",
    "accuracy",
    "95% interval",
    "margin",
    "log-ratio, better",
    "worse",
    "calibration error",
    *BASELINES.values(),
)
"""Columns of the table by length difference and by source."""


def breakdown(figures: HeldoutFigures) -> tuple[list[str], list[list[str]]]:
    """Columns of BREAKDOWN that are not empty, and a row for each part: by length difference, by source."""
    rows = [[name.replace("_", " "), *_part_cells(part)] for name, part in figures["by_length"].items()]
    rows += [[name, *_part_cells(part)] for name, part in figures.get("by_source", {}).items()]
    if "mean_of_sources" in figures:
        rows.append(["mean of the sources", *_mean_cells(figures["mean_of_sources"])])
    kept = [place for place in range(len(BREAKDOWN)) if any(row[place] for row in rows)]
    return [BREAKDOWN[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _part_cells(part: PartFigures | SourceFigures) -> list[str]:
    """Of all columns but the first; empty where a part has no such figure."""
    ratios = part.get("log_ratio", {})
    interval, remark = part_interval(part)
    shown = percents(interval) if interval else ""
    return [
        str(part["pairs"]),
        str(part["ties"]),
        percent(part["accuracy"][0]),
        f"{shown} ({remark})" if shown and remark else shown or remark,
        with_interval(part["margin"]) if interval else f"{part['margin'][0]:z.3f}",
        *(f"{ratios[name][0]:+z.2f}" if name in ratios else "" for name in ("chosen", "rejected")),
        f"{part['calibration']['ece']:z.3f}",
        *(percent(rate[0]) if (rate := part.get(name)) else "" for name in BASELINES),
    ]


def _mean_cells(mean: Mapping[str, Estimate]) -> list[str]:
    """The same columns of the mean of the sources, which is of accuracies only."""
    rates = [percent(mean["accuracy"][0]), percents(mean["accuracy"])]
    return ["", "", *rates, "", "", "", "", *(percent(mean[name][0]) for name in BASELINES)]
