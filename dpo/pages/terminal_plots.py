"""Line plots in text: every character is 2 x 4 braille dots.

loss                       title
 0.70 ⠉⠒⠤⣀                 largest value
          ⠑⠒⠤⣀
 0.41         ⠉⠒⠒          smallest value
      0         40         first and last x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.text import Text

LABEL = 9
"""Characters left of the plot, for the largest and the smallest value."""
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""
_BLANK = 0x2800


class Series(NamedTuple):
    """One line; without a label it is not in the legend."""

    label: str
    xs: Sequence[float | int]
    ys: Sequence[float | int]
    style: str


def draw(title: str, series: Sequence[Series], *, width: int, height: int) -> Text:
    """A plot of `width` characters and `height` lines, title and x axis included; later series are on top."""
    columns, lines = max(width - LABEL, 4), max(height - 2, 1)
    xs = np.concatenate([np.asarray(one.xs, float) for one in series])
    ys = np.concatenate([np.asarray(one.ys, float) for one in series])
    left, right, low, high = xs.min(), xs.max(), ys.min(), ys.max()
    dots = np.zeros((lines, columns), int)
    styles = np.full((lines, columns), "", object)
    for one in series:
        x = _scale(np.asarray(one.xs, float), left, right, 2 * columns - 1)
        y = 4 * lines - 1 - _scale(np.asarray(one.ys, float), low, high, 4 * lines - 1)
        for column, row in _connect(x, y):
            dots[row // 4, column // 2] |= _DOTS[row % 4][column % 2]
            styles[row // 4, column // 2] = one.style
    text = Text(no_wrap=True)
    text.append(title, "bold")
    for one in series if len(series) > 1 else ():
        if not one.label:
            continue
        text.append(f"  {one.label}", one.style)
    for line in range(lines):
        value = high if line == 0 else low if line == lines - 1 and low < high else None
        label = "" if value is None else _number(value, high - low)
        text.append(f"\n{label:>{LABEL - 1}} ", "dim")
        for code, style in zip(dots[line], styles[line], strict=True):
            text.append(chr(_BLANK + int(code)), style)
    end = f"{right:g}"
    text.append(f"\n{'':{LABEL}}{left:<{max(columns - len(end), 1)}g}{end}", "dim")
    return text


def _scale(values: np.ndarray, low: float, high: float, last: int) -> np.ndarray:
    """Whole numbers from 0 to `last`; the middle where all values are the same."""
    if high <= low:
        return np.full(len(values), last // 2)
    return np.rint((values - low) / (high - low) * last).astype(int)


def _connect(x: np.ndarray, y: np.ndarray) -> list[tuple[int, int]]:
    """All dots on straight lines from each point to the next."""
    found = [(int(x[0]), int(y[0]))]
    for i in range(1, len(x)):
        count = int(max(abs(x[i] - x[i - 1]), abs(y[i] - y[i - 1]), 1))
        columns = np.rint(np.linspace(x[i - 1], x[i], count + 1)).astype(int)
        rows = np.rint(np.linspace(y[i - 1], y[i], count + 1)).astype(int)
        found += list(zip(columns.tolist(), rows.tolist(), strict=True))
    return found


def _number(value: float, span: float) -> str:
    """Three digits in at most LABEL − 1 characters; what the plot could not tell from zero is zero."""
    return f"{0.0 if abs(value) < 1e-3 * span else value:.3g}"
