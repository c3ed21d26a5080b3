"""Tiny models with random adapters, shared by the tests of adapters and of their files."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import TOKENS, batch_arrays, case_config

from dpo.huggingface.adapters import add_adapters, choose_linears, model_bindings, new_adapters
from dpo.huggingface.streamed import Streamed, plain_model
from dpo.huggingface.text_models import read_config
from dpo.models.lora import Method

METHODS = {"lora": Method(), "rslora": Method(use_rslora=True), "dora": Method(use_dora=True)}
COMBINATIONS = [
    ("llama", "lora"),
    ("llama", "rslora"),
    ("phi3", "dora"),
    ("gpt2", "lora"),
    ("gpt_neox", "dora"),
    ("lfm2", "dora"),
]
"""Plain; two fusions; one that is not transposed; one that interleaves heads, with biases;
two kinds of layers."""

BY_NAME = [("gemma4_text", "lora"), ("gemma4_text", "rslora"), ("lfm3", "lora"), ("qwen3_5_text", "lora")]
"""A linear that all layers share, and layers that read keys and values of others; gates; the delta rule."""


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef, state):
    return nnx.merge(graphdef, state).hidden(*batch_arrays(TOKENS))


def hidden(model):
    """Hidden states of the shared tokens, compiled as one program."""
    return _hidden(*nnx.split(model))


@cache
def bindings_of(case):
    return model_bindings(*read_config(case_config(case)))


def random_adapters(
    case, method, *, rank=3, alpha=6.0, target_modules: str | list[str] = "all-linear", seed=0
):
    """Adapters as if trained: B is not 0, and DoRA's lengths have moved."""
    rng = np.random.default_rng(seed)
    chosen = choose_linears(bindings_of(case), target_modules)
    adapters = new_adapters(chosen, rank=rank, alpha=alpha, seed=seed)
    return [
        adapter._replace(
            a=np.asarray(adapter.a),
            b=rng.normal(0, 0.3, adapter.b.shape).astype(np.float32)
            * (np.asarray(adapter.alpha) != 0)[:, None, None],
            alpha=np.asarray(adapter.alpha),
            magnitude=rng.uniform(0.5, 3, (adapter.b.shape[0], adapter.b.shape[2])).astype(np.float32)
            if method.use_dora
            else None,
        )
        for adapter in adapters
    ]


def merged(model):
    """The plain model with its parameters made, to compute with."""
    graphdef, state = nnx.split(plain_model(model))

    def made(leaf):
        if not isinstance(leaf, Streamed):
            return leaf.astype(jnp.float32)
        num_leading = len(leaf.shape) - 2
        parts = [leaf.part(index) for index in range(math.prod(leaf.shape[:num_leading]))]
        return jnp.stack(parts).reshape(leaf.shape)

    return nnx.merge(graphdef, jax.tree.map(made, state))


def with_adapters(model, adapters, method):
    """A copy of the model with adapters; the model itself stays as it is."""
    copy = nnx.merge(*nnx.split(model))
    add_adapters(copy, adapters, method)
    return copy
