"""The one-parameter toy of docs/diffusion.md: what the per-time loss recovers, with and without sharing."""

from __future__ import annotations

from typing import Any

import pytest
from numpy.testing import assert_allclose

from dpo.diffusion.mixture import exact_reverse_variance
from dpo.diffusion.preference import score_weights
from dpo.diffusion.schedule import cosine, elbo_weights, linear
from dpo.diffusion.shared_noise import recovered_share, summed_share

TOY: Any = {"variance": 0.25, "slope": 2.0, "beta": 1.0}


def test_the_summed_elbo_recovers_all_with_the_exact_reverse_variance() -> None:
    for schedule in (linear(50), cosine(50)):
        weights = 50 * elbo_weights(schedule, exact_reverse_variance(schedule, 0.25))
        assert_allclose(summed_share(schedule, 0.25, weights), 1.0, atol=5e-4)  # x_T's law is not counted


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_summed_elbos_bias_vanishes_as_one_over_t(variance) -> None:
    bias = [
        summed_share(linear(T), 0.25, score_weights(linear(T), "elbo", variance=variance)) - 1
        for T in (500, 1000)
    ]
    assert 0.45 < bias[1] / bias[0] < 0.55
    assert abs(bias[1]) < 0.02


def test_every_time_inside_is_the_summed_elbo() -> None:
    schedule = linear(20)
    weights = score_weights(schedule, "elbo")
    found = recovered_share(
        schedule, weights=weights, sharing="time_and_noise", num_times=20, num_pairs=2000, **TOY
    )
    assert_allclose(found.share, summed_share(schedule, 0.25, weights), rtol=1e-6)


def test_sharing_the_noise_is_worth_several_times_the_shift() -> None:
    """One (t, ε) a preference, T = 100: 0.42 of the shift with time and noise shared, 0.07 with less."""
    schedule = linear(100)
    weights = score_weights(schedule, "elbo", variance="beta")
    found = {
        sharing: recovered_share(schedule, weights=weights, sharing=sharing, num_pairs=20_000, **TOY)
        for sharing in ("time_and_noise", "time", "nothing")
    }
    for sharing, expected in (("time_and_noise", 0.42), ("time", 0.07), ("nothing", 0.07)):
        assert abs(found[sharing].share - expected) < 4 * found[sharing].error + 0.005
