"""Numbers that no axis holds are left out of figures: no library says so, and nothing fails."""

import warnings
from typing import Any

import numpy as np
import pytest

from dpo.config import Config
from dpo.pages import plots
from dpo.pages.curves import draw_run, points
from dpo.pages.plots import Curve
from dpo.pages.watch import picture

ABSURD = (1e308, -1e308, 5e-324, -1e101, 1e99, float("inf"), float("nan"), 0.5)


@pytest.fixture(autouse=True)
def no_library_says_anything():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("is_rate", [False, True])
@pytest.mark.parametrize("steps", [(0, 2**53), (-5, 10**400), (1, 1)])
def test_curves_of_absurd_numbers(steps, is_rate):
    for values in (ABSURD[:2], (1e99, -1e99), (5e-324, 0.5)):
        assert "<path" in plots.curves("Loss", [Curve("a", steps, values)], level=0.0, is_rate=is_rate)


def test_other_figures_of_absurd_numbers():
    numbers = [ABSURD[at : at + 3] for at in range(6)]
    assert plots.intervals("Rates", [(f"row {at}", three) for at, three in enumerate(numbers)], level=0.5)
    found = [("run", three, three[::-1], at) for at, three in enumerate(numbers)]
    for level, is_rate in ((0.5, True), (1e308, False)):
        assert plots.against("Rates", "KL", found, level=level, is_rate=is_rate)
    assert plots.paths("Reward", "KL", [(list(zip(ABSURD, ABSURD[::-1], strict=True)), 0)])
    for values in (ABSURD, ABSURD[:2]):
        assert plots.histogram("Margins", np.array(values), "margin", counted="pairs")
    bins: Any = {name: list(ABSURD) for name in ("confidence", "accuracy", "share")}
    assert plots.reliability("Calibration", bins)


def test_a_run_of_absurd_metrics_is_drawn_and_watched(tmp_path):
    lines = [
        f'{{"step": {step}, "loss": {loss}, "rewards/accuracies": {loss}}}\n'
        for step, loss in ((9007199254740000, 1e308), (-5, 1e-320), (7, 0.5))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert picture(tmp_path, Config(), "stopped", 80)
    rows = [
        {"step": step, "loss": loss} for step, loss in ((9007199254740000, 1e308), (-5, 0.5), (10**400, 1.0))
    ]
    assert points(rows, "loss") == [(-5, 0.5)]
    assert len(draw_run(rows)) == 1
