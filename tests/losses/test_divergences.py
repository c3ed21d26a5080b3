"""f′ of every divergence against its formula, shifted to 0 at 1.

Wang et al. 2023, arXiv:2309.16240, table 1.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from score_cases import make_scores

from dpo.losses.divergences import LARGEST_EXPONENT, reward_of_ratio, with_divergence

RATIO = np.array([0.02, 0.5, 0.9, 1.0, 1.3, 4.0, 60.0])
FORMULAS = {
    "reverse_kl": np.log,
    "forward_kl": lambda u: 1 - 1 / u,
    "jensen_shannon": lambda u: np.log(2 * u / (1 + u)),
    0.0: lambda u: 1 - 1 / u,
    0.3: lambda u: (u**-0.7 - 1) / -0.7,
    0.5: lambda u: 2 * (1 - u**-0.5),
    1.0: np.log,
}


@pytest.mark.parametrize("divergence", FORMULAS)
def test_the_implicit_reward_is_the_derivative_at_the_ratio(divergence):
    found = reward_of_ratio(jnp.log(jnp.asarray(RATIO, jnp.float32)), divergence)
    assert_allclose(found, FORMULAS[divergence](RATIO), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", 0.5])
def test_a_ratio_of_nearly_nothing_stays_finite(divergence):
    alpha = 0.0 if divergence == "forward_kl" else divergence
    far = LARGEST_EXPONENT / (1 - alpha)
    found = reward_of_ratio(jnp.asarray([-far - 50, -far]), divergence)
    assert_allclose(found, np.expm1(LARGEST_EXPONENT) / (alpha - 1), rtol=1e-5)


def test_scores_get_it_as_their_log_ratio():
    given = make_scores(policy=[[-1.0, -2.0]], reference=[[-1.5, -1.0]])
    assert_allclose(with_divergence(given, "forward_kl").log_ratio, 1 - np.exp([[-0.5, 1.0]]), rtol=1e-6)
