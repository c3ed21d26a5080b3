"""The noise of bfloat16 is measured apart from what weights do, and is none in float32."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_bfloat16 import loader
from tiny_model import byte_tokenizer, tiny_config

from dpo.huggingface.text_models import read_config
from dpo.models.decoder import Decoder
from dpo.training.hooks import Done
from dpo.training.rounding import STEPS, describe_rounding, rounding_noise, say_rounding
from dpo.training.step import make_eval_step

WEIGHTS = {"a": jnp.zeros(2000, jnp.float32), "b": jnp.ones((3, 5), jnp.float32)}


def test_what_moves_with_the_weights_is_no_noise() -> None:
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(2000, 4000)) * 100

    def exact(params):
        return np.asarray(params["a"], np.float64) @ slopes

    def noisy(params):
        return exact(params) + rng.normal(size=4000) * 0.02

    assert rounding_noise(exact, WEIGHTS, by=0.01) < 1e-9
    assert rounding_noise(noisy, WEIGHTS, by=0.01) == pytest.approx(0.02, rel=0.05)


@pytest.mark.as_users
@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0.0, 1e-4), ("bfloat16", 1e-3, 1.0)])
def test_a_model_in_bfloat16_has_some_and_says_it_after_two_steps(dtype, least, most) -> None:
    _, config = read_config(tiny_config(byte_tokenizer()))
    model = Decoder(config, rngs=nnx.Rngs(0), compute_dtype=jnp.dtype(dtype), remat="none")
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    params, frozen = nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)
    score = make_eval_step(graphdef, chunk=64, micro_batches=2)
    said: list[str] = []

    def score_with(params):
        return lambda batch: jax.tree.map(np.asarray, score(params, frozen, batch))

    hook = say_rounding(params, loader().batch(0), score_with, learning_rate=1e-6, log=said.append)
    for step in range(1, 4):
        hook(Done(step, loader().batch(0), {}, SimpleNamespace(params=params)))  # pyright: ignore[reportArgumentType]
    (line,) = said
    noise = float(line.split("margin by ")[1].split(" nats")[0])
    assert least <= noise <= most
    assert f"the first {STEPS} steps changed it by +0 on average" in line


def test_what_helps_is_said_where_the_noise_is_the_larger() -> None:
    assert "model.round_products: backward" in describe_rounding(0.03, -0.002, 5e-7)
    assert "float32" not in describe_rounding(0.03, -0.2, 5e-7)
