"""Adapters change nothing at first, are what their merged weights are, and are all that is differentiated."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_cases import COMBINATIONS, METHODS, bindings_of, hidden, merged, random_adapters, with_adapters
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import TOKENS, batch_arrays, load_case

from dpo.huggingface.adapters import (
    choose_linears,
    get_adapters,
    linear_bindings,
    module_names,
    new_adapters,
)
from dpo.models.log_probs import token_log_probs
from dpo.models.lora import LoraLinear


def loss(model):
    """Mean log-prob of the next tokens."""
    states = model.hidden(*batch_arrays(TOKENS))[:, :-1]
    target = jnp.asarray(TOKENS[:, 1:])
    return token_log_probs(states, model.output_embedding, target, chunk=16).mean()


def find(model, path):
    return reduce(getattr, path.split("."), model)


def assert_equal_up_to_rounding(ours, expected):
    assert_allclose(ours, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def trained_gradient(model, kind):
    graphdef, trained, frozen = nnx.split(model, kind, ...)
    gradient = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params, frozen))))(trained)
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradient)}


@pytest.mark.parametrize(("case", "name"), COMBINATIONS)
def test_new_adapters_change_nothing(case, name, tmp_path):
    model = load_case(tmp_path, case, attention="plain")
    adapters = new_adapters(choose_linears(bindings_of(case), "all-linear"), rank=3, alpha=6.0, seed=0)
    adapted = with_adapters(model, adapters, METHODS[name])
    assert_allclose(hidden(adapted), hidden(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "name"), COMBINATIONS)
def test_a_merged_model_computes_the_same(case, name, tmp_path):
    model, method = load_case(tmp_path, case, attention="plain"), METHODS[name]
    adapted = with_adapters(model, random_adapters(case, method), method)
    assert np.abs(hidden(adapted) - hidden(model)).max() > 0.1
    assert_allclose(hidden(merged(adapted)), hidden(adapted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_scale_is_the_methods(name, tmp_path):
    method = METHODS[name]
    adapters = random_adapters("llama", method, rank=4, alpha=6.0)
    linear = with_adapters(
        load_case(tmp_path, "llama", attention="plain"), adapters, method
    ).layers.mlp.up_proj
    s = 6.0 / 2.0 if method.use_rslora else 6.0 / 4.0
    expected = linear.base.kernel[...] + s * jnp.einsum(
        "ldr,lrf->ldf", linear.lora_a[...], linear.lora_b[...]
    )
    if method.use_dora:
        length = linear.lora_magnitude[...] / jnp.linalg.norm(expected, axis=1)
        expected = expected * length[:, None, :]
    assert_allclose(linear.full_kernel, expected, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_chain_rule_through_the_merged_weights(name, tmp_path):
    """With G = ∂/∂W': ∂B = s Aᵀ G n, ∂A = s G n Bᵀ; for DoRA n = m / ‖W + s A B‖, and ∂m = Σ_in G W' / m."""
    method = METHODS[name]
    adapted = with_adapters(
        load_case(tmp_path, "llama", attention="plain"), random_adapters("llama", method), method
    )
    ours = trained_gradient(adapted, nnx.LoRAParam)
    full = trained_gradient(merged(adapted), nnx.Param)
    for path in ("layers.self_attn.k_proj", "layers.mlp.down_proj"):
        linear = find(adapted, path)
        by_kernel, s = np.asarray(full[f"{path}.kernel"]), 6.0 / (np.sqrt(3) if method.use_rslora else 3)
        inner = by_kernel
        if method.use_dora:
            magnitude = np.asarray(linear.lora_magnitude[...])
            norms = np.linalg.norm(LoraLinear.full_kernel.__get__(linear), axis=1)
            inner = by_kernel * (magnitude / norms)[:, None, :]
            by_magnitude = (by_kernel * np.asarray(linear.full_kernel)).sum(1) / magnitude
            assert_equal_up_to_rounding(ours[f"{path}.lora_magnitude"], by_magnitude)
        by_a = s * np.einsum("ldf,lrf->ldr", inner, linear.lora_b[...])
        by_b = s * np.einsum("ldr,ldf->lrf", linear.lora_a[...], inner)
        assert_equal_up_to_rounding(ours[f"{path}.lora_a"], by_a)
        assert_equal_up_to_rounding(ours[f"{path}.lora_b"], by_b)


def test_frozen_weights_cost_no_gradient(tmp_path):
    """Compiled operations of the gradient: at least one product a linear and one of the head fewer."""
    model = load_case(tmp_path, "llama", attention="plain")
    adapters = new_adapters(choose_linears(bindings_of("llama"), "all-linear"), rank=1, alpha=1.0, seed=0)
    adapted = with_adapters(model, adapters, METHODS["lora"])

    def flops(model, kind):
        graphdef, trained, frozen = nnx.split(model, kind, ...)
        gradient = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params, frozen))))
        analysis: Any = gradient.lower(trained).compile().cost_analysis()
        return analysis["flops"]

    # A scanned body counts once: one layer's linears, and one chunk of the head.
    kernels = sum(np.prod(binding.shape) for binding in linear_bindings(bindings_of("llama")))
    added = 5 * 2 * TOKENS.size * sum(sum(binding.shape) for binding in linear_bindings(bindings_of("llama")))
    head = 2 * 16 * model.config.vocab_size * model.config.hidden_size
    saved = flops(model, nnx.Param) - flops(adapted, nnx.LoRAParam)
    assert saved > 2 * TOKENS.size * kernels + head - added


def test_a_layer_that_is_not_chosen_is_left_alone(tmp_path):
    model, pattern = load_case(tmp_path, "llama", attention="plain"), r"model\.layers\.(0|2)\.mlp\.up_proj"
    adapters = random_adapters("llama", METHODS["dora"], target_modules=pattern)
    adapted = with_adapters(model, adapters, METHODS["dora"])
    before = model.layers.mlp.up_proj.kernel[...]
    after = merged(adapted).layers.mlp.up_proj.kernel[...]
    assert_array_equal(after[1], before[1])
    assert np.abs(after[2] - before[2]).max() > 0.1
    for name, gradient in trained_gradient(adapted, nnx.LoRAParam).items():
        moved = [np.asarray(layer).any() for layer in gradient]
        assert moved == [True, False, True], name


def test_adapters_come_back_as_they_went_in(tmp_path):
    method = METHODS["dora"]
    adapters = random_adapters("phi3", method)
    found, same = get_adapters(
        with_adapters(load_case(tmp_path, "phi3", attention="plain"), adapters, method), bindings_of("phi3")
    )
    assert same == method
    for before, after in zip(adapters, found, strict=True):
        for field in ("a", "b", "magnitude", "alpha"):
            assert_array_equal(getattr(before, field), getattr(after, field))


def test_projections_of_one_stored_linear_share_their_a(tmp_path):
    adapters = random_adapters("gpt2", METHODS["lora"], target_modules=["c_attn"])
    attention = with_adapters(
        load_case(tmp_path, "gpt2", attention="plain"), adapters, METHODS["lora"]
    ).layers.self_attn
    assert attention.q_proj.lora_a is attention.k_proj.lora_a is attention.v_proj.lora_a
    state = nnx.state(attention, nnx.LoRAParam)
    assert sorted(path[-1] for path, _ in nnx.to_flat_state(state)) == [
        "lora_a",
        "lora_b",
        "lora_b",
        "lora_b",
    ]


@pytest.mark.parametrize(
    ("case", "target_modules", "ends"),
    [
        ("llama", "all-linear", 7),
        ("llama", ["q_proj", "mlp.down_proj"], 2),
        ("llama", ["model.layers.1.self_attn.q_proj"], 1),
        ("llama", r".*\.(q|v)_proj", 2),
        ("phi3", "All-Linear", 4),
        ("gpt2", ["c_proj"], 2),
        ("gpt2", ["attn.c_proj"], 1),
    ],
)
def test_linears_are_chosen_as_peft_does(case, target_modules, ends):
    chosen = choose_linears(bindings_of(case), target_modules)
    assert len(chosen) == ends
    if target_modules == ["model.layers.1.self_attn.q_proj"]:
        assert chosen[0][1] == (False, True, False)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (
            ["q_proj", "query"],
            r"'query' is no linear of this model; allowed: all-linear, .*\(.*q_proj, k_proj",
        ),
        (["lm_head"], "'lm_head' is no linear"),  # tied: there is none
        (["embed_tokens"], "'embed_tokens' means model.embed_tokens, which is no linear"),
        (".*", "which is no linear"),
        ("q_proj", "'q_proj' is no linear .* matches whole names such as model.layers.0.self_attn"),
        ("(", "is not a regular expression"),
        (["post_attention_layernorm"], "is no linear"),
    ],
)
def test_what_is_no_linear_is_refused_by_name(target_modules, message):
    with pytest.raises(ValueError, match=message):
        choose_linears(bindings_of("llama"), target_modules)


def test_new_adapters_are_a_function_of_the_seed_and_differ_between_linears():
    chosen = choose_linears(bindings_of("llama"), ["q_proj", "o_proj"])
    first, again, other = (new_adapters(chosen, rank=2, alpha=4.0, seed=seed) for seed in (0, 0, 1))
    assert_array_equal(first[0].a, again[0].a)
    assert np.abs(first[0].a - other[0].a).max() > 0.01
    assert np.abs(first[0].a - first[1].a).max() > 0.01
    assert np.abs(first[0].a).max() <= 1 / np.sqrt(first[0].a.shape[1])


def test_new_adapters_are_nothing_in_layers_that_are_not_chosen():
    chosen = choose_linears(bindings_of("llama"), ["layers.1.self_attn.q_proj", "k_proj"])
    q, k = new_adapters(chosen, rank=2, alpha=4.0, seed=0)
    assert [np.asarray(a).any() for a in q.a] == [False, True, False]
    assert (np.asarray(q.alpha).tolist(), np.asarray(k.alpha).tolist()) == ([0.0, 4.0, 0.0], [4.0] * 3)
    assert np.asarray(k.a).all()
    assert not any(np.asarray(adapter.b).any() for adapter in (q, k))


def test_every_linear_of_the_model_has_a_name():
    names = [name for binding in linear_bindings(bindings_of("gpt_neox")) for name in module_names(binding)]
    assert "gpt_neox.layers.2.attention.query_key_value" in names
    assert len(names) == 4 * 3
