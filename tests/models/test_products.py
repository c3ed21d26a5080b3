"""A rounded product is the product of rounded operands, in both passes or in the backward pass alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import TOKENS, batch_arrays, load_case

from dpo.models.linear import Linear, round_products
from dpo.models.products import rounded_product
from dpo.models.quantized import Int8Linear


def operands(*, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((33, 24), (24, 17), (33, 17))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def rounded(x):
    """As float64, so that the oracle's sums are exact."""
    return np.asarray(x.astype(jnp.bfloat16)).astype(np.float64)


@pytest.mark.parametrize("only_backward", [False, True])
def test_both_gradients_are_products_of_rounded_operands(only_backward):
    x, w, dy = operands()
    y, vjp = jax.vjp(lambda x, w: jnp.asarray(rounded_product(x, w, only_backward)), x, w)
    dx, dw = vjp(dy)
    if only_backward:
        assert_array_equal(y, x @ w)
    else:
        assert_allclose(y, rounded(x) @ rounded(w), rtol=1e-5, atol=1e-5)
    assert_allclose(dx, rounded(dy) @ rounded(w).T, rtol=1e-5, atol=1e-5)
    assert_allclose(dw, rounded(x).T @ rounded(dy), rtol=1e-5, atol=1e-5)
    assert {y.dtype, dx.dtype, dw.dtype} == {jnp.dtype("float32")}


def test_gradients_have_the_dtypes_of_what_they_are_for():
    """Bfloat16 activations keep float32 weights, whose gradient is not rounded."""
    x, _, dy = operands(dtype=jnp.bfloat16)
    _, w, _ = operands()
    dx, dw = jax.vjp(rounded_product, x, w)[1](dy.astype(jnp.float32))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_rounded_result_is_its_float32_sum_rounded_once():
    """Also the gradient for bfloat16 activations; a bfloat16 sum would lose most digits of 2,000 terms."""
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((8, 2000), (2000, 8))))
    x = x.astype(jnp.bfloat16)
    y, vjp = jax.vjp(lambda x: jnp.asarray(rounded_product(x, w, False, jnp.bfloat16)), x)
    assert_array_equal(y, jnp.asarray(rounded_product(x, w)).astype(jnp.bfloat16))
    dx = jnp.asarray(vjp(y)[0])
    assert_array_equal(
        dx, (y.astype(jnp.float32) @ w.astype(jnp.bfloat16).astype(jnp.float32).T).astype(dx.dtype)
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_write_no_float32_activations(platform):
    """Forward and for the gradient: of two layers in bfloat16 no product of activations is float32."""
    first, second = (Linear(32, 32, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(i)) for i in range(2))
    x = jnp.ones((48, 32), jnp.bfloat16)
    text = (
        jax.jit(jax.value_and_grad(lambda x: second(first(x)).astype(jnp.float32).sum()))
        .trace(x)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    results = re.findall(r"stablehlo\.dot_general.*-> tensor<(48x32x\w+)>", text)
    assert len(results) == 4
    assert set(results) == {"48x32xbf16"}


@pytest.mark.parametrize("hold", [lambda linear: linear, Int8Linear])
def test_linears_round_as_they_are_told(hold):
    x = operands()[0]
    linear = Linear(24, 10, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0))
    exact = hold(linear)(x)
    values = {}
    for rounds in ("backward", "both"):
        round_products(linear, rounds)
        values[rounds] = hold(linear)(x)
    assert_allclose(values["backward"], exact, rtol=1e-6, atol=1e-6)
    error = np.abs(values["both"] - exact)
    assert 0 < error.max() < 2**-6


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def gradient_of_a_model(tmp_path, rounds, remat="full"):
    model = load_case(tmp_path, "llama", remat=remat)
    round_products(model, rounds)
    graphdef, params = nnx.split(model)

    def total(params):
        hidden = nnx.merge(graphdef, params).hidden(*batch_arrays(TOKENS))
        return jnp.sum(jnp.sin(hidden)), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return hidden, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


@pytest.mark.ci
def test_a_model_that_rounds_in_the_backward_pass_has_the_same_values(tmp_path):
    hidden, exact = gradient_of_a_model(tmp_path, "neither")
    same, close = gradient_of_a_model(tmp_path, "backward")
    other, also_close = gradient_of_a_model(tmp_path, "both")
    assert_allclose(same, hidden, rtol=1e-6, atol=1e-6)
    assert 1e-4 < distance(other, hidden) < 3e-2
    assert 1e-4 < distance(close, exact) < 2e-2
    assert 1e-4 < distance(also_close, exact) < 0.1


def test_what_is_kept_for_the_backward_pass_changes_no_gradient(tmp_path):
    _, full = gradient_of_a_model(tmp_path, "both")
    _, dots = gradient_of_a_model(tmp_path, "both", remat="dots")
    assert_allclose(dots, full, rtol=1e-5, atol=1e-5)
