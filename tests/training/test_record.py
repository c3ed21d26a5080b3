import jax.numpy as jnp
import numpy as np

from dpo.data.loader import evaluation_loader
from dpo.data.preferences import ReadSummary
from dpo.data.tokenized import make_dataset
from dpo.training.reading import Dataset
from dpo.training.record import StepClock


def test_the_learning_rate_is_the_one_that_was_used():
    """A skipped step does not move the schedule on, in an earlier part of the run neither."""
    tokens = make_dataset([[1], [2]], [[[3]], [[4]]])
    batch = evaluation_loader(tokens, batch_size=2).batch(0)
    clock = StepClock(
        Dataset(ReadSummary(2, {}, [], {}, {}), tokens, [], ""),
        10.0 - np.arange(6),
        2,
        fill=lambda step: 1.0,
        skipped=1,
    )
    rates = [
        clock.finish(step, batch, {"skipped": jnp.asarray(skipped)})["learning_rate"]
        for step, skipped in ((3, 0.0), (4, 1.0), (5, 0.0))
    ]
    assert rates == [8.0, 7.0, 7.0]
