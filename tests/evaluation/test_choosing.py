"""The choice among runs: halves by prompt, the paired difference, and the winner's curse."""

import numpy as np
import pytest

from dpo.data.preferences import Preference
from dpo.evaluation.choosing import choose
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.rows import Rows


def heldout(gaps: np.ndarray, *, names: list[str] | None = None) -> Heldout:
    """One pair a prompt; the policy prefers the better response by `gaps`."""
    names = names or [f"prompt {i}" for i in range(len(gaps))]
    n = len(gaps)
    preferences = [
        Preference(name, ("a", "b"), (0, 1), None, "s", f"f:{i + 1}") for i, name in enumerate(names)
    ]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    rows = Rows(
        policy=np.stack([gaps, np.zeros(n)], 1).astype(np.float64),
        reference=np.zeros((n, 2)),
        lengths=np.ones((n, 2), np.int64),
        present=np.ones((n, 2), bool),
        ranks=np.tile([0, 1], (n, 1)),
        prompts=np.array([number[name] for name in names]),
        sources=np.array(["s"] * n),
    )
    return Heldout(rows, preferences, {})


def test_a_better_policy_is_chosen_and_told_from_a_worse_one():
    right, wrong = np.ones(200), -np.ones(200)
    choice = choose({"worse": heldout(wrong), "better": heldout(right)})
    assert choice.chosen.name == "better"
    assert choice.prompts == (100, 100)
    assert choice.judged[1].behind == pytest.approx((1.0, 1.0, 1.0))
    assert choice.not_told_apart == []


def test_the_stated_figure_has_no_part_in_the_choice():
    """Of policies that all guess, the best is above ½ where it was chosen and at ½ on the other half."""
    draw = np.random.default_rng(0)
    policies = {str(i): heldout(draw.choice([-1.0, 1.0], 400)) for i in range(40)}
    choice = choose(policies)
    assert choice.chosen.choosing.estimate > 0.55
    assert abs(choice.chosen.stated.estimate - 0.5) < 0.1
    assert len(choice.not_told_apart) > 5


def test_rows_of_one_prompt_are_in_one_half_wherever_they_stand():
    names = [f"prompt {i % 10}" for i in range(40)]
    draw = np.random.default_rng(1)
    gaps = draw.normal(size=40)
    order = draw.permutation(40)
    # every row another response, so that no row is a copy
    one, other = heldout(gaps, names=names), heldout(gaps[order], names=[names[i] for i in order])
    for it, places in ((one, range(40)), (other, order)):
        it.preferences[:] = [
            p._replace(responses=(f"a{i}", "b")) for p, i in zip(it.preferences, places, strict=True)
        ]
    choice = choose({"one": one, "other": other})
    assert choice.prompts == (5, 5)
    assert choice.judged[0][1:3] == choice.judged[1][1:3]
    assert choice.judged[1].behind == pytest.approx((0, 0, 0))


def test_only_prompts_that_all_have_are_compared():
    names = [f"prompt {i}" for i in range(20)]
    whole, part = heldout(np.ones(20), names=names), heldout(np.ones(12), names=names[:12])
    assert choose({"whole": whole, "part": part}).prompts == (6, 6)


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="3 held-out prompts are common to all runs; allowed"):
        choose({"one": heldout(np.ones(3))})
