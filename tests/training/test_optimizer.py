from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from dpo.config import OptimizerConfig
from dpo.training.optimizer import learning_rates, make_optimizer, make_schedule


def rates(num_steps, **settings):
    return learning_rates(make_schedule(OptimizerConfig(learning_rate=1.0, **settings), num_steps), num_steps)


def test_warmup_rises_linearly_from_zero_to_the_peak():
    assert_allclose(rates(20, warmup_fraction=0.2, schedule="constant")[:6], [0, 0.25, 0.5, 0.75, 1, 1])


def test_linear_decay_is_a_line_to_zero():
    assert_allclose(rates(10, warmup_fraction=0.0, schedule="linear"), 1 - np.arange(10) / 10, rtol=1e-6)


def test_cosine_decay_is_half_a_cosine():
    expected = (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    got = rates(10, warmup_fraction=0.0, schedule="cosine")
    assert_allclose(got, expected, rtol=1e-6, atol=1e-7)  # 1 + cos loses digits near its zero


def test_without_warmup_the_first_update_uses_the_peak():
    assert rates(3, warmup_fraction=0.0, schedule="constant")[0] == 1.0


def test_first_adamw_update_is_the_formula():
    """m̂ = g and v̂ = g² at the first step, so the update is −lr (g / (|g| + ε) + λ w)."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, epsilon=1e-3, max_grad_norm=None)
    params = {"kernel": jnp.array([[2.0, -1.0]]), "norm": jnp.array([3.0])}
    gradient = {"kernel": jnp.array([[0.3, 0.0]]), "norm": jnp.array([-0.2])}
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    updates: Any
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert_allclose(updates["kernel"], [[-0.1 * (0.3 / 0.301 + 1.0), 0.1 * 0.5]], rtol=1e-5)
    assert_allclose(updates["norm"], [0.1 * 0.2 / 0.201], rtol=1e-5)


@pytest.mark.parametrize("name", ["input_layernorm", "bias", "final_norm"])
def test_weight_decay_leaves_norms_and_biases(name):
    config = OptimizerConfig(weight_decay=1.0)
    params = {"layers": {name: jnp.ones((4, 3))}}
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    updates: Any
    updates, _ = optimizer.update({"layers": {name: jnp.zeros((4, 3))}}, optimizer.init(params), params)
    assert_allclose(updates["layers"][name], 0)


def test_clipping_bounds_the_global_norm_that_adam_sees():
    config = OptimizerConfig(max_grad_norm=1.0, beta1=0.0, beta2=0.0, epsilon=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    optimizer = make_optimizer(config, optax.constant_schedule(1.0))
    updates: Any
    updates, _ = optimizer.update(
        {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, optimizer.init(params), params
    )
    assert_allclose([updates["a"][0], updates["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-6)


def test_the_first_moment_may_be_kept_in_half_the_bytes():
    """Only the running mean of gradients: a bfloat16 mean of squares would stop growing within 256 steps."""
    params = {"kernel": jnp.linspace(-1, 1, 64).reshape(8, 8)}
    updates: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(first_moment=dtype, max_grad_norm=None)
        optimizer = make_optimizer(config, optax.constant_schedule(0.1))
        state = optimizer.init(params)
        for step in range(1, 4):
            gradient = {"kernel": jnp.sin(step * params["kernel"]) + 2}
            updates[dtype], state = optimizer.update(gradient, state, params)
        assert optax.tree.get(state, "mu")["kernel"].dtype == dtype
        assert optax.tree.get(state, "nu")["kernel"].dtype == "float32"
    assert_allclose(updates["bfloat16"]["kernel"], updates["float32"]["kernel"], rtol=1e-2)
