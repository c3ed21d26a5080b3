"""One self-contained HTML page about several runs: figures side by side, curves in one picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dpo.config import Config
from dpo.config.run import ObjectiveSettings
from dpo.evaluation.accuracy import describe
from dpo.evaluation.choosing import Choice
from dpo.evaluation.common import Common, find_common, have_same_preferences
from dpo.evaluation.heldout import load_heldout
from dpo.losses import default_values, reward_scale
from dpo.pages import plots
from dpo.pages.comparison_table import ComparedRun, compare, draw_verdicts, kinds
from dpo.pages.curves import OWN_SCALE, add_log_ratios, draw_runs
from dpo.pages.page import percent_with_interval, render, write_page
from dpo.pages.report import require_metrics
from dpo.pages.report_match import kind_of_match, read_matches
from dpo.runs import HELDOUT_FILE, METRICS_FILE, flat_settings, objective_title, read_metrics, specification


def write_comparison(
    runs: Sequence[tuple[str | Path, Config]],
    *,
    output: str | Path | None = None,
    choice: Choice | None = None,
    failed: Mapping[str, int] | None = None,
) -> Path:
    """Write a page about at least two runs, by default comparison.html in the folder that holds them all.

    `choice` is the one made among them, in which those that `failed`, with their exit codes, had no part.

    Raises:
      ValueError: for a directory that no run has written to.
    """
    read = [
        _read(name, Path(run), _with_betas(config))
        for name, (run, config) in zip(_names(runs), runs, strict=True)
    ]
    path = Path(output or _common_folder(runs) / "comparison.html")
    return write_page(path, render("comparison.html.jinja", _gather(read) | _chosen(choice, failed or {})))


def _chosen(choice: Choice | None, failed: Mapping[str, int]) -> dict[str, object]:
    """The table of a choice, and what may be said of it."""
    if choice is None:
        return {"choice": None}
    by, stated = choice.prompts
    return {
        "choice": {
            "names": [f"accuracy by which is chosen, {by} prompts", f"accuracy on the other {stated}"],
            "rows": [
                (one.name, [percent_with_interval(one.choosing), percent_with_interval(one.stated)])
                for one in choice.judged
            ],
            "notes": [
                *choice.in_words(percent_with_interval),
                *(
                    f"{name} ended with exit code {code} and has no part in it"
                    for name, code in failed.items()
                ),
            ],
        }
    }


def _with_betas(config: Config) -> Config:
    """The settings with the β that an objective has where none is given: "dpo" is "dpo (beta 0.1)"."""

    def filled(term: ObjectiveSettings) -> ObjectiveSettings:
        beta = default_values(term["name"]).get("beta")
        return term if beta is None else {"name": term["name"], "beta": beta} | term

    return replace(
        config, objective=filled(config.objective), objectives=[filled(term) for term in config.objectives]
    )


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
        {kind_of_match(match): match for match in read_matches(path, config)},
    )


def _names(runs: Sequence[tuple[str | Path, Config]]) -> list[str]:
    """The paths without what they have in common at the front."""
    common = _common_folder(runs)
    return [str(Path(run).resolve().relative_to(common)) for run, _ in runs]


def _common_folder(runs: Sequence[tuple[str | Path, Config]]) -> Path:
    return Path(os.path.commonpath([Path(run).resolve().parent for run, _ in runs]))


def _gather(runs: Sequence[ComparedRun]) -> dict[str, object]:
    first, *rest = runs
    shared = _find_shared(runs)
    gains = [_find_shared([run, first]) for run in rest]
    return {
        "title": f"{len(runs)} runs",
        "subtitle": " · ".join(dict.fromkeys(objective_title(run.config) for run in runs)),
        "verdict_plots": draw_verdicts(runs, shared),
        "rows": compare(runs, shared, gains),
        "runs": [
            {
                "name": run.name,
                "path": run.path,
                "colour": index % len(plots.SERIES) + 1,
            }
            for index, run in enumerate(runs)
        ],
        "notes": _notes(runs, shared, gains),
        "curves": draw_runs(
            {run.name: run.metrics for run in runs},
            left_out=() if _has_one_scale(runs) else OWN_SCALE,
        ),
        "settings": differing_settings([run.config for run in runs]),
    }


def _find_shared(runs: Sequence[ComparedRun]) -> Common | None:
    """What the runs' held-out preferences have in common; None where nothing, or a run has none."""
    heldouts = [run.heldout for run in runs if run.heldout is not None]
    return find_common(heldouts) if len(heldouts) == len(runs) else None


def _has_one_scale(runs: Sequence[ComparedRun]) -> bool:
    """Whether losses and δ of all runs are in the same units: one objective with one β."""
    return len({repr(specification(run.config)) for run in runs}) == 1


def _notes(runs: Sequence[ComparedRun], shared: Common | None, gains: Sequence[Common | None]) -> list[str]:
    """What a reader has to know before comparing columns."""
    notes = [
        "Intervals are 95%, by bootstrap over prompts. “Accuracy minus the first run's” is the paired "
        "difference on the same pairs: it says more than two intervals that overlap."
        if any(gains)
        else "Intervals are 95%, by bootstrap over prompts."
    ]
    scored = [run for run in runs if run.heldout is not None]
    apart = [run.name for run in scored[1:] if not _same_preferences(scored[0], run)]
    if apart:
        notes.append(
            f"Held-out preferences other than those of {scored[0].name}: {', '.join(apart)}. "
            + (
                f"Compared is what all have in common: {len(shared.pairs.row)} pairs of "
                f"{len(set(shared.prompts))} prompts."
                if shared is not None
                else "There is no pair that all of them have."
            )
        )
    if not _has_one_scale(runs):
        notes.append(
            "Losses, margins δ and gradient norms are in units of each run's own objective and β: they are "
            "in the runs' own reports and not on one axis here; log-ratios and KL are in nats everywhere."
        )
    if len(kinds(runs)) > 1:
        notes.append(
            "Win-rates of different judges, opponents, prompts or temperatures each have a row of their own."
        )
    return notes


def _same_preferences(run: ComparedRun, other: ComparedRun) -> bool:
    assert run.heldout is not None
    assert other.heldout is not None
    return have_same_preferences([run.heldout, other.heldout])


def differing_settings(configs: Sequence[Config]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, run_dir apart, by their dotted names."""
    flat = [
        {name: _value(value) for name, value in flat_settings(asdict(config)).items()} for config in configs
    ]
    names = dict.fromkeys(name for one in flat for name in one if name != "run_dir")
    found = [(name, [one.get(name, "") for one in flat]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _value(value: object) -> str:
    """As the settings file has it, but for what it has no value for."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
