"""Sampling draws from the model's distribution, and a row depends on its prompt and seed only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import load_case

from dpo.models.drawing import SamplingConfig, filter_logits, sample
from dpo.models.sampling import (
    _check_prompts,
    _make_batch,
    _prefill,
    _round_up,
    generate,
    lower_generation,
    stream,
)

PROMPTS = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2, 6], [8], [2, 7, 1, 8, 2]]
RULES = SamplingConfig(
    max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def logits():
    return 3 * jax.random.normal(jax.random.key(1), (4, 1000))


def kept(logits, **rules):
    return np.isfinite(filter_logits(logits, SamplingConfig(**rules)))


def test_a_row_does_not_depend_on_its_batch(model):
    together = generate(model, PROMPTS, sampling=RULES, seeds=[1, 2, 3, 4], stop_tokens=[2])
    shuffled = generate(
        model, PROMPTS[::-1], sampling=RULES, seeds=[4, 3, 2, 1], stop_tokens=[2], batch_size=2
    )
    alone = generate(model, [PROMPTS[1]], sampling=RULES, seeds=[2], stop_tokens=[2])
    assert shuffled[::-1] == together
    assert alone == [together[1]]


def test_a_row_depends_on_its_seed(model):
    rows = generate(model, [PROMPTS[0]] * 3, sampling=RULES, seeds=[1, 1, 2], stop_tokens=[])
    assert rows[0] == rows[1] != rows[2]


def test_streaming_yields_what_generate_returns(model):
    expected = generate(model, [PROMPTS[0]], sampling=RULES, seeds=[7], stop_tokens=[2])[0]
    assert list(stream(model, PROMPTS[0], sampling=RULES, seed=7, stop_tokens=[2])) == expected


def test_a_response_ends_with_the_first_stop_token(model):
    greedy = SamplingConfig(max_new_tokens=12, temperature=0.0)
    free = generate(model, PROMPTS, sampling=greedy, seeds=[0] * 4, stop_tokens=[])
    stop = free[1][5]
    stopped = generate(model, PROMPTS, sampling=greedy, seeds=[0] * 4, stop_tokens=[stop])
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_greedy_takes_the_most_probable_token_of_the_whole_forward_pass(model):
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
    tokens = list(PROMPTS[1])
    for _ in range(6):
        row = jnp.asarray(tokens)[None]
        positions = jnp.arange(len(tokens))[None]
        hidden = model.hidden(row, positions, jnp.ones_like(row), jnp.zeros_like(row))
        tokens.append(int(jnp.argmax(model.logits(hidden[0, -1]))))
    assert generate(model, [PROMPTS[1]], sampling=greedy, seeds=[0], stop_tokens=[]) == [tokens[8:]]


def test_what_was_drawn_goes_on_as_a_prompt_would(model):
    """Also from a prompt of one token."""
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)

    def drawn(prompt):
        return generate(model, [prompt], sampling=greedy, seeds=[0], stop_tokens=[])[0]

    first, *others = drawn(PROMPTS[2])
    assert drawn([*PROMPTS[2], first])[:-1] == others


@pytest.mark.parametrize("k", [1, 7, 999, 2000])
def test_top_k_keeps_the_k_largest(logits, k):
    rank = np.argsort(np.argsort(-np.asarray(logits), axis=-1), axis=-1)
    assert_array_equal(kept(logits, top_k=k), rank < k)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_tokens_until_their_mass_reaches_p(logits, p):
    probs = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    order = np.argsort(-probs, axis=-1)
    before = np.cumsum(np.take_along_axis(probs, order, -1), axis=-1) - np.take_along_axis(probs, order, -1)
    expected = np.zeros_like(probs, bool)
    np.put_along_axis(expected, order, before < p, axis=-1)
    assert_array_equal(kept(logits, top_p=p), expected)


def test_min_p_is_relative_to_the_most_probable(logits):
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert_array_equal(kept(logits, min_p=0.1), probs >= 0.1 * probs.max(axis=-1, keepdims=True))


def test_samples_follow_the_distribution():
    row = 2 * jax.random.normal(jax.random.key(2), (1, 300))
    count = 20_000
    rows, numbers = jnp.broadcast_to(row, (count, 300)), jnp.arange(count)
    tokens = sample(rows, jnp.zeros(count, jnp.int32), numbers.astype(jnp.uint32), SamplingConfig())
    frequencies = np.bincount(np.asarray(tokens), minlength=300) / count
    probs = np.asarray(jax.nn.softmax(row[0]))
    assert np.abs(frequencies - probs).max() < 5 * np.sqrt(probs.max() / count)


def test_an_excluded_token_is_never_drawn(logits):
    rules = SamplingConfig(top_k=3)
    rows = jnp.broadcast_to(logits[:1], (5000, 1000))
    tokens = sample(rows, jnp.arange(5000), jnp.zeros(5000, jnp.uint32), rules)
    assert set(np.asarray(tokens).tolist()) == set(np.argsort(-np.asarray(logits[0]))[:3].tolist())


def test_the_repetition_penalty_lowers_what_was_seen(model):
    greedy = SamplingConfig(max_new_tokens=12, temperature=0.0, repetition_penalty=1e6)
    row = generate(model, [PROMPTS[0]], sampling=greedy, seeds=[0], stop_tokens=[])[0]
    assert len(set(row) | set(PROMPTS[0])) == 15


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_what_was_seen_is_kept_where_there_is_a_penalty(model, penalty):
    rules = SamplingConfig(max_new_tokens=1, repetition_penalty=penalty)
    graphdef, params = nnx.split(model)
    batch = _make_batch([[1, 2]], [0], 1)
    state = jax.eval_shape(lambda *arrays: _prefill(graphdef, rules, (), *arrays), params, batch)
    assert (state.seen is not None) == (penalty != 1)


@pytest.mark.parametrize(("prompts", "rows"), [(1, 1), (2, 2), (3, 4), (5, 6)])
def test_rows_are_padded_to_a_power_of_two_or_the_whole_batch(prompts, rows):
    batch = _make_batch([[7] * 33] * prompts, [9] * prompts, 6)
    assert batch.tokens.shape == (rows, 64)
    assert batch.lengths.tolist() == [33] * prompts + [0] * (rows - prompts)
    assert batch.seeds.tolist() == [9] * prompts + [0] * (rows - prompts)
    assert (batch.tokens == 7).sum() == 33 * prompts
    assert [_round_up(length) for length in (1, 32, 33)] == [32, 32, 64]


def test_the_lowered_program_is_for_all_rows_and_the_longest_prompt(model):
    lowered = lower_generation(model, rows=3, longest_prompt=33, sampling=RULES, stop_tokens=[2])
    (params, batch, limit), _ = lowered.args_info
    assert [info.shape for info in batch] == [(3, 64), (3,), (3,)]
    assert limit.shape == ()
    assert jax.tree.structure(params) == jax.tree.structure(nnx.split(model)[1])
    assert [info.shape for info in lowered.out_info[5:]] == [(3, 32), (3,), ()]


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"top_p is 1\.5; allowed is above 0 and at most 1"):
        SamplingConfig(top_p=1.5)


def test_tokens_that_the_model_does_not_know_are_refused(model):
    V = model.config.vocab_size
    for prompts in ([[1], [2, V]], [[V]]):
        with pytest.raises(ValueError, match=f"a prompt has token {V}; the model knows {V} from 0"):
            generate(model, prompts, sampling=RULES, seeds=[0] * len(prompts), stop_tokens=[])


def test_positions_that_a_learned_table_lacks_are_refused(tmp_path):
    gpt2 = load_case(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="need 66 positions; the model has 64"):
        generate(gpt2, [[1], [1] * 54, [1] * 2], sampling=RULES, seeds=[0] * 3, stop_tokens=[])
    _check_prompts(gpt2, [[1] * 52], RULES.max_new_tokens)  # what just fits


def test_every_prompt_has_tokens_and_a_seed(model):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(model, [[1], [2]], sampling=RULES, seeds=[0], stop_tokens=[])
    with pytest.raises(ValueError, match=r"prompts \[1, 2\] have no tokens"):
        generate(model, [[1], [], []], sampling=RULES, seeds=[0] * 3, stop_tokens=[])


def test_filters_without_effect_change_nothing(logits):
    assert_allclose(filter_logits(logits, SamplingConfig(top_p=1.0, min_p=0.0)), logits)
