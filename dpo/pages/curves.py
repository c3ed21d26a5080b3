"""A run's metrics as plots over steps: of one run, or of several in one picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from dpo.pages import plots
from dpo.pages.plots import Curve, is_drawable

Metrics = Sequence[Mapping[str, int | float]]
"""Lines of metrics.jsonl."""


class Panel(NamedTuple):
    """One plot."""

    title: str
    series: Sequence[tuple[str, str]]
    """The metrics that are drawn together, and what they are called."""
    level: float | None = None
    """A value to compare with."""
    is_rate: bool = False
    """Whether it is shown in percent."""


PANELS: Sequence[Panel] = (
    Panel("Loss", [("loss", "loss")]),
    Panel("Accuracy", [("rewards/accuracies", "accuracy")], 0.5, is_rate=True),
    Panel("Margin δ", [("rewards/margins", "margin")], 0.0),
    Panel(
        "Log-ratio, nats",
        [("ratios/chosen", "chosen"), ("ratios/rejected", "rejected")],
        0.0,
    ),
    Panel("Gradient norm", [("grad_norm", "gradient norm")]),
    Panel("KL on own samples, nats", [("samples/kl", "KL")], 0.0),
    Panel("Reward of own samples", [("samples/reward", "reward")]),
    Panel("Length of own samples, tokens", [("samples/length", "length")]),
    Panel("Log-prob, nats", [("logps/chosen", "chosen"), ("logps/rejected", "rejected")]),
    Panel(
        "Length in the data, tokens",
        [("lengths/chosen", "chosen"), ("lengths/rejected", "rejected")],
    ),
    Panel("Learning rate", [("learning_rate", "learning rate")]),
    Panel("Tokens a second", [("tokens/s", "tokens/s")]),
)


EXACT = {"learning_rate"}
"""Metrics without noise."""


def add_log_ratios(metrics: Metrics, *, beta: float) -> list[dict[str, int | float]]:
    """The same lines with log-ratios, which are rewards over β."""
    return [
        dict(row)
        | {
            name.replace("rewards/", "ratios/"): value / beta
            for name, value in row.items()
            if name.endswith(("rewards/chosen", "rewards/rejected"))
        }
        for row in metrics
    ]


def draw_run(metrics: Metrics) -> list[Markup]:
    """A plot for each panel that the run has metrics for; held-out values are points, on dashes."""
    drawn = []
    for panel in PANELS:
        lines = [
            Curve(
                None if held else label,
                *zip(*found, strict=True),
                colour=index if len(panel.series) > 1 else int(held),
                is_heldout=held,
                is_exact=name in EXACT,
            )
            for index, (name, label) in enumerate(panel.series)
            for held in (False, True)
            if (found := points(metrics, f"eval/{name}" if held else name))
        ]
        if lines:
            drawn.append(Markup(plots.curves(panel.title, lines, level=panel.level, is_rate=panel.is_rate)))
    return drawn


OWN_SCALE = ("Loss", "Margin δ", "Gradient norm")
"""Panels in units of a run's own objective and β."""


def draw_runs(runs: Mapping[str, Metrics], *, left_out: Collection[str] = ()) -> list[Markup]:
    """The panels with a line for each run; a panel with two metrics becomes two plots."""
    drawn = []
    for panel in (panel for panel in PANELS if panel.title not in left_out):
        for name, label in panel.series:
            title = panel.title if len(panel.series) == 1 else f"{panel.title}: {label}"
            lines = [
                Curve(
                    run,
                    *zip(*found, strict=True),
                    colour=index,
                    is_heldout=held,
                    is_one_of_many=True,
                    stroke=index,
                    is_exact=name in EXACT,
                )
                for index, (run, metrics) in enumerate(runs.items())
                for held in (False, True)
                if (found := points(metrics, f"eval/{name}" if held else name))
            ]
            if lines:
                svg = plots.curves(title, lines, level=panel.level, legend=False, is_rate=panel.is_rate)
                drawn.append(Markup(svg))
    return drawn


def points(metrics: Metrics, name: str) -> list[tuple[int | float, int | float]]:
    """(step, value) of a metric wherever it is there and a figure can show it."""
    found = [(row["step"], row[name]) for row in metrics if name in row]
    return [point for point in found if all(map(is_drawable, point))]
