"""The layouts, through a real decoder: equal log-probs and gradients, and nothing leaks between responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from toy_rows import END, LAYOUTS, VOCAB, random_dataset
from transformers import LlamaConfig

from dpo.data.packing import Shape, pack
from dpo.huggingface.families import decoder_config
from dpo.models.decoder import Decoder
from dpo.training.step import response_sums

P, K = 5, 3
# Rows that hold any 5 prompts of the strategy below, so that every example has the same shapes.
SHAPES = {"padded": Shape(15, 16, 7), "packed": Shape(8, 40, 24), "shared": Shape(6, 40, 28)}

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=K)), min_size=P, max_size=P
)


def make_model(attention):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=END,
        eos_token_id=END,
    )
    model = Decoder(decoder_config(config), rngs=nnx.Rngs(0), remat="none", attention=attention)
    # At the initial scale every policy is nearly uniform; at 8 times it, float32 gradients are noise at 1e-4.
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, model)


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def lay_out(dataset, layout):
    return pack(dataset, np.arange(P), shape=SHAPES[layout], layout=layout, num_responses=K)


@functools.cache
def scores(attention):
    """The parameters of a decoder, its log-probs of a batch, and a weighted sum's gradient."""
    graphdef, params = nnx.split(make_model(attention))

    def logps(params, batch):
        return response_sums(nnx.merge(graphdef, params), batch, chunk=16)["logps"]

    def weighted(params, batch, weights):
        sums = logps(params, batch)
        return jnp.vdot(sums, weights), sums

    return params, jax.jit(logps), jax.jit(jax.grad(weighted, has_aux=True))


def plain_logps(model, dataset):
    """One sequence at a time, as the definition has it: no groups, no gathering, no chunks."""

    @jax.jit
    def log_probs(tokens):
        whole = jnp.ones_like(tokens)
        hidden = model.hidden(tokens, jnp.arange(tokens.shape[1])[None], whole, jnp.zeros_like(tokens))
        return jax.nn.log_softmax(model.logits(hidden))

    logps = np.zeros((P, K))
    for p in range(P):
        for k, response in enumerate(dataset.responses(p)):
            start = len(dataset.prompt(p))
            tokens = np.full((1, 16), END, np.int32)
            tokens[0, : start + len(response)] = [*dataset.prompt(p), *response]
            table = np.asarray(log_probs(jnp.asarray(tokens)))[0]
            logps[p, k] = sum(table[start + t - 1, token] for t, token in enumerate(response))
    return logps


@pytest.mark.parametrize("attention", [pytest.param("plain", marks=pytest.mark.ci), "blocked"])
@settings(max_examples=8)
@given(shapes=shapes, seed=st.integers(0, 99))
def test_every_layout_gives_the_same_log_probs_and_gradients(attention, shapes, seed):
    dataset = random_dataset(shapes, seed)
    params, _, gradient_and_logps = scores(attention)
    weights = np.random.default_rng(seed).normal(size=(P, K)).astype(np.float32)
    batches = {layout: lay_out(dataset, layout) for layout in LAYOUTS}
    gradient, logps = gradient_and_logps(params, batches["padded"], weights)
    assert np.all(np.asarray(logps)[~batches["padded"].present] == 0)
    scale = np.abs(flatten(gradient)).max()
    for layout in ("packed", "shared"):
        others, same = gradient_and_logps(params, batches[layout], weights)
        assert_allclose(same, logps, rtol=1e-5)
        # some entries are sums that cancel exactly: the scale of rounding is the whole gradient's
        assert_allclose(flatten(others), flatten(gradient), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("attention", ["plain", "blocked"])
def test_the_padded_layout_is_the_plain_computation(attention):
    dataset = random_dataset([(9, [7, 1, 3]), (1, [2]), (4, [4, 4]), (2, [1, 1, 1]), (5, [6, 5])])
    params, logps, _ = scores(attention)
    expected = plain_logps(make_model(attention), dataset)
    assert_allclose(logps(params, lay_out(dataset, "padded")), expected, rtol=1e-5)


@pytest.mark.parametrize("attention", ["plain", "blocked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_changing_one_response_leaves_all_others_as_they_were(attention, layout):
    """The first response of prompt 1 is rewritten: its siblings and other groups must not see it."""
    dataset = random_dataset([(9, [7, 1, 3]), (3, [5, 2, 4]), (4, [4, 4]), (2, [1, 1, 1]), (5, [6, 5])])
    params, logps, _ = scores(attention)
    batch = lay_out(dataset, layout)
    before = np.asarray(logps(params, batch))
    changed = np.zeros((P, K), bool)
    changed[1, 0] = True
    touched = batch._replace(tokens=batch.tokens.copy(), target=batch.target.copy())
    r, places = batch.row[1, 0], batch.owner[batch.row[1, 0]] == 1 * K + 0
    sources = batch.source[r, places]
    slots = [sources[1] + np.arange(len(sources))] if len(sources) > 1 else []
    touched.tokens[r, slots] = (batch.tokens[r, slots] + 7) % VOCAB
    touched.target[r, places] = (batch.target[r, places] + 7) % VOCAB
    after = np.asarray(logps(params, touched))
    assert_array_equal(after[~changed], before[~changed])
    assert np.all(after[changed] != before[changed])


@pytest.mark.parametrize("attention", ["plain", "blocked"])
def test_changing_a_prompt_changes_its_responses_and_no_neighbours(attention):
    dataset = random_dataset([(9, [7, 1, 3]), (3, [5, 2, 4]), (4, [4, 4]), (2, [1, 1, 1]), (5, [6, 5])])
    params, logps, _ = scores(attention)
    batch = lay_out(dataset, "shared")
    before = np.asarray(logps(params, batch))
    neighbours = [p for p in range(P) if p != 1 and batch.row[p, 0] == batch.row[1, 0]]
    assert neighbours
    r = batch.row[1, 0]
    source = batch.source[r, batch.owner[r] == 1 * K][0]
    touched = batch._replace(tokens=batch.tokens.copy())
    touched.tokens[r, source - 2] = (batch.tokens[r, source - 2] + 7) % VOCAB
    after = np.asarray(logps(params, touched))
    others = np.arange(P) != 1
    assert_array_equal(after[others], before[others])
    assert np.all(after[1] != before[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_in_padding_does_not_matter(layout):
    dataset = random_dataset([(9, [7, 1, 3]), (3, [5, 2, 4]), (4, [4, 4]), (2, [1, 1, 1]), (5, [6, 5])])
    params, logps, _ = scores("blocked")
    batch = lay_out(dataset, layout)
    noise = np.where(batch.group == 0, 11, batch.tokens)
    assert (noise != batch.tokens).any()
    assert_array_equal(logps(params, batch._replace(tokens=noise)), logps(params, batch))
