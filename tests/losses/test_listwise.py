"""LiPO-λ where rewards are tied, against an enumeration of the orders."""

from itertools import pairwise, permutations

import jax
import numpy as np
import pytest
from score_cases import evaluate, of_log_ratio

from dpo.losses import make_objective

BETA = 0.05


def enumerated(log_ratio, ranks):
    """The paper's loss, the mean over all orders of responses whose log-ratios are equal."""
    K = len(log_ratio)
    gain = np.exp2([(np.asarray(ranks) > rank).sum() / (K - 1) for rank in ranks])
    orders = [
        order
        for order in permutations(range(K))
        if all(log_ratio[a] >= log_ratio[b] for a, b in pairwise(order))
    ]
    change = np.zeros((K, K))
    for order in orders:
        discount = 1 / np.log(1 + np.argsort(order) + 1.0)
        change += np.abs(discount[:, None] - discount[None]) / len(orders)
    return sum(
        abs(gain[i] - gain[j]) * change[i, j] * np.log1p(np.exp(BETA * (log_ratio[j] - log_ratio[i])))
        for i in range(K)
        for j in range(K)
        if ranks[i] < ranks[j]
    )


@pytest.mark.parametrize(
    ("log_ratio", "ranks"),
    [
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
        ([0.0, 1.5, 0.0, 0.0], [0, 1, 1, 3]),
        ([2.0, -1.0, 2.0, -1.0], [0, 1, 2, 3]),
        ([-3.0, 2.0, 0.5, 1.0], [0, 1, 2, 2]),
        ([1.5, -0.5], [0, 1]),
        ([1.0, 1.0], [0, 1]),
    ],
)
def test_places_of_tied_rewards_are_the_mean_over_their_orders(log_ratio, ranks):
    scores = of_log_ratio(np.asarray([log_ratio], np.float32), ranks=np.asarray([ranks]))
    expected = enumerated(log_ratio, ranks)
    np.testing.assert_allclose(evaluate({"name": "lipo_lambda"}, scores)[0], [expected], rtol=1e-5)
    rounding = np.asarray([[2e-4, -1e-4, 0.0, 1e-4]], np.float32)[:, : len(ranks)]
    rounded = scores._replace(policy=scores.policy + rounding)
    np.testing.assert_allclose(evaluate({"name": "lipo_lambda"}, rounded)[0], [expected], rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "of_place"), [("exponential", [3, 1, 0]), ("dcg", [1, 1 / np.log2(3), 0.5])]
)
def test_listmle_weighs_the_stages_of_the_responses_that_are_present(weights, of_place):
    """Three of four are: 2^(n − k) − 1 for k = 1, 2, 3 is 3, 1, 0; 1/log2(1 + k) is 1, 0.63, 0.5."""
    log_ratio = np.asarray([[1.0, -2.0, 0.5, 9.0]], np.float32)
    scores = of_log_ratio(log_ratio, present=np.asarray([[True, True, True, False]]))
    rewards = 0.1 * log_ratio[0, :3]
    stages = [rewards[k] - np.log(np.exp(rewards[k:]).sum()) for k in range(3)]
    expected = -np.dot(of_place, stages)
    np.testing.assert_allclose(
        evaluate({"name": "listmle", "weights": weights}, scores)[0], [expected], rtol=1e-5
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lambda_weights_are_of_float32_on_every_platform(platform):
    """Their only matrix product: a TPU would round it to bfloat16 by default, a GPU to TF32."""
    scores = of_log_ratio(np.ones((2, 3), np.float32))
    weigh = jax.jit(lambda policy: make_objective({"name": "lipo_lambda"})(scores._replace(policy=policy)))
    text = weigh.trace(scores.policy).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
