"""The held-out loss: the objective's mean over held-out rows, where it has one."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from dpo.data.loader import evaluation_loader
from dpo.data.preferences import ReadSummary
from dpo.data.tokenized import make_dataset
from dpo.losses import make_objective
from dpo.training.reading import Dataset
from dpo.training.reference import ReferenceStore
from dpo.training.validation import Validation, make_mean_loss, why_no_loss

NUM_ROWS = 5
RANDOM = np.random.default_rng(0)
REFERENCE, POLICY = -10 * RANDOM.random((2, NUM_ROWS, 2)).astype(np.float32)


def dataset(num_responses=2, *, scores=None, ranks=None):
    responses = [[[1, 2], [3]][:num_responses] for _ in range(NUM_ROWS)]
    tokens = make_dataset([[1]] * NUM_ROWS, responses, scores=scores, ranks=ranks)
    return Dataset(
        ReadSummary(NUM_ROWS, {}, [], {}, {}),
        tokens,
        [f"eval.jsonl:{row + 1}" for row in range(NUM_ROWS)],
        "",
    )


def loss(spec, policy, *, shift=None, ranks=None):
    """Of rows scored in batches of four: the last one has three padding prompts, which score 1000 nats."""
    rows = dataset(ranks=ranks)

    def score(batch):
        index = np.asarray(batch.index)
        return {"logps": np.where(index[:, None] < 0, 1000, policy[index]).astype(np.float32)}

    validation = Validation(
        rows,
        evaluation_loader(rows.tokens, batch_size=4),
        ReferenceStore({"logps": REFERENCE}),
        make_mean_loss(make_objective(spec), rows),
        "",
    )
    return validation.evaluate(score, 0.1, shift=shift)[1]["loss"]


def test_it_is_log_2_while_the_policy_is_the_reference():
    assert_allclose(loss({"name": "dpo"}, REFERENCE), np.log(2), rtol=1e-6)


def test_it_is_the_mean_of_the_formula_and_padding_weighs_nothing():
    ratio = POLICY - REFERENCE
    delta = 0.3 * (ratio[:, 0] - ratio[:, 1])
    assert_allclose(loss({"name": "dpo", "beta": 0.3}, POLICY), np.log1p(np.exp(-delta)).mean(), rtol=1e-5)


def test_a_row_without_a_pair_does_not_count():
    ranks = [[0, 0], *[[0, 1]] * (NUM_ROWS - 1)]
    assert_allclose(loss({"name": "dpo"}, REFERENCE, ranks=ranks), np.log(2), rtol=1e-6)


def test_statistics_of_the_batch_are_of_all_rows():
    """sft: minus the chosen responses' log-probs over all their tokens, two each."""
    assert_allclose(loss({"name": "sft"}, POLICY), -POLICY[:, 0].sum() / (2 * NUM_ROWS), rtol=1e-6)


def test_the_running_mean_is_the_one_that_training_has_come_to():
    logit = 0.1 * (POLICY - REFERENCE - 3.0)
    losses = np.log1p(np.exp(np.stack([-logit[:, 0], logit[:, 1]])))
    assert_allclose(loss({"name": "bco"}, POLICY, shift=jnp.asarray(3.0)), losses.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "num_responses", "scores", "reason"),
    [
        ("kto", 2, None, "kto needs another prompt's response beside each"),
        ("odpo", 2, [[1.0, 0.0]] * 3 + [None] * 2, r"odpo needs scores; eval.jsonl:4 has none"),
        ("dpo", 1, None, "dpo compares responses, and every prompt has one"),
    ],
)
def test_where_data_lack_what_it_needs_there_is_none(name, num_responses, scores, reason):
    lacking = why_no_loss(make_objective({"name": name}), dataset(num_responses, scores=scores))
    assert lacking is not None
    assert reason in lacking


@pytest.mark.parametrize(("name", "num_responses"), [("dpo", 2), ("odpo", 2), ("bco", 1), ("sft", 1)])
def test_otherwise_there_is_one(name, num_responses):
    scores = [[1.0, 0.0][:num_responses]] * NUM_ROWS
    rows = dataset(num_responses, scores=scores)
    assert why_no_loss(make_objective({"name": name}), rows) is None
