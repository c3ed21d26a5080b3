"""The step's laws, on a policy whose log-probs are a plain function: no decoder, no layout."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from dpo.data.batch import Batch
from dpo.losses import Objective, make_objective
from dpo.losses.sums import EXTRA_SUMS, ExtraSum
from dpo.parallel.partition import ONE_DEVICE
from dpo.training import step as step_module
from dpo.training.step import init_state, loss_and_gradient, make_scores, make_train_step, response_sums

NUM_PROMPTS, NUM_RESPONSES, NUM_ROWS, NUM_TOKENS, VOCAB = 8, 3, 8, 12, 20


@pytest.fixture
def batch():
    """Prompt p lives in row p; its responses' tokens are random ids, and K is ragged."""
    rng = np.random.default_rng(0)
    owner = np.full((NUM_ROWS, NUM_TOKENS), NUM_PROMPTS * NUM_RESPONSES)
    present = np.ones((NUM_PROMPTS, NUM_RESPONSES), bool)
    present[3, 2] = False
    lengths = np.zeros((NUM_PROMPTS, NUM_RESPONSES), np.int32)
    for p in range(NUM_PROMPTS):
        owners = rng.integers(0, NUM_RESPONSES, NUM_TOKENS - 2)
        owners[:NUM_RESPONSES] = np.arange(NUM_RESPONSES)
        owners[~present[p][owners]] = 0
        owner[p, : NUM_TOKENS - 2] = p * NUM_RESPONSES + owners
        lengths[p] = np.bincount(owners, minlength=NUM_RESPONSES)
    zeros = np.zeros((NUM_ROWS, NUM_TOKENS), np.int32)
    shape = (NUM_PROMPTS, NUM_RESPONSES)
    return Batch(
        tokens=zeros,
        positions=zeros,
        group=zeros,
        branch=zeros,
        source=zeros,
        target=rng.integers(0, VOCAB, (NUM_ROWS, NUM_TOKENS)).astype(np.int32),
        owner=owner.astype(np.int32),
        index=np.arange(NUM_PROMPTS, dtype=np.int32),
        row=np.broadcast_to(np.arange(NUM_PROMPTS, dtype=np.int32)[:, None], shape),
        present=present,
        lengths=lengths,
        ranks=np.broadcast_to(np.arange(NUM_RESPONSES, dtype=np.int32)[None], shape),
        scores=np.full(shape, np.nan, np.float32),
    )


def sum_rows(params, batch):
    """A unigram policy: log softmax(params)[token], summed over each response."""
    log_probs = jax.nn.log_softmax(params)[jnp.asarray(batch.target)]
    size = batch.present.size
    sums = jax.ops.segment_sum(log_probs.reshape(-1), jnp.asarray(batch.owner).reshape(-1), size + 1)
    return {"logps": sums[:-1].reshape(batch.present.shape)}


def run(objective, batch, micro_batches):
    params = jax.random.normal(jax.random.key(1), (VOCAB,))
    reference = sum_rows(jax.random.normal(jax.random.key(2), (VOCAB,)), batch)
    return loss_and_gradient(
        params, batch, reference, sum_rows=sum_rows, objective=objective, micro_batches=micro_batches
    )


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        ("dpo", 2),
        pytest.param("plackett_luce", 4, marks=pytest.mark.ci),
        pytest.param("dpo", 8, marks=pytest.mark.ci),
        pytest.param("plackett_luce", 8, marks=pytest.mark.slow),
        pytest.param("dpo", 4, marks=pytest.mark.slow),
        pytest.param("plackett_luce", 2, marks=pytest.mark.slow),
    ],
)
def test_accumulation_divides_once_by_the_global_count(batch, name, micro_batches):
    objective = make_objective({"name": name})
    loss, policy, gradient, _ = run(objective, batch, 1)
    split_loss, split_policy, split_gradient, _ = run(objective, batch, micro_batches)
    assert_allclose(split_loss, loss, rtol=1e-6)
    assert_allclose(split_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert_allclose(split_policy["logps"], policy["logps"], rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_an_objective_over_the_whole_batch_is_not_split(batch, micro_batches):
    """Sorting across prompts: splitting it would give another loss."""

    def sorted_gaps(scores):
        gaps = jnp.sort(scores.log_ratio[:, 0]) - jnp.sort(scores.log_ratio[:, 1])[::-1]
        return -jax.nn.log_sigmoid(gaps)

    objective = Objective(sorted_gaps, whole_batch=True)
    loss, _, gradient, _ = run(objective, batch, 1)
    split_loss, _, split_gradient, _ = run(objective, batch, micro_batches)
    assert_allclose(split_loss, loss, rtol=1e-6)
    assert_allclose(split_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_the_mean_over_prompts_of_sigmoid_weighted_score_differences(batch):
    """∂/∂θ = −β σ(−δ) (∇ log π(y_w) − ∇ log π(y_l)), for pairs."""
    pairs = batch._replace(present=batch.present & (np.arange(NUM_RESPONSES) < 2)[None])
    _, _, gradient, _ = run(make_objective({"name": "dpo", "beta": 0.3}), pairs, 1)
    params = jax.random.normal(jax.random.key(1), (VOCAB,))
    reference = sum_rows(jax.random.normal(jax.random.key(2), (VOCAB,)), batch)["logps"]
    log_ratio = sum_rows(params, batch)["logps"] - reference
    weight = jax.nn.sigmoid(-0.3 * (log_ratio[:, 0] - log_ratio[:, 1]))
    jacobian = jax.jacobian(lambda params: sum_rows(params, batch)["logps"])(params)
    expected = -(0.3 * weight[:, None] * (jacobian[:, 0] - jacobian[:, 1])).mean(0)
    assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_an_extra_sum_is_a_row_of_one_table(batch, monkeypatch):
    """Squares of log-probs, for the reference too: response_sums makes them, objectives find both."""
    extra = ExtraSum(lambda scored: scored.log_probs**2, policy="policy_head", reference="reference_head")
    monkeypatch.setitem(EXTRA_SUMS, "squares", extra)
    needs = Objective(lambda scores: scores.policy[:, 0], needs=frozenset({"squares"})).reference_sums
    model = SimpleNamespace(
        hidden=lambda tokens, *_: jax.random.normal(jax.random.key(0), (*tokens.shape, 4)),
        output_embedding=jax.random.normal(jax.random.key(1), (VOCAB, 4)),
        config=SimpleNamespace(logit_softcap=None),
        partition=ONE_DEVICE,
        rounds="neither",
    )
    sums = response_sums(model, batch, chunk=32, needs=needs)
    lengths = np.maximum(batch.lengths, 1)
    assert np.all(sums["squares"] * lengths >= sums["logps"] ** 2 - 1e-3)  # Cauchy and Schwarz
    scores = make_scores(sums, sums, batch)
    assert_array_equal(scores.policy_head, sums["squares"])
    assert_array_equal(scores.reference_head, sums["squares"])


def test_rows_that_do_not_split_evenly_are_refused(batch):
    with pytest.raises(ValueError, match="8 rows can't be split into 3 equal micro-batches"):
        run(make_objective({"name": "dpo"}), batch, 3)


def test_one_step_of_descent_lowers_the_loss(batch):
    objective = make_objective({"name": "dpo"})
    params = jnp.zeros(VOCAB)
    reference = sum_rows(params, batch)

    def step(params):
        return loss_and_gradient(
            params, batch, reference, sum_rows=sum_rows, objective=objective, micro_batches=2
        )

    loss, _, gradient, _ = step(params)
    assert_allclose(loss, np.log(2), rtol=1e-6)
    assert step(optax.apply_updates(params, -0.5 * gradient))[0] < loss


class Unigram(nnx.Module):
    """The policy of these tests as a module."""

    def __init__(self):
        self.logits = nnx.Param(jax.random.normal(jax.random.key(1), (VOCAB,)))


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(batch, monkeypatch, bad, micro_batches):
    """Decided inside the compiled step: nothing in it calls the host."""
    monkeypatch.setattr(
        step_module,
        "response_sums",
        lambda model, rows, *, chunk, needs: sum_rows(model.logits[...], rows),
    )
    graphdef, params, frozen = nnx.split(Unigram(), nnx.Param, ...)
    optimizer = optax.adam(0.1)
    train_step = make_train_step(
        graphdef,
        make_objective({"name": "dpo"}),
        optimizer=optimizer,
        beta=0.1,
        micro_batches=micro_batches,
        chunk=8,
    )
    whole = sum_rows(jnp.zeros(VOCAB), batch)
    broken = {"logps": whole["logps"].at[2, 0].set(bad)}
    assert "callback" not in train_step.lower(init_state(params, optimizer), frozen, batch, whole).as_text()
    state, metrics = train_step(init_state(params, optimizer), frozen, batch, whole)
    assert metrics["skipped"] == 0
    before = [np.array(leaf) for leaf in jax.tree.leaves(state._replace(step=0))]
    state, metrics = train_step(state, frozen, batch, broken)
    assert metrics["skipped"] == 1
    assert int(state.step) == 2
    for leaf, old in zip(jax.tree.leaves(state._replace(step=0)), before, strict=True):
        assert_array_equal(leaf, old)
    kept = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    state, metrics = train_step(state, frozen, batch, whole)
    assert metrics["skipped"] == 0
    for leaf, old in zip(jax.tree.leaves(state.params), kept, strict=True):
        assert (np.array(leaf) != old).any()
