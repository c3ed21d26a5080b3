"""A model held in less memory is the model up to the rounding of its weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_cases import merged
from numpy.testing import assert_allclose
from tiny_models import TOKENS, batch_arrays, load_case

from dpo.models.linear import Linear
from dpo.models.norms import UnscaledRMSNorm
from dpo.models.quantized import Int8Linear, as_held, hold


def make_linear(*, zero_output=False):
    linear = Linear(24, 10, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0))
    if zero_output:
        linear.kernel = nnx.Param(linear.kernel[...].at[:, 3].set(0.0))
    return linear


def test_int8_weights_are_within_half_a_step_of_their_outputs_scale():
    linear = make_linear()
    held = Int8Linear(linear)
    step = np.abs(linear.kernel[...]).max(0) / 127
    assert held.kernel[...].dtype == jnp.int8
    assert (np.abs(held.full_kernel - linear.kernel[...]) <= 0.501 * step[None]).all()


@pytest.mark.parametrize("zero_output", [False, True])
def test_int8_multiplies_by_its_full_kernel(zero_output):
    linear = make_linear(zero_output=zero_output)
    held, x = Int8Linear(linear), np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    assert linear.bias is not None
    expected = x @ np.asarray(held.full_kernel) + np.asarray(linear.bias[...])
    assert_allclose(held(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_an_output_of_zeros_has_a_scale_all_the_same():
    held = Int8Linear(make_linear(zero_output=True))
    assert (held.kernel_scale[...] > 0).all()
    assert (held.kernel[...][:, 3] == 0).all()
    others = np.delete(np.asarray(held.kernel[...]), 3, axis=1)
    assert (np.abs(others).max(0) == 127).all(), "the largest weight of an output has the largest number"


def test_parameters_by_themselves_are_what_a_held_model_computes_with():
    linear = make_linear()
    values = np.asarray(linear.kernel[...])
    rounded = np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)
    assert (rounded != values).any()
    for leaf in ("kernel", "embedding", "scale", "bias"):
        assert as_held(values, leaf, "float32") is values
    for leaf in ("kernel", "embedding"):
        np.testing.assert_array_equal(as_held(values, leaf, "bfloat16"), rounded, strict=True)
    np.testing.assert_array_equal(as_held(values, "embedding", "int8"), rounded, strict=True)
    of_int8 = np.asarray(Int8Linear(linear).full_kernel)
    np.testing.assert_array_equal(as_held(values, "kernel", "int8"), of_int8, strict=True)
    for leaf in ("scale", "bias"):
        assert as_held(values, leaf, "bfloat16") is as_held(values, leaf, "int8") is values


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("int8", 0.2)])
def test_a_held_model_is_the_model_but_for_rounding(dtype, tolerance, tmp_path):
    model, held = (
        load_case(tmp_path, "gpt_neox", attention="plain"),
        load_case(tmp_path, "gpt_neox", attention="plain"),
    )
    hold(held, dtype)
    dtypes = {leaf[...].dtype.name for _, leaf in nnx.to_flat_state(nnx.state(held, nnx.Param))}
    assert dtypes == {"float32", "bfloat16"} | {dtype}
    assert not isinstance(held.norm, UnscaledRMSNorm)
    assert held.norm.scale[...].dtype == jnp.float32
    ours, theirs = (one.hidden(*batch_arrays(TOKENS)) for one in (held, model))
    assert 0 < np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_held_model_exports_what_it_computes(dtype, tmp_path):
    held = load_case(tmp_path, "llama", attention="plain")
    hold(held, dtype)
    plain = merged(held)
    assert {leaf[...].dtype for _, leaf in nnx.to_flat_state(nnx.state(plain))} == {jnp.dtype("float32")}
    assert_allclose(
        plain.hidden(*batch_arrays(TOKENS)), held.hidden(*batch_arrays(TOKENS)), rtol=1e-3, atol=1e-4
    )
