"""Products of float32 are of float32 in the programs of every platform, forward and backward."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from attention_rows import make_layout, make_qkv
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny_model import byte_tokenizer, tiny_config

from dpo.diffusion.network import Network
from dpo.huggingface.adapters import add_adapters, choose_linears, model_bindings, new_adapters
from dpo.huggingface.text_models import read_config
from dpo.models.attention import Implementation, visible
from dpo.models.attention_fast import attend_splash
from dpo.models.attention_ranges import attend_ranges
from dpo.models.decoder import Decoder
from dpo.models.linear import round_products
from dpo.models.log_probs import token_log_probs
from dpo.models.lora import Method

TOKENS = jnp.zeros((1, 8), jnp.int32)
POSITIONS = jnp.arange(8, dtype=jnp.int32)[None]
ROWS = (((30, (25, 14)), (20, (9, 12))),)


def make_model(attention: Implementation = "plain", **method):
    family, config = read_config(tiny_config(byte_tokenizer()))
    model = Decoder(config, rngs=nnx.Rngs(0), compute_dtype=jnp.dtype("float32"), attention=attention)
    if method:
        linears = choose_linears(model_bindings(family, config), "all-linear")
        add_adapters(model, new_adapters(linears, rank=2, alpha=4.0, seed=0), Method(**method))
    return model


def gradient_of_log_probs(model):
    """The gradient's function by every parameter, and the parameters."""
    graphdef, params = nnx.split(model)

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(TOKENS, POSITIONS, TOKENS + 1, TOKENS)
        log_probs = token_log_probs(
            hidden, model.output_embedding, TOKENS, chunk=4, rounds_backward=model.rounds != "neither"
        )
        return log_probs.sum()

    return jax.grad(loss), params


def decoding(model):
    """One step of sampling, which has a cache and makes logits."""
    graphdef, params = nnx.split(model)

    def step(params):
        model = nnx.merge(graphdef, params)
        hidden, _ = model.decode(TOKENS, POSITIONS, model.init_cache(1, 12))
        return model.logits(hidden)

    return step, params


def gradient_of_network():
    graphdef, params = nnx.split(Network(num_dims=2, hidden_size=4, num_layers=2, rngs=nnx.Rngs(0)))
    return jax.grad(lambda params: nnx.merge(graphdef, params)(jnp.ones((3, 2)), jnp.ones(3)).sum()), params


PROGRAMS = {
    "plain attention": lambda: gradient_of_log_probs(make_model()),
    "blocked attention": lambda: gradient_of_log_probs(make_model("blocked")),
    "LoRA": lambda: gradient_of_log_probs(make_model(use_rslora=True)),
    "DoRA": lambda: gradient_of_log_probs(make_model(use_dora=True)),
    "decoding": lambda: decoding(make_model()),
    "diffusion": gradient_of_network,
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_of_float32_is_in_full_precision(name, platform):
    """In the programs as they are lowered for a platform that is not here."""
    function, argument = PROGRAMS[name]()
    text = jax.jit(function).trace(argument).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


def test_products_that_are_rounded_by_name_are_not_asked_for_more():
    model = make_model()
    round_products(model, "both")
    function, params = gradient_of_log_probs(model)
    text = jax.jit(function).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    rounded = [line for line in text.splitlines() if re.search(r"dot_general.*: \(tensor<\w+xbf16>", line)]
    assert len(rounded) > 10
    assert [line for line in rounded if "HIGHEST" in line] == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kernel", ["ranges", "splash"])
def test_kernels_multiply_float32_in_full_precision(kernel, dtype):
    """Forward and backward, under remat; Mosaic refuses to multiply bfloat16 so."""
    layout = make_layout(ROWS, 128)
    if kernel == "ranges":
        attention = partial(attend_ranges, **layout, scale=0.3)
    else:
        attention = partial(attend_splash, mask=visible(**layout), scale=0.3)
    q, k, v, _ = make_qkv(1, 128, (4, 2), 16, dtype)

    @jax.checkpoint
    def loss(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    found = list(_products(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v)))
    full = (jax.lax.Precision.HIGHEST,) * 2
    of_float32 = [precision for dtypes, precision in found if dtypes == {jnp.dtype(jnp.float32)}]
    shorter = [precision for dtypes, precision in found if dtypes != {jnp.dtype(jnp.float32)}]
    assert len(found) >= 7
    if dtype == jnp.float32:
        assert set(of_float32) == {full}
    assert full not in shorter


def _products(jaxpr):
    """(dtypes of the operands, precision) of every product in a program and the kernels it calls."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in inner.eqns:
        if equation.primitive.name == "dot_general":
            yield {x.aval.dtype for x in equation.invars}, equation.params["precision"]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from _products(value)


def test_what_jax_was_told_stands():
    script = (
        "from dpo.models.precision import precision_of; import jax.numpy as jnp; "
        "print(precision_of(jnp.float32))"
    )
    told = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"}
    for environment, expected in ((os.environ, "HIGHEST"), (told, "None")):
        found = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert found.stdout.strip() == expected, found.stderr
