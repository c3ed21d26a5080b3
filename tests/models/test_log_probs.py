"""Chunked log-probs equal the naive ones in value and gradient, and never hold tokens x vocabulary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo.losses.sums import log_collision
from dpo.models.log_probs import reduce_logits, token_log_probs

R, N, D, V = 3, 7, 16, 50


def _inputs(rows=(), dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (*rows, N, D)).astype(dtype)
    embedding = jax.random.normal(keys[1], (V, D)).astype(dtype)
    bias = jax.random.normal(keys[2], (V,))
    target = jax.random.randint(keys[3], (*rows, N), 0, V)
    return hidden, embedding, bias, target


def _naive_logits(hidden, embedding, bias=None, softcap=None):
    logits = jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + jnp.expand_dims(bias, range(logits.ndim - 1))
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _naive(hidden, embedding, target, **options):
    log_probs = jax.nn.log_softmax(_naive_logits(hidden, embedding, **options), axis=-1)
    return jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("rows", [(), (R,)], ids=["flat", "rows"])
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (5.0, True)])
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("chunk", [6, 100])
def test_values_and_gradients_are_the_naive_ones(rows, softcap, with_bias, keep_logits, chunk):
    hidden, embedding, bias, target = _inputs(rows)
    weight = jnp.linspace(-1.0, 2.0, target.size).reshape(target.shape)

    def weighted(function, hidden, embedding, bias, **options):
        options["bias"] = bias if with_bias else None
        return jnp.sum(weight * function(hidden, embedding, target, softcap=softcap, **options))

    ours = jax.value_and_grad(
        lambda *a: weighted(token_log_probs, *a, chunk=chunk, keep_logits=keep_logits), (0, 1, 2)
    )
    naive = jax.value_and_grad(lambda *a: weighted(_naive, *a), (0, 1, 2))
    for got, expected in zip(
        jax.tree.leaves(ours(hidden, embedding, bias)),
        jax.tree.leaves(naive(hidden, embedding, bias)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_bfloat16_inputs_give_float32_log_probs_and_bfloat16_gradients():
    hidden, embedding, _, target = _inputs(dtype=jnp.bfloat16)
    log_probs = token_log_probs(hidden, embedding, target, chunk=4)
    np.testing.assert_allclose(log_probs, _naive(hidden, embedding, target), rtol=1e-5, atol=1e-5)

    got = jax.grad(lambda h, e: token_log_probs(h, e, target, chunk=4).sum(), (0, 1))(hidden, embedding)
    wide = hidden.astype(jnp.float32), embedding.astype(jnp.float32)
    expected = jax.grad(lambda h, e: _naive(h, e, target).sum(), (0, 1))(*wide)
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        # One rounding of the slopes and one of the result: 2^-8 of the largest terms of the sum.
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0.02, atol=0.06)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_bfloat16_is_multiplied_with_bfloat16_and_summed_in_float32(keep_logits):
    """With float32 weights, in the program for a GPU: the matrix is rounded once, not in every chunk."""
    hidden, embedding, _, target = _inputs(dtype=jnp.bfloat16)

    def loss(hidden, embedding):
        return token_log_probs(hidden, embedding, target, chunk=2, keep_logits=keep_logits).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(hidden, embedding.astype(jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(
        r"dot_general.*: \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\) -> tensor<\w*x(\w+)>", text
    )
    assert len(products) == (3 if keep_logits else 4)  # logits, made again or kept, and two gradients
    assert set(products) == {("bf16", "bf16", "f32")}
    assert len(re.findall(rf"convert %\w+ : \(tensor<{V}x{D}xf32>\) -> tensor<{V}x{D}xbf16>", text)) <= 2
    transcendental = re.findall(r"stablehlo\.(?:exponential|log) .*x(\w+)>", text)
    assert transcendental
    assert set(transcendental) == {"f32"}


def test_rounding_the_matrix_is_noise_like_that_of_the_hidden_states():
    """Against float64, by spread: two rounded operands instead of one make at most twice the error."""
    keys = jax.random.split(jax.random.key(3), 3)
    hidden, embedding = (np.asarray(jax.random.normal(key, (512, 64)), np.float64) for key in keys[:2])
    target = jax.random.randint(keys[2], (512,), 0, 512)
    logits = hidden @ embedding.T
    top = logits.max(-1)
    normaliser = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    exact = logits[np.arange(512), target] - normaliser

    def spread(hidden, embedding):
        return np.std(np.asarray(token_log_probs(hidden, embedding, target, chunk=128)) - exact)

    exactly, rounded = jnp.asarray(hidden, jnp.float32), jnp.asarray(hidden, jnp.bfloat16)
    matrix = jnp.asarray(embedding, jnp.float32)
    of_hidden = spread(rounded.astype(jnp.float32), matrix)
    assert spread(exactly, matrix) < of_hidden / 100
    assert of_hidden < spread(rounded, matrix) < 2 * of_hidden


@pytest.mark.parametrize("chunk", [4, 100])
def test_rounding_the_backward_pass_changes_gradients_by_roundings_and_no_value(chunk):
    hidden, embedding, bias, target = _inputs()

    def of(rounds_backward):
        def total(*arrays):
            hidden, embedding, bias = arrays
            options = {"chunk": chunk, "bias": bias, "rounds_backward": rounds_backward}
            return jnp.sum(token_log_probs(hidden, embedding, target, **options))

        return jax.value_and_grad(total, (0, 1, 2))(hidden, embedding, bias)

    (value, gradient), (exact_value, exact) = of(True), of(False)
    assert value == exact_value
    for ours, theirs in zip(gradient, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=2**-7 * np.abs(theirs).max())
    assert any((ours != theirs).any() for ours, theirs in zip(gradient, exact, strict=True))


@pytest.mark.parametrize("keep_logits", [False, True])
def test_only_a_chunk_of_logits_is_held(keep_logits):
    """Temporary memory grows by a few hidden states a token when logits are dropped, by V when kept."""
    vocabulary, chunk = 4096, 64

    def temporary_bytes(tokens):
        hidden = jax.ShapeDtypeStruct((tokens, D), jnp.float32)
        embedding = jax.ShapeDtypeStruct((vocabulary, D), jnp.float32)
        target = jax.ShapeDtypeStruct((tokens,), jnp.int32)

        def loss(hidden, embedding, target):
            return token_log_probs(hidden, embedding, target, chunk=chunk, keep_logits=keep_logits).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, embedding, target)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    growth = (temporary_bytes(16 * chunk) - temporary_bytes(4 * chunk)) / (12 * chunk)
    assert growth >= 4 * vocabulary if keep_logits else growth < 4 * 8 * D


@pytest.mark.parametrize("rows", [(), (R,)], ids=["flat", "rows"])
def test_statistics_are_the_formulas(rows):
    hidden, embedding, bias, _ = _inputs(rows)
    options = {"softcap": 5.0, "bias": bias}
    p = jax.nn.softmax(_naive_logits(hidden, embedding, **options), axis=-1)
    collision = reduce_logits(log_collision, hidden, embedding, chunk=5, **options)
    np.testing.assert_allclose(collision, jnp.log(jnp.sum(p**2, axis=-1)), rtol=1e-5)


def test_statistics_carry_no_gradient():
    hidden, embedding, _, _ = _inputs()
    gradient = jax.grad(lambda h: reduce_logits(log_collision, h, embedding, chunk=5).sum())(hidden)
    assert not gradient.any()


def test_rows_split_over_devices_give_the_same():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    hidden, embedding, _, target = _inputs((8,))
    split = jax.device_put((hidden, target), jax.NamedSharding(mesh, jax.P("data")))

    @jax.jit
    def gradient(hidden, embedding, target):
        return jax.value_and_grad(lambda h, e: token_log_probs(h, e, target, chunk=16).sum(), (0, 1))(
            hidden, embedding
        )

    for ours, expected in zip(
        jax.tree.leaves(gradient(split[0], embedding, split[1])),
        jax.tree.leaves(gradient(hidden, embedding, target)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite():
    hidden, embedding, _, target = _inputs()
    value, gradient = jax.value_and_grad(lambda h: token_log_probs(h, embedding, target, chunk=4).sum())(
        1e4 * hidden
    )
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_logits_are_kept_where_one_chunk_holds_those_of_all_rows():
    """Then the backward pass has two products, else three."""
    hidden, embedding, _, target = _inputs((R,))

    def num_products(chunk):
        def loss(hidden, embedding):
            return token_log_probs(hidden, embedding, target, chunk=chunk).sum()

        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, embedding)).count("dot_general[")

    assert [num_products(chunk) for chunk in (R * N, R * N - 1, 2 * R)] == [3, 4, 4]


def test_a_chunk_has_at_least_one_position():
    hidden, embedding, _, target = _inputs()
    one = token_log_probs(hidden, embedding, target, chunk=1)
    np.testing.assert_allclose(one, _naive(hidden, embedding, target), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        token_log_probs(hidden, embedding, target, chunk=0)


def test_a_gradient_that_nobody_asks_for_is_not_computed():
    """With a frozen embedding the backward pass has a third less to multiply."""
    hidden, embedding, bias, target = _inputs()

    def loss(hidden, embedding, bias):
        return token_log_probs(hidden, embedding, target, chunk=target.size, bias=bias).sum()

    def measure(wanted):
        gradient = jax.jit(jax.grad(loss, wanted))
        return gradient(hidden, embedding, bias), gradient.lower(hidden, embedding, bias).compile()

    (every, all_of_them), (by_hidden, alone) = measure((0, 1, 2)), measure(0)
    np.testing.assert_allclose(by_hidden, every[0], rtol=1e-6)
    product = 2 * hidden.size * embedding.shape[0]
    whole, one = (compiled.cost_analysis() or {} for compiled in (all_of_them, alone))
    assert whole["flops"] - one["flops"] >= product
    (by_embedding,), _ = measure((1,))
    np.testing.assert_allclose(by_embedding, every[1], rtol=1e-6)
