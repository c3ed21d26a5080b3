import math
import re
from pathlib import Path

import numpy as np
import pytest

from dpo.training.watchdog import (
    RECENT,
    REPEAT,
    START,
    History,
    Watch,
    chosen_collapse,
    length_drift,
    loss_spike,
    loss_stuck,
    watchdogs,
    zero_gradient,
)

BETA = 0.1
GUIDE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def healthy(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """What a run that learns looks like: a loss that falls from ln 2, with the noise of small batches."""
    generator = np.random.default_rng(seed)
    lines = []
    for step in range(steps):
        margin = 2.0 * (1 - math.exp(-(step + 1) / 100))
        noise = generator.normal()
        lines.append(
            {
                "loss": math.log1p(math.exp(-margin - 0.5 * noise)),
                "grad_norm": 3.0 + noise,
                "rewards/margins": margin + 0.5 * noise,
                "rewards/chosen": -BETA * 0.2 * 50,
                "lengths/chosen": 50 + 10 * generator.normal(),
                "lengths/rejected": 60 + 10 * generator.normal(),
                "skipped": 0.0,
            }
        )
    return lines


def history(lines: list[dict[str, float]]) -> History:
    return History(lines[:START], lines[-RECENT:])


def changed(lines, **values):
    """The same lines, with some metrics replaced in all of them."""
    return [line | {name.replace("__", "/"): value for name, value in values.items()} for line in lines]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_gives_no_warning(seed):
    watch = Watch(BETA)
    assert [w for step, line in enumerate(healthy(1000, seed)) for w in watch.add(step, line)] == []


def test_a_spike_stands_out_from_the_spread_of_the_steps_before():
    lines = healthy(60)
    assert str(loss_spike(history([*lines, lines[-1] | {"loss": 8.0}]))).startswith(
        "the loss jumped to 8, from"
    )
    assert loss_spike(history([*lines, lines[-1] | {"loss": 0.9}])) is None
    assert loss_spike(history([*lines[:10], lines[-1] | {"loss": 8.0}])) is None  # too little to compare with


@pytest.mark.parametrize(("usual", "least"), [(0.1, math.log(2)), (3.0, 3.0)])
def test_a_spike_is_as_far_away_as_the_median_or_ln_2_whichever_is_larger(usual, least):
    """As docs/troubleshooting.md says; without any spread nothing else is asked."""
    lines = [line | {"loss": usual} for line in healthy(60)]
    assert loss_spike(history([*lines, lines[-1] | {"loss": usual + 0.99 * least}])) is None
    assert loss_spike(history([*lines, lines[-1] | {"loss": usual + 1.01 * least}])) is not None


def test_a_loss_that_stays_at_ln_2_is_stuck():
    stuck = changed(healthy(RECENT), loss=math.log(2), rewards__margins=0.001)
    assert "0.6931" in str(loss_stuck(history(stuck)))
    assert loss_stuck(history(stuck[:-1])) is None  # too early to say
    assert loss_stuck(history(changed(stuck, rewards__margins=0.1))) is None
    assert loss_stuck(history(healthy(RECENT))) is None


def test_gradients_of_zero_are_told_after_a_few_steps():
    lines = healthy(5)
    assert zero_gradient(history(changed(lines, grad_norm=0.0))) is not None
    assert zero_gradient(history([*lines, *changed(lines[:2], grad_norm=0.0)])) is None


def test_chosen_responses_collapse_when_they_lose_a_nat_a_token():
    lines = changed(healthy(20), lengths__chosen=40.0)
    watch = chosen_collapse(BETA)
    assert "1.50 nats a token" in str(watch(history(changed(lines, rewards__chosen=-BETA * 1.5 * 40))))
    assert watch(history(changed(lines, rewards__chosen=-BETA * 0.9 * 40))) is None


def test_lengths_that_differ_from_the_start_drift():
    lines = healthy(300)
    later = [line | {"lengths/chosen": 120.0} for line in lines[200:]]
    assert str(length_drift(history([*lines[:200], *later]))).startswith(
        "chosen and rejected responses have 18"
    )
    assert length_drift(history(lines)) is None


def test_a_warning_is_repeated_only_after_many_steps():
    watch = Watch(BETA)
    line = healthy(1)[0] | {"grad_norm": 0.0}
    steps = [step for step in range(REPEAT + 10) for w in watch.add(step, line) if "zero-gradient" in w]
    assert steps == [2, 2 + REPEAT]


def test_a_resumed_run_knows_the_steps_before():
    lines = changed(healthy(RECENT), loss=math.log(2), rewards__margins=0.0)
    watch = Watch(BETA, earlier=lines[:-1])
    assert any("loss-stuck" in warning for warning in watch.add(RECENT - 1, lines[-1]))


def test_skipped_steps_are_left_out():
    nothing = {"loss": math.nan, "skipped": 1.0}
    assert Watch(BETA, earlier=[nothing] * 30).add(30, nothing) == []


def test_lines_of_labelled_responses_have_no_pairs_and_sometimes_no_chosen_one():
    lines = [
        {n: v for n, v in line.items() if "margins" not in n and (i % 3 or "chosen" not in n)}
        for i, line in enumerate(healthy(300))
    ]
    watch = Watch(BETA)
    assert [w for step, line in enumerate(lines) for w in watch.add(step, line)] == []


def test_every_warning_has_its_section_in_the_guide():
    sections = set(re.findall(r'<a id="([^"]+)">', GUIDE.read_text()))
    assert set(watchdogs(BETA)) <= sections
