"""`dpo watch`: the curves of a run on the terminal, from its metrics.jsonl, while another process trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo import terminal
from dpo.config import Config
from dpo.losses import reward_scale
from dpo.pages import terminal_plots
from dpo.pages.curves import PANELS, Metrics, Panel, add_log_ratios, points
from dpo.pages.terminal_plots import Series
from dpo.runs import (
    METRICS_FILE,
    SUMMARY_FILE,
    objective_title,
    read_metrics,
    specification,
    trained_title,
)
from dpo.training.lock import is_held
from dpo.training.progress import SHOWN, time_left

PANEL_WIDTH, PANEL_HEIGHT = 38, 9
"""Characters and lines of a plot, at least."""
SHOWN_PANELS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "ratios/chosen",
    "grad_norm",
    "samples/kl",
    "tokens/s",
)
"""Panels by their first metric; the others are for the report."""
_COLOURS = ("cyan", "yellow")
_MEAN_OF = 10
"""A line is the running mean over one part in so many of all steps."""
_MOST_STEPS, _MOST_SECONDS = 2**53, 1e9
"""Beyond these a line says no pace: of a whole run, and of a step."""


def watch(
    run_dir: Path,
    config: Config,
    *,
    interval: float,
    once: bool,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Draw until the run is finished or nobody trains it any more; whether it is finished.

    Where there is no terminal only the last picture is printed.
    """
    console = console or terminal.console()
    follow = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    if follow is not None and not once:
        with follow:
            while (state := run_state(run_dir)) == "running":
                follow.update(picture(run_dir, config, state, console.width), refresh=True)
                sleep(interval)
    else:
        while (state := run_state(run_dir)) == "running" and not once:
            sleep(interval)
    console.print(picture(run_dir, config, state, console.width))
    return state == "finished"


def run_state(run_dir: Path) -> str:
    """running, finished or stopped."""
    if is_held(run_dir):
        return "running"
    return "finished" if (run_dir / SUMMARY_FILE).is_file() else "stopped"


def picture(run_dir: Path, config: Config, state: str, width: int) -> Group:
    """What there is to see: how far the run is, its curves, the newest held-out figures."""
    beta = reward_scale(specification(config))
    path = run_dir / METRICS_FILE
    metrics = add_log_ratios(read_metrics(path), beta=beta) if path.is_file() else []
    title = f"  {objective_title(config)}, {trained_title(config)}"
    head = Text.assemble((run_dir.resolve().name, "bold"), title)
    return Group(head, _progress(config, metrics, state), "", _plots(metrics, width), _heldout(metrics))


def _progress(config: Config, metrics: Metrics, state: str) -> Text:
    trained = [row for row in metrics if "loss" in row]
    if not trained:
        return Text(f"{state}: no step yet", "dim")
    last, total = trained[-1], total_steps(config, trained[-1])
    text = f"{state}, step {int(last['step']) + 1}" + (f" of {total}" if total is not None else "")
    seconds = [row["seconds"] for row in trained[-20:] if 0 <= row.get("seconds", -1) < _MOST_SECONDS]
    if state == "running" and seconds and total is not None:
        seconds_a_step = statistics.median(seconds)
        left = time_left(seconds_a_step * max(total - int(last["step"]) - 1, 0))
        text += f", {seconds_a_step:.1f} s a step, {left}"
    return Text(text, "green" if state == "finished" else "red" if state == "stopped" else "")


def total_steps(config: Config, last: Mapping[str, int | float]) -> int | None:
    """Steps of the whole run: as set, or what so many epochs come to at the pace of the last line.

    None where that line does not say a pace.
    """
    training, step, epoch = config.training, int(last["step"]), last.get("epoch", 0.0)
    if training.steps is not None:
        return training.steps
    if (
        step < 0
        or not epoch > 0
        or not (total := training.epochs / (epoch / (step + 1)) + 1e-9) < _MOST_STEPS
    ):
        return None
    return max(int(total), step + 1)


def _plots(metrics: Metrics, width: int) -> Table:
    """As many plots side by side as fit."""
    shown = [panel for panel in PANELS if panel.series[0][0] in SHOWN_PANELS]
    panels = [(panel, series) for panel in shown if (series := _series(panel, metrics))]
    columns = max(1, width // (PANEL_WIDTH + 2))
    plot_width = min(width, width // columns - 2)
    grid = Table.grid(padding=(0, 2, 1, 0))
    drawn = [terminal_plots.draw(p.title, s, width=plot_width, height=PANEL_HEIGHT) for p, s in panels]
    for start in range(0, len(drawn), columns):
        grid.add_row(*drawn[start : start + columns])
    return grid


def _series(panel: Panel, metrics: Metrics) -> list[Series]:
    """Training lines, smoothed; held-out ones in the other colour, or dimmed where there are two lines.

    The dimmed ones are not named: there is no room for four names.
    """
    found = []
    for index, (name, label) in enumerate(panel.series):
        if trained := points(metrics, name):
            steps, values = zip(*trained, strict=True)
            found.append(
                Series(
                    label if len(panel.series) > 1 else "training",
                    steps,
                    _running_mean(values),
                    _COLOURS[index],
                )
            )
        if heldout := points(metrics, f"eval/{name}"):
            style = f"dim {_COLOURS[index]}" if len(panel.series) > 1 else "magenta"
            steps, values = zip(*heldout, strict=True)
            name = "" if len(panel.series) > 1 else "held out"
            found.append(Series(name, steps, values, style))
    return found


def _running_mean(values: Sequence[int | float]) -> list[float]:
    window = max(1, len(values) // _MEAN_OF)
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _heldout(metrics: Metrics) -> Text:
    rows = [row for row in metrics if any(f"eval/{name}" in row for name in SHOWN)]
    if not rows:
        return Text("no held-out evaluation yet", "dim")
    figures = "  ".join(
        f"{word} {rows[-1][f'eval/{name}']:.4g}" for name, word in SHOWN.items() if f"eval/{name}" in rows[-1]
    )
    return Text(f"held out after {int(rows[-1]['step'])} steps: {figures}", "magenta")
