"""docs/objectives.md says what the code says."""

import numpy as np
import pytest

from docs.make_objectives import DOCS, curve, described, markdown
from dpo.losses import OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_docstring_has_all_fields(name):
    summary, fields = described(OBJECTIVES[name])
    assert summary
    assert all(fields.values())


def test_the_page_is_up_to_date():
    """Otherwise run `python -m docs.make_objectives`."""
    assert (DOCS / "objectives.md").read_text() == markdown()


def test_the_figure_shows_every_pairwise_objective():
    figure = (DOCS / "objectives.svg").read_text()
    page = (DOCS / "objectives.md").read_text()
    assert "(objectives.svg)" in page
    pairwise = page.split("## Pairwise")[1].split("## Listwise")[0]
    names = [line.removeprefix("### ") for line in pairwise.splitlines() if line.startswith("### ")]
    assert all(f">{name}</text>" in figure for name in names if name != "sft")


def test_the_curve_of_dpo_is_its_formula():
    deltas, losses, weights = curve("dpo")
    np.testing.assert_allclose(losses, np.log1p(np.exp(-deltas)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(deltas)), rtol=1e-4, atol=1e-5)
