"""The loop over layers: several of them in one pass compute what one at a time does."""

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from tiny_models import TOKENS, batch_arrays, case_config

from dpo.config import MeshConfig, ModelConfig
from dpo.huggingface.text_models import read_config
from dpo.models.decoder import Decoder
from dpo.parallel.sharding import make_mesh
from dpo.training.policy import load_policy


def value_and_gradient(case: str, unroll: int):
    """Of a weighted sum of hidden states; and what is said of its program's loops."""
    config = read_config(case_config(case))[1]
    model = Decoder(config, rngs=nnx.Rngs(0), attention="plain", remat="dots")
    model.scan_unroll = unroll
    graphdef, params = nnx.split(model)

    def loss(params):
        hidden = nnx.merge(graphdef, params).hidden(*batch_arrays(TOKENS[:1]))
        return (hidden * jax.random.normal(jax.random.key(1), hidden.shape)).sum()

    function = jax.jit(jax.value_and_grad(loss)).trace(params)
    loops = [line for line in str(function.jaxpr).splitlines() if "unroll=" in line]
    return function.lower().compile()(params), loops


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "lfm2"])
def test_several_layers_in_a_pass_compute_what_one_does(case):
    """Three layers by two in a pass leave one; a hybrid's patterns repeat seldom."""
    (one, gradient), lines = value_and_gradient(case, 1)
    (two, unrolled), unrolled_lines = value_and_gradient(case, 2)
    assert any("unroll=2" in line for line in unrolled_lines)
    assert not any("unroll=2" in line for line in lines)
    assert_allclose(one, two, rtol=1e-5)
    for expected, found in zip(jax.tree.leaves(gradient), jax.tree.leaves(unrolled), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_setting_is_the_models(tiny_model_dir):
    config = ModelConfig(source=str(tiny_model_dir), scan_unroll=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert load_policy(config, mesh).pretrained.model.scan_unroll == 2
