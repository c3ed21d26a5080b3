"""In bfloat16 a run starts at log-ratio zero exactly: reference and step round at the same places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal
from tiny_model import byte_tokenizer, tiny_config

from dpo.config import TrainingConfig
from dpo.data.loader import training_loader
from dpo.data.tokenized import make_dataset
from dpo.huggingface.text_models import read_config
from dpo.losses import make_objective
from dpo.models.decoder import Decoder
from dpo.training.datasets import as_trained
from dpo.training.step import loss_and_gradient, make_eval_step, response_sums

TRAINING = TrainingConfig(batch_size=4, micro_batches=2)
OFTEN = {("full", 1), ("none", 2)}
"""What CI compares of saved values and parts of a batch."""


def dataset(num_rows: int = 10):
    rng = np.random.default_rng(0)

    def some(low: int, high: int) -> list[int]:
        return rng.integers(1, 200, rng.integers(low, high)).tolist()

    return make_dataset(
        [some(3, 30) for _ in range(num_rows)], [[some(2, 12), some(2, 12)] for _ in range(num_rows)]
    )


def loader(num_steps: int = 5, num_rows: int = 10):
    return training_loader(dataset(num_rows), batch_size=4, num_steps=num_steps, micro_batches=2)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_every_row_is_scored_in_the_batch_that_trains_it_first(num_steps):
    """Ten rows, four a step: the third step is half of the second epoch; a short run scores what it reads."""
    steps, rows = loader(num_steps), dataset()
    scoring = as_trained(TRAINING, rows, steps)
    batches = list(scoring.make_batches())
    trained = min(num_steps, 3)
    for step in range(trained):
        jax.tree.map(assert_array_equal, batches[step], steps.batch(step))
    indices = [np.asarray(batch.index) for batch in batches]
    assert sorted(set(np.concatenate(indices).tolist()) - {-1}) == steps.rows_read().tolist()
    assert (len(batches), scoring.num_rows) == ((3, 10) if num_steps == 5 else (1, 4))
    others = as_trained(TRAINING, rows, loader(2))
    assert others.identity != scoring.identity


@pytest.mark.parametrize(
    ("remat", "micro_batches"),
    [
        pytest.param(
            remat, parts, marks=pytest.mark.as_users if (remat, parts) in OFTEN else pytest.mark.slow
        )
        for remat in ("full", "dots", "none")
        for parts in (1, 2)
    ],
)
def test_the_reference_and_the_step_have_the_same_bits(remat, micro_batches):
    _, config = read_config(tiny_config(byte_tokenizer()))
    model = Decoder(config, rngs=nnx.Rngs(0), compute_dtype=jnp.dtype("bfloat16"), remat=remat)
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    params, frozen = nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)
    batch = jax.tree.map(jnp.asarray, loader().batch(0))
    score = make_eval_step(graphdef, chunk=64, micro_batches=micro_batches)
    reference = jax.tree.map(np.asarray, score(params, frozen, batch))

    @jax.jit
    def step(params, reference):
        def sum_rows(params, rows):
            return response_sums(nnx.merge(graphdef, params, frozen), rows, chunk=64)

        return loss_and_gradient(
            params,
            batch,
            reference,
            sum_rows=sum_rows,
            objective=make_objective({"name": "dpo"}),
            micro_batches=micro_batches,
        )

    loss, policy, _, _ = step(params, reference)
    assert_array_equal(policy["logps"], reference["logps"])
    assert abs(float(loss) - np.log(2)) < 1e-6
