import json
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_rows import LAYOUTS, random_dataset, shapes

from dpo.data.loader import evaluation_loader, training_loader

ROWS = random_dataset([(n % 7 + 1, [n % 5 + 1, n % 3 + 1]) for n in range(10)])


def make(**settings: Any):
    settings = {"batch_size": 4, "num_steps": 10, **settings}
    return training_loader(ROWS, **settings)


def assert_same_batch(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@given(shapes, st.integers(1, 7), st.integers(0, 2**40), st.booleans())
def test_nothing_is_lost_or_doubled_in_any_epoch(shapes, batch_size, seed, shuffle):
    dataset = random_dataset(shapes)
    n = len(dataset)
    num_steps = -(-3 * n // batch_size)
    loader = training_loader(dataset, batch_size=batch_size, num_steps=num_steps, seed=seed, shuffle=shuffle)
    stream = np.concatenate([loader.batch(step).index for step in range(num_steps)])
    assert len(stream) == num_steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_a_function_of_seed_and_step(layout):
    loader, again = make(seed=3, layout=layout), make(seed=3, layout=layout)
    forwards = [loader.batch(step) for step in range(10)]
    for step in reversed(range(10)):
        assert_same_batch(again.batch(step), forwards[step])


def test_the_order_is_that_of_the_seed_and_changes_with_the_epoch():
    def stream(loader):
        return np.concatenate([loader.indices(step) for step in range(10)])

    order = stream(make(seed=3))
    assert order.tolist() == stream(make(seed=3, layout="padded", micro_batches=2)).tolist()
    assert order.tolist() != stream(make(seed=4)).tolist()
    assert order[:10].tolist() != order[10:20].tolist()
    assert stream(make(shuffle=False)).tolist() == [*range(10)] * 4


def test_epochs_of_neighbouring_seeds_are_independent():
    """Runs that repeat a setting under seeds 0, 1, 2 are to see 0's second epoch nowhere again."""
    epochs = [
        tuple(np.concatenate([loader.indices(step) for step in range(epoch * 5, epoch * 5 + 5)]).tolist())
        for loader in (make(seed=seed, batch_size=2, num_steps=20) for seed in range(4))
        for epoch in range(4)
    ]
    assert len(set(epochs)) == 16


def test_a_longer_run_begins_with_the_same_prompts():
    short, long = make(num_steps=4), make(num_steps=40)
    assert all(short.indices(step).tolist() == long.indices(step).tolist() for step in range(4))


def test_the_prefetching_iterator_starts_anywhere():
    loader = make()
    for start, stop in [(0, None), (3, 7), (9, None), (4, 4)]:
        batches = list(loader.batches(start, stop))
        assert len(batches) == (stop or 10) - start
        for step, batch in enumerate(batches, start):
            assert_same_batch(batch, loader.batch(step))


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_an_error(step):
    with pytest.raises(IndexError, match="allowed are 0 to 9"):
        make().batch(step)


@given(shapes, st.integers(1, 4), st.sampled_from(LAYOUTS))
def test_evaluation_has_every_row_once_in_order_and_pads_with_minus_one(shapes, batch_size, layout):
    dataset = random_dataset(shapes)
    loader = evaluation_loader(dataset, batch_size=batch_size, layout=layout)
    batches = list(loader.batches())
    index = np.concatenate([batch.index for batch in batches])
    assert all(len(batch.index) == batch_size for batch in batches)
    assert index[: len(dataset)].tolist() == list(range(len(dataset)))
    assert set(index[len(dataset) :]) <= {-1}
    assert len(index) - len(dataset) < batch_size
    assert not np.concatenate([batch.present for batch in batches])[len(dataset) :].any()


def test_the_report_counts_what_the_batches_hold():
    loader = make(row_length=24)
    report = loader.report()
    batches = list(loader.batches())
    tokens = sum(int((batch.group > 0).sum()) for batch in batches)
    positions = sum(batch.tokens.size for batch in batches)
    assert report["tokens"] == tokens
    assert report["positions"] == positions
    assert report["fill"] == pytest.approx(tokens / positions)
    scored = [batch.owner < batch.present.size for batch in batches]
    assert report["scored_fill"] == pytest.approx(sum(s.sum() for s in scored) / sum(s.size for s in scored))
    assert {tuple(shape.values())[:3] for shape in report["shapes"]} == set(loader.shapes)
    assert sum(shape["steps"] for shape in report["shapes"]) == 10
    assert report["saving_versus_unshared"] > 1
    assert make(layout="packed").report()["saving_versus_unshared"] == 1
    assert json.loads(json.dumps(report)) == report
