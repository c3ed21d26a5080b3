"""Figures as SVG text for an HTML page: colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dpo.evaluation.figures import CalibrationFigures

INK = "#0a0b01"
FAINT = "#0a0b02"
SERIES = ("#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06", "#0a0b07", "#0a0b08")
_COLOURS = {INK: "currentColor", FAINT: "var(--faint)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}
STROKES: Sequence[Any] = ("-", (0, (5, 3)), (0, (2, 2.5)), (0, (7, 2.5, 1.5, 2.5)))
"""Dashes of lines, from the start again after their end."""
_DOTS = (6.0, 4.4, 3.0, 1.8)
"""Sizes of the points with them."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names may have dollars in them
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


LARGEST, LARGEST_RATE = 1e100, 100.0
"""Numbers beyond it are left out of a figure, as infinite ones are: an axis would overflow, and a library
would say so on the terminal. Of rates, in percent, an axis would be wider than the page."""


def is_drawable(value: float | int) -> bool:
    """Whether a figure can show a number; a whole one may be of any size."""
    return abs(value) <= LARGEST


def _drawable(values: Iterable[float | int], most: float = LARGEST) -> Float[np.ndarray, " n"]:
    """The numbers, with NaN, of which nothing is drawn, for those that no figure can show."""
    return np.array([float(value) if abs(value) <= most else np.nan for value in values], float)


class Curve(NamedTuple):
    """One line of a plot: training values by step, and held-out ones as points."""

    label: str | None
    """None: not in the legend."""
    steps: Sequence[float | int]
    values: Sequence[float | int]
    colour: int = 0
    """Index into SERIES, from the start again after its end."""
    is_heldout: bool = False
    is_one_of_many: bool = False
    """Without the noise behind the running mean."""
    stroke: int = 0
    """Index into STROKES: of equal curves the earlier is seen through the later."""
    is_exact: bool = False
    """A schedule: drawn as it is, since a running mean would come late."""


def curves(
    title: str,
    lines: Sequence[Curve],
    *,
    level: float | None = None,
    legend: bool = True,
    is_rate: bool = False,
) -> str:
    """Values over steps. Long noisy series are drawn faintly, with a running mean on top."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.2, 2.4)
        axes.set_title(title)
        axes.set_xlabel("step")
        for line in lines:
            _draw_curve(axes, line, SERIES[line.colour % len(SERIES)], LARGEST_RATE if is_rate else LARGEST)
        if level is not None:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        if is_rate:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        if legend and sum(line.label is not None for line in lines) > 1:
            axes.legend(loc="best")
        return _svg(figure, f"{title} over steps")


def intervals(
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    level: float,
    colours: Sequence[int] | None = None,
) -> str:
    """Rates with their intervals, one row each; only the first in colour unless `colours` says which."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(5.2, 0.9 + 0.32 * len(rows))
        axes.set_title(title)
        for index, (_, numbers) in enumerate(rows):
            estimate, low, high = _drawable(numbers, LARGEST_RATE)
            colour = SERIES[0] if index == 0 else INK
            if colours is not None:
                colour = SERIES[colours[index] % len(SERIES)]
            axes.plot([low, high], [-index, -index], color=colour, linewidth=2)
            axes.plot([estimate], [-index], "o", color=colour, markersize=6)
        axes.axvline(level, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks([-index for index in range(len(rows))], [name for name, _ in rows])
        axes.set_ylim(-len(rows) + 0.5, 0.5)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure, title)


def against(
    title: str,
    label: str,
    points: Sequence[tuple[str, Sequence[float], Sequence[float], int]],
    *,
    level: float,
    is_rate: bool = False,
) -> str:
    """Estimates with intervals on both axes: of each its name, what is across, what is up, its colour."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.2, 2.4)
        axes.set_title(title)
        axes.set_xlabel(label)
        for _, across, up, index in points:
            x, left, right = _drawable(across)
            y, low, high = _drawable(up, LARGEST_RATE if is_rate else LARGEST)
            colour = SERIES[index % len(SERIES)]
            axes.plot([left, right], [y, y], color=colour, linewidth=1)
            axes.plot([x, x], [low, high], color=colour, linewidth=1)
            axes.plot([x], [y], "o", color=colour, markersize=_dot(index))
        if is_drawable(level):
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        if is_rate:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure, title)


def paths(title: str, label: str, lines: Sequence[tuple[Sequence[tuple[float, float]], int]]) -> str:
    """Points (across, up) joined in their order, the last of them marked; each line with its colour."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.2, 2.4)
        axes.set_title(title)
        axes.set_xlabel(label)
        for points, index in lines:
            across, up = map(_drawable, zip(*points, strict=True))
            colour = SERIES[index % len(SERIES)]
            axes.plot(across, up, color=colour, linewidth=1, linestyle=_dashes(index))
            axes.plot(across[-1:], up[-1:], "o", color=colour, markersize=_dot(index))
        return _svg(figure, title)


def histogram(title: str, values: Float[np.ndarray, " m"], label: str, *, counted: str) -> str:
    """How many of what is `counted` have a value; those below zero in the second colour."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.2, 2.4)
        axes.set_title(title)
        axes.set_xlabel(label)
        values = values[np.abs(values) <= LARGEST]
        low, high = np.quantile(values, [0.005, 0.995]) if len(values) else (0.0, 0.0)
        span = max(abs(low), abs(high), 1e-6)
        edges = np.linspace(-span, span, 41)  # zero is an edge
        counts, _ = np.histogram(np.clip(values, -span, span), edges)
        colours = [SERIES[1] if edge < -1e-12 * span else SERIES[0] for edge in edges[:-1]]
        axes.set_ylabel(counted)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours)
        return _svg(figure, title)


def reliability(title: str, bins: CalibrationFigures) -> str:
    """Part right against confidence; points as large as their share, the diagonal is calibrated."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.2, 2.4)
        axes.set_title(title)
        axes.set_xlabel("confidence in the order, σ(|δ|)")
        axes.set_ylabel("part right")
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":")
        sizes = 12 + 150 * np.nan_to_num(_drawable(bins["share"], 1.0)).clip(0)
        confidence, right = _drawable(bins["confidence"], 1.0), _drawable(bins["accuracy"], 1.0)
        axes.plot(confidence, right, color=SERIES[0], linewidth=1)
        axes.scatter(confidence, right, s=sizes, color=SERIES[0], clip_on=False)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(-0.03, 1.03)
        return _svg(figure, title)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_curve(axes: Axes, line: Curve, colour: str, most: float = LARGEST) -> None:
    steps, values = _drawable(line.steps), _drawable(line.values, most)
    shown = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[shown], values[shown]
    dashes = _dashes(line.stroke)
    if line.is_heldout:
        dashes = dashes if line.is_one_of_many else "--"
        dot, label = 2 / 3 * _dot(line.stroke), line.label or "_"
        axes.plot(
            steps, values, "o", color=colour, markersize=dot, linewidth=1, linestyle=dashes, label=label
        )
        return
    window = max(1, len(values) // 15)
    if window < 3 or line.is_exact:
        alone = "o" if len(values) == 1 else None  # a line of one point shows nothing
        axes.plot(
            steps,
            values,
            marker=alone,
            markersize=2 / 3 * _dot(line.stroke),
            color=colour,
            linewidth=1.4,
            linestyle=dashes,
            label=line.label,
        )
        return
    if not line.is_one_of_many:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    means = [values[max(0, end - window) : end].mean() for end in range(1, len(values) + 1)]
    axes.plot(steps, means, color=colour, linewidth=1.6, linestyle=dashes, label=line.label)


def _dashes(stroke: int) -> Any:
    return STROKES[stroke % len(STROKES)]


def _dot(stroke: int) -> float:
    return _DOTS[stroke % len(_DOTS)]


def _thin_ticks(figure: Figure) -> None:
    """As many numbers below an axis as stand beside one another; matplotlib counts on short ones."""
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    for axes in figure.axes:
        room = 72 * figure.get_size_inches()[0] * axes.get_position().width
        axis, locator = axes.xaxis, axes.xaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator), "none of the figures has another below"
        for most in range(9, 0, -1):
            locator.set_params(nbins=most)
            low, high = axis.get_view_interval()
            shown = [tick for tick in locator() if low <= tick <= high]
            labels = axis.get_major_formatter().format_ticks(shown)
            if len(labels) * (max(map(len, labels), default=0) + 1.5) * _CHARACTER <= room:
                break


_CHARACTER = 0.64 * 9
"""Width of a digit of the largest usual face at the ticks' size, in points."""


def _svg(figure: Figure, description: str) -> str:
    _thin_ticks(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    for colour, replacement in _COLOURS.items():
        body = body.replace(colour, replacement)
    width, height = 72 * figure.get_size_inches()
    return (
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">\n<title>{html.escape(description)}</title>{body}'
    )
