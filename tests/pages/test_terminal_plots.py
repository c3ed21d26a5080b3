"""Plots in text have the size asked for, and their dots are where the values are."""

from __future__ import annotations

import numpy as np
import pytest

from dpo.pages.terminal_plots import LABEL, Series, draw


def lines_of(ys, *, xs=None, width: int = 40, height: int = 10) -> list[str]:
    xs = range(len(ys)) if xs is None else xs
    return draw("title", [Series("one", xs, ys, "cyan")], width=width, height=height).plain.splitlines()


def dots_of(lines: list[str]) -> np.ndarray:
    """The picture as booleans, four rows and two columns a character."""
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    codes = np.array([[ord(letter) - 0x2800 for letter in line[LABEL:]] for line in lines[1:-1]])
    picture = (codes[:, :, None, None] & bits[None, None]) > 0
    return picture.transpose(0, 2, 1, 3).reshape(4 * codes.shape[0], 2 * codes.shape[1])


@pytest.mark.parametrize(("width", "height"), [(40, 10), (25, 5), (120, 20)])
def test_the_size_is_what_was_asked_for(width: int, height: int) -> None:
    lines = lines_of([1.0, 3.0, 2.0], width=width, height=height)
    assert len(lines) == height
    assert all(len(line) <= width for line in lines)
    assert all(len(line) == width for line in lines[1:-1])


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    dots = dots_of(lines_of(np.linspace(0, 5, 30)))
    rows, columns = np.nonzero(dots)
    assert columns[rows == dots.shape[0] - 1].min() == 0
    assert columns[rows == 0].max() == dots.shape[1] - 1
    assert dots.any(0).all(), "every column is crossed"
    by_column = [np.nonzero(column)[0].mean() for column in dots.T]
    assert (np.diff(by_column) <= 0).all()


def test_labels_are_the_extremes_and_the_ends() -> None:
    lines = lines_of([0.25, 0.75, 0.5], xs=[3, 4, 17])
    assert lines[1].split()[0] == "0.75"
    assert lines[-2].split()[0] == "0.25"
    assert lines[-1].split() == ["3", "17"]
    lines = lines_of([0.25, 0.75], xs=[0, 12345])
    assert lines[-1].split() == ["0", "12345"]


@pytest.mark.parametrize("ys", [[0.5], [0.5, 0.5, 0.5]])
def test_one_value_is_a_line_in_the_middle(ys: list[float]) -> None:
    rows = np.nonzero(dots_of(lines_of(ys)))[0]
    assert len(set(rows.tolist())) == 1


def test_what_is_zero_to_the_eye_is_zero() -> None:
    """A margin that starts at -2.04e-06 would not fit beside the plot, and says nothing."""
    text = draw("x", [Series("a", [0, 1], [-2.04e-6, 0.263], "")], width=40, height=6).plain
    assert "\n       0 " in text
    assert len({len(line) for line in text.splitlines()[1:-1]}) == 1
