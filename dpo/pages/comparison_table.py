"""What a comparison of runs leads with: figures of one scale in all of them, as pictures and a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from dpo.config import Config
from dpo.evaluation.accuracy import accuracy, log_ratios
from dpo.evaluation.common import Common
from dpo.evaluation.figures import Estimate, HeldoutFigures
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.ranking import rankings
from dpo.pages import plots
from dpo.pages.curves import points
from dpo.pages.page import percent, percent_with_interval, points_with_interval, with_interval
from dpo.pages.report import describe_steps
from dpo.pages.report_match import ShownMatch
from dpo.runs import objective_title, trained_title


class ComparedRun(NamedTuple):
    """What a run left."""

    name: str
    path: Path
    config: Config
    metrics: list[dict[str, int | float]]
    heldout: Heldout | None
    figures: HeldoutFigures | None
    matches: dict[str, ShownMatch]
    """Its win-rates by what has to be the same for two of them to be compared."""


Row = tuple[str, list[str]]
"""What a row of the table is, and a cell for each run."""
GAIN = "accuracy minus the first run's"
_SIDES = {"chosen": "better", "rejected": "worse"}


def compare(runs: Sequence[ComparedRun], shared: Common | None, gains: Sequence[Common | None]) -> list[Row]:
    """The table, without rows that are empty throughout; δ, loss and calibration are in a run's own units.

    `shared` is what all runs scored, `gains` what each of them but the first scored as the first did.
    """
    rows: list[Row] = [
        ("objective", [objective_title(run.config) for run in runs]),
        ("trained", [trained_title(run.config) for run in runs]),
    ]
    for kind in kinds(runs):
        found = [run.matches.get(kind) for run in runs]
        rows += [
            (f"win-rate {kind}", _cells(found, _win_rate)),
            ("at equal lengths", _cells(found, lambda match: _rate(match["controlled"]))),
        ]
    rows += _heldout_rows(runs, shared, gains)
    rows += [
        ("KL, nats", [_kl(run) for run in runs]),
        ("steps", [describe_steps(run.metrics) for run in runs]),
    ]
    return [(name, cells) for name, cells in rows if any(cells)]


def kinds(runs: Sequence[ComparedRun]) -> list[str]:
    """The kinds of win-rates that the runs have."""
    return list(dict.fromkeys(kind for run in runs for kind in run.matches))


def draw_verdicts(runs: Sequence[ComparedRun], shared: Common | None) -> list[Markup]:
    """Win-rates and accuracy of all runs that have them, then what that cost in KL."""
    drawn = [
        (
            _title("Win-rate, 95% intervals", kind),
            [match["figures"]["win_rate"] if (match := run.matches.get(kind)) else None for run in runs],
        )
        for kind in kinds(runs)
    ]
    drawn.append(("Held-out accuracy, 95% intervals", _accuracies(runs, shared)))
    pictures = [Markup(picture) for title, found in drawn if (picture := _draw_intervals(title, runs, found))]
    return pictures + [Markup(picture) for picture in (*_against_kl(runs), *_paths(runs))]


def _title(what: str, kind: str) -> str:
    """In lines that fit a picture."""
    return "\n".join([what, *textwrap.wrap(kind, 60)[:2]])


def _draw_intervals(title: str, runs: Sequence[ComparedRun], found: Sequence[Estimate | None]) -> str:
    """Empty where no run has the figure."""
    given = [
        (run.name, estimate, place)
        for place, (run, estimate) in enumerate(zip(runs, found, strict=True))
        if estimate is not None
    ]
    rows = [(name, estimate) for name, estimate, _ in given]
    return plots.intervals(title, rows, level=0.5, colours=[place for *_, place in given]) if rows else ""


def _against_kl(runs: Sequence[ComparedRun]) -> list[str]:
    """Of each kind, win-rate and mean reward against KL: the upper left is better (DPO's Figure 2)."""
    drawn: list[str] = []
    for kind in kinds(runs):
        found = [
            (run.name, match["kl"][1], match, place)
            for place, run in enumerate(runs)
            if (match := run.matches.get(kind)) is not None and match["kl"] is not None
        ]
        if not found:
            continue
        rates = [(name, kl, match["figures"]["win_rate"], place) for name, kl, match, place in found]
        title = _title("Win-rate against KL", kind)
        drawn.append(plots.against(title, "KL, nats", rates, level=0.5, is_rate=True))
        rewards = [
            (name, kl, match["rewards"][0], place) for name, kl, match, place in found if match["rewards"]
        ]
        opponents = [match["rewards"][1][0] for *_, match, _ in found if match["rewards"]]
        if rewards:
            title = _title("Mean reward against KL", kind)
            drawn.append(plots.against(title, "KL, nats", rewards, level=opponents[0]))
    return drawn


def _paths(runs: Sequence[ComparedRun]) -> list[str]:
    """Reward of a policy's own samples against their KL, from evaluation to evaluation."""
    paths = [(_path(run), place) for place, run in enumerate(runs)]
    drawn = [(path, place) for path, place in paths if path]
    return [plots.paths("Reward of own samples against KL", "KL, nats", drawn)] if drawn else []


def _path(run: ComparedRun) -> list[tuple[float, float]]:
    rewards = dict(points(run.metrics, "samples/reward"))
    return [(kl, rewards[step]) for step, kl in points(run.metrics, "samples/kl") if step in rewards]


def _heldout_rows(
    runs: Sequence[ComparedRun], shared: Common | None, gains: Sequence[Common | None]
) -> list[Row]:
    own = [run.figures["accuracy"] if run.figures else None for run in runs]
    common = _accuracies(runs, shared)
    rows: list[Row] = []
    if common != own:
        rows.append(("accuracy on the pairs that all have", list(map(_rate, common))))
    rows += [
        ("held-out accuracy", list(map(_rate, own))),
        (
            GAIN,
            ["", *("" if gain is None else points_with_interval(gain.difference(0, 1)) for gain in gains)],
        ),
        *_ranking_rows(shared),
    ]
    for side, word in _SIDES.items():
        found = [ratios.get(side) for ratios in _log_ratios(runs, shared)]
        rows.append(
            (
                f"log-ratio of {word} responses, nats",
                ["" if ratio is None else with_interval(ratio, 2) for ratio in found],
            )
        )
    return rows


def _ranking_rows(shared: Common | None) -> list[Row]:
    """How the rankings that all runs scored are reproduced."""
    found = None if shared is None else shared.rankings()
    if found is None:
        return []
    figures = [rankings(rows, beta=1.0) for rows in found]
    chance = figures[0]["chance"]["top_1"]
    return [
        ("Kendall's τ", [with_interval(one["kendall_tau"]) for one in figures]),
        (f"best one found (chance {percent(chance)})", [_rate(one["top_1"]) for one in figures]),
    ]


def _accuracies(runs: Sequence[ComparedRun], shared: Common | None) -> list[Estimate | None]:
    """On the pairs that all have, where there are any."""
    if shared is None:
        return [run.figures["accuracy"] if run.figures else None for run in runs]
    return [list(accuracy(rows, shared.pairs, shared.pairs.resolved_gap(rows))) for rows in shared.rows]


def _log_ratios(runs: Sequence[ComparedRun], shared: Common | None) -> list[dict[str, Estimate]]:
    """Of the responses that all have, where there are any; of single labelled ones each run's own."""
    own = [run.figures["log_ratio"] if run.figures else {} for run in runs]
    if shared is None or any(run.figures and run.figures["unpaired"] for run in runs):
        return own
    return [log_ratios(rows) for rows in shared.rows]


def _cells(matches: Sequence[ShownMatch | None], cell: Callable[[ShownMatch], str]) -> list[str]:
    return ["" if match is None else cell(match) for match in matches]


def _win_rate(match: ShownMatch) -> str:
    return _rate(match["figures"]["win_rate"]) + (f"; cut off: {match['cut']}" if match["cut"] else "")


def _kl(run: ComparedRun) -> str:
    """On the policy's own samples: of a match at temperature 1, or as it was measured in training."""
    measures = [match["kl"] for match in run.matches.values() if match["kl"] is not None]
    found = [estimate for name, estimate in measures if name.startswith("KL")]
    if found:
        return with_interval(found[0], 1)
    measured = points(run.metrics, "samples/kl")
    return f"{measured[-1][1]:.1f}" if measured else ""


def _rate(interval: Estimate | None) -> str:
    return "" if interval is None else percent_with_interval(interval)
