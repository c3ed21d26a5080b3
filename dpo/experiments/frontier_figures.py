"""The figures and the tables of `dpo frontier`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo.experiments.frontier_results import FrontierResult, Line
from dpo.files import new_file
from dpo.pages.page import with_interval

COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7b4fb5", "#a6761d", "#c2185b")
"""One an objective."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One a β."""
NAMES = {"dpo": "DPO", "ipo": "IPO", "plackett_luce": "Plackett-Luce"}
_STYLE: Any = {
    "svg.hashsalt": "dpo",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_frontier(path: Path, result: FrontierResult) -> None:
    """Reward against the root of KL: a line for each objective and β through its training, and best-of-n."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        best = result["best_of_n"]
        start = best[0]
        for line in result["lines"]:
            objectives, betas = result["settings"]["objectives"], result["settings"]["betas"]
            colour = COLOURS[objectives.index(line["objective"]) % len(COLOURS)]
            marker = MARKERS[betas.index(line["beta"]) % len(MARKERS)]
            _draw_line(axes, start["reward"][0], line, colour, marker)
        axes.plot(
            [point["kl"] for point in best],
            [point["reward"][0] for point in best],
            "k--",
            linewidth=1.2,
            label=f"best of n ≤ {best[-1]['n']}",
        )
        for point in best:
            axes.errorbar(
                point["kl"], point["reward"][0], yerr=_bars(point["reward"]), color="black", linewidth=0.8
            )
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_xlim(left=0)
        axes.set_xticks([x for x in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if x <= axes.get_xlim()[1]])
        axes.set_xlabel("KL(policy ‖ reference) of a response, nats, sampled (square-root scale)")
        axes.set_ylabel(f"mean true reward ({result['settings']['reward']})")
        axes.set_title(f"Reward against KL, {result['prompts']} held-out prompts, 95% intervals", loc="left")
        _add_legend(axes, result)
        _save(figure, path)


def draw_temperatures(path: Path, result: FrontierResult) -> None:
    """Win-rate against sampling temperature."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.subplots()
        objectives = result["settings"]["objectives"]
        for place, line in enumerate(result["temperatures"]):
            is_reference = line["beta"] is None
            colour = "black" if is_reference else COLOURS[objectives.index(line["policy"]) % len(COLOURS)]
            spread = 0.012 * (place - (len(result["temperatures"]) - 1) / 2)
            values = list(line["win_rates"].values())
            axes.errorbar(
                [float(text) + spread for text in line["win_rates"]],
                [value[0] for value in values],
                yerr=_all_bars(values),
                fmt="--o" if is_reference else "-o",
                color=colour,
                markersize=4,
                linewidth=1.4,
                elinewidth=0.8,
                label="reference" if is_reference else _name(line["policy"]) + f", β {line['beta']:g}",
            )
        axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xticks(result["settings"]["temperatures"])
        axes.set_xlabel("sampling temperature")
        axes.set_ylabel(f"win-rate over {result['settings']['opponent']}")
        axes.set_title(
            f"Win-rate by temperature, {result['prompts']} held-out prompts, 95% intervals", loc="left"
        )
        figure.legend(loc="outside right upper")
        _save(figure, path)


def frontier_as_markdown(result: FrontierResult) -> str:
    """The numbers behind both figures, and the settings."""
    lines = ["| objective | β | step | true reward | KL, nats | tokens |", "|---|---|---|---|---|---|"]
    for line in result["lines"]:
        for point in line["points"]:
            lines.append(
                f"| {_name(line['objective'])} | {line['beta']:g} | {point['step']} | "
                f"{with_interval(point['reward'], 2)} | {with_interval(point['kl'], 1)} | "
                f"{point['length']:.0f} |"
            )
    lines += ["", "| best of n | true reward | KL, nats |", "|---|---|---|"]
    lines += [f"| {p['n']} | {with_interval(p['reward'], 2)} | {p['kl']:z.2f} |" for p in result["best_of_n"]]
    texts = list(result["temperatures"][0]["win_rates"])
    rates, cut = [], []
    for one in result["temperatures"]:
        name = "reference" if one["beta"] is None else f"{_name(one['policy'])}, β {one['beta']:g}"
        rates.append([name, *(with_interval(one["win_rates"][text], 2) for text in texts)])
        cut.append([name, *(f"{one['cut'][text]:.0%}" for text in texts)])
    lines += _table([f"win-rate over {result['settings']['opponent']}", *texts], rates)
    lines += _table([f"cut off at {result['settings']['max_new_tokens']} tokens", *texts], cut)
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items() if key != "output")
    return "\n".join([*lines, "", f"Settings: {settings}; {result['prompts']} held-out prompts.", ""])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table after an empty one."""
    return ["", *(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows))]


def _draw_line(axes: Axes, start: float, line: Line, colour: str, marker: str) -> None:
    """From the reference, at KL 0, through the points of training."""
    points = line["points"]
    kl, reward = [point["kl"] for point in points], [point["reward"] for point in points]
    axes.plot(
        [0, *(x[0] for x in kl)], [start, *(y[0] for y in reward)], color=colour, linewidth=1, alpha=0.6
    )
    axes.errorbar(
        [x[0] for x in kl],
        [y[0] for y in reward],
        xerr=_all_bars(kl),
        yerr=_all_bars(reward),
        fmt=marker,
        color=colour,
        markersize=4.5,
        elinewidth=0.5,
        alpha=0.9,
    )


def _add_legend(axes: Axes, result: FrontierResult) -> None:
    """Colours stand for objectives, markers for β; only what is drawn."""
    drawn = {line["objective"] for line in result["lines"]} | {line["beta"] for line in result["lines"]}
    for index, name in enumerate(result["settings"]["objectives"]):
        if name in drawn:
            axes.plot([], [], color=COLOURS[index % len(COLOURS)], linewidth=2, label=_name(name))
    for index, beta in enumerate(result["settings"]["betas"]):
        if beta in drawn:
            axes.plot([], [], MARKERS[index % len(MARKERS)], color="grey", label=f"β {beta:g}")
    axes.legend(loc="lower right")


def _bars(interval: Sequence[float]) -> list[list[float]]:
    """What `errorbar` wants: how far below and above."""
    return _all_bars([interval])


def _all_bars(intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    below = [max(estimate - low, 0.0) for estimate, low, _ in intervals]
    return [below, [max(high - estimate, 0.0) for estimate, _, high in intervals]]


def _name(objective: str) -> str:
    return NAMES.get(objective, objective)


def _save(figure: Figure, path: Path) -> None:
    with new_file("a figure", path) as beside:
        figure.savefig(beside, format="svg", metadata={"Date": None})
