"""Every layout describes the same computation: who sees what is read off the arrays."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_rows import LAYOUTS, random_dataset, shapes

from dpo.data.batch import ROW_FIELDS, Batch
from dpo.data.loader import evaluation_loader, training_loader
from dpo.data.packing import Shape, facts, lay_out, pack

layouts = st.sampled_from(LAYOUTS)


def read_scored(batch):
    """{owner: [(context, target), …]}: what each scored token's source sees, in order of positions.

    Visible is what the legend in `dpo.data.batch` says; that the model's mask is this is tested with a model.
    """
    scored = {}
    slot = np.arange(batch.tokens.shape[1])
    for r, n in np.argwhere(batch.owner < batch.present.size):
        source, group, branch = batch.source[r, n], batch.group[r], batch.branch[r]
        own = (group == group[source]) & (group != 0) & np.isin(branch, [0, branch[source]])
        seen = np.flatnonzero(own & (slot <= source))
        order = seen[np.argsort(batch.positions[r, seen], kind="stable")]
        assert batch.positions[r, order].tolist() == list(range(len(order)))
        context = batch.tokens[r, order].tolist()
        scored.setdefault(int(batch.owner[r, n]), []).append((context, int(batch.target[r, n])))
    return scored


def expected_scored(dataset, batch):
    """The same, from the plain sequences: every response token after its prompt and its predecessors."""
    scored = {}
    for p, row in enumerate(batch.index):
        if row < 0:
            continue
        for k, response in enumerate(dataset.responses(row)):
            whole = [*dataset.prompt(row).tolist(), *response.tolist()]
            start = len(whole) - len(response)
            owner = p * batch.present.shape[1] + k
            scored[owner] = [(whole[:t], whole[t]) for t in range(start, len(whole))]
    return scored


@given(shapes, layouts, st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(16, 40))
def test_every_scored_token_sees_exactly_its_prompt_and_its_own_past(
    shapes, layout, batch_size, micro_batches, row_length
):
    dataset = random_dataset(shapes)
    loader = training_loader(
        dataset,
        batch_size=batch_size,
        num_steps=3,
        layout=layout,
        micro_batches=micro_batches,
        row_length=row_length,
    )
    for step in range(3):
        batch = loader.batch(step)
        assert read_scored(batch) == expected_scored(dataset, batch)


@given(shapes, layouts, st.integers(1, 4), st.integers(1, 3))
def test_facts_of_responses_do_not_depend_on_the_layout(shapes, layout, batch_size, micro_batches):
    dataset = random_dataset(shapes)
    loader = training_loader(
        dataset, batch_size=batch_size, num_steps=2, layout=layout, micro_batches=micro_batches
    )
    K = dataset.max_responses
    for step in range(2):
        batch = loader.batch(step)
        assert batch.index.tolist() == loader.indices(step).tolist()
        assert batch.tokens.shape == loader.shape(step)[:2]
        for p, row in enumerate(batch.index):
            count = dataset.num_responses[row]
            assert batch.present[p].tolist() == [k < count for k in range(K)]
            assert batch.lengths[p].tolist() == dataset.response_lengths[row].tolist()
            assert batch.ranks[p].tolist() == [*range(count), *[K] * (K - count)]
            assert np.all(np.diff(batch.ranks[p]) >= 0)
            owners = p * K + np.arange(int(count))
            rows = [np.unique(np.argwhere(batch.owner == owner)[:, 0]).tolist() for owner in owners]
            assert rows == [[r] for r in batch.row[p, :count]]
            assert np.all(batch.row[p, count:] == batch.row[p, 0])


@given(shapes, st.integers(1, 4))
def test_facts_of_all_prompts_are_those_of_their_batches(shapes, batch_size):
    dataset = random_dataset(shapes)
    known, loader = facts(dataset), evaluation_loader(dataset, batch_size=batch_size)
    assert known.index.tolist() == list(range(len(dataset)))
    assert {getattr(known, name).shape for name in ROW_FIELDS} == {(0, 0)}
    for step in range(loader.num_steps):
        batch = loader.batch(step)
        real = batch.index >= 0
        for name in ("present", "lengths", "ranks", "scores"):
            np.testing.assert_array_equal(getattr(known, name)[batch.index[real]], getattr(batch, name)[real])


@given(shapes, layouts, st.integers(1, 5), st.integers(1, 3))
def test_a_prompts_responses_lie_in_one_micro_batch(shapes, layout, batch_size, micro_batches):
    dataset = random_dataset(shapes)
    loader = training_loader(
        dataset, batch_size=batch_size, num_steps=2, layout=layout, micro_batches=micro_batches
    )
    for step in range(2):
        batch = loader.batch(step)
        rows_a_part, remainder = divmod(batch.tokens.shape[0], micro_batches)
        assert remainder == 0
        assert all(len(set(row // rows_a_part)) == 1 for row in batch.row)


@given(shapes, layouts)
def test_a_shared_group_holds_its_prompt_once_if_it_fits(shapes, layout):
    dataset = random_dataset(shapes)
    loader = evaluation_loader(dataset, batch_size=4, layout=layout)
    batch = loader.batch(0)
    num_groups = sum(len(set(row[row > 0])) for row in batch.group)
    rows = batch.index[batch.index >= 0]
    unshared = int(dataset.num_responses[rows].sum())
    assert num_groups == unshared if layout != "shared" else num_groups <= unshared
    if layout == "padded":
        assert all(set(row) <= {0, 1} for row in batch.group)


def test_the_picture_of_the_batch_module():
    """Prompts p p p and q q with responses a a b b and c c d, then padding."""
    dataset = random_dataset([(3, [3, 2]), (2, [2, 1])])
    shape = Shape(1, 14, 9)
    batch = pack(dataset, np.array([0, 1]), shape=shape, layout="shared", num_responses=2)
    assert batch.group.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3, 2, 0]]
    assert batch.source.tolist() == [[2, 3, 4, 2, 6, 9, 10, 9, 0]]
    assert batch.owner.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 4]]


def test_a_group_longer_than_a_row_is_laid_out_in_pieces_that_repeat_the_prompt():
    (rows,) = lay_out([4], [[5, 5, 5]], row_length=14, scored=14, layout="shared")
    assert [piece.responses for row in rows for piece in row] == [(0, 1), (2,)]
    assert [piece.length for row in rows for piece in row] == [14, 9]


def test_rows_are_filled_best_fit_decreasing_under_both_limits():
    (rows,) = lay_out([1, 1, 1, 1], [[5], [3], [2], [1]], row_length=10, scored=6, layout="packed")
    assert [[piece.prompt for piece in row] for row in rows] == [[0], [1, 2, 3]]


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30),
    st.sampled_from(["packed", "shared"]),
)
def test_no_row_overflows_and_no_two_rows_could_be_one(shapes, layout):
    prompts, responses = [p for p, _ in shapes], [[r] for _, r in shapes]
    (rows,) = lay_out(prompts, responses, row_length=64, scored=30, layout=layout)
    filled = [(sum(piece.length for piece in row), sum(piece.scored for piece in row)) for row in rows]
    assert all(length <= 64 and scored <= 30 for length, scored in filled)
    assert sorted(piece.prompt for row in rows for piece in row) == list(range(len(shapes)))
    both = [
        filled[i][0] + filled[j][0] <= 64 and filled[i][1] + filled[j][1] <= 30
        for i in range(len(rows))
        for j in range(i)
    ]
    assert not any(both)


def test_rows_that_one_part_alone_lacks_are_an_error():
    """Three responses on rows of their own in the one, one response in the other."""
    dataset = random_dataset([(3, [3, 2, 2]), (3, [3])])
    with pytest.raises(ValueError, match="6 rows are needed in 2 equal parts; the shape has 4"):
        pack(
            dataset,
            np.arange(2),
            shape=Shape(4, 8, 4),
            layout="padded",
            num_responses=3,
            micro_batches=2,
        )


def test_what_fits_to_the_last_token_is_laid_out_and_no_more():
    lengths: Any = {"row_length": 14, "scored": 5, "layout": "shared"}
    assert len(lay_out([9], [[5]], **lengths)[0]) == 1
    assert len(lay_out([9], [[3, 2]], **lengths)[0]) == 1
    assert len(lay_out([9], [[3, 3]], **lengths)[0]) == 2, "one token too many"
    assert len(lay_out([3, 3], [[4], [4]], **(lengths | {"scored": 8}))[0]) == 1
    assert len(lay_out([3, 3], [[4], [4]], **(lengths | {"scored": 7}))[0]) == 2, "one scored too many"
    for wrong in ({"row_length": 13}, {"scored": 4}):
        with pytest.raises(ValueError, match="do not fit"):
            lay_out([9], [[5]], **(lengths | wrong))


def test_a_row_has_room_for_its_tokens_where_scored_ones_leave_some():
    lengths: Any = {"row_length": 14, "scored": 30, "layout": "shared"}
    assert len(lay_out([9], [[3, 2]], **lengths)[0]) == 1
    assert len(lay_out([9], [[3, 3]], **lengths)[0]) == 2


def test_the_longest_prompts_go_to_the_emptiest_micro_batches_first():
    parts = lay_out([1] * 3, [[2], [3], [5]], row_length=9, scored=9, layout="padded", micro_batches=2)
    assert [sorted(piece.prompt for row in part for piece in row) for part in parts] == [[2], [0, 1]]


def test_a_prompt_without_responses_is_as_long_as_a_row_at_most():
    assert lay_out([14], [[]], row_length=14, scored=0, layout="shared") == [[]]
    with pytest.raises(ValueError, match="a prompt of 15 and a response of 0 tokens do not fit"):
        lay_out([15], [[]], row_length=14, scored=0, layout="shared")


def test_every_response_has_to_fit():
    rooms: list[Any] = [{"row_length": 14, "scored": 9}, {"row_length": 30, "scored": 5}]
    for room in rooms:
        with pytest.raises(ValueError, match="a prompt of 9 and a response of 6 tokens do not fit"):
            lay_out([9], [[1, 6, 2]], layout="packed", **room)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="a prompt of 9 and a response of 5 tokens do not fit"):
        lay_out([9], [[5]], row_length=13, scored=13, layout="shared")
    dataset = random_dataset([(3, [3, 2])] * 4)
    with pytest.raises(ValueError, match="4 rows are needed in 1 equal parts; the shape has 3"):
        pack(dataset, np.arange(4), shape=Shape(3, 8, 8), layout="shared", num_responses=2)


def test_padding_prompts_take_no_room():
    dataset = random_dataset([(3, [3, 2])])
    batch = pack(dataset, np.array([0, -1]), shape=Shape(1, 8, 5), layout="shared", num_responses=2)
    assert batch.index.tolist() == [0, -1]
    assert batch.present.tolist() == [[True, True], [False, False]]
    assert batch.lengths.tolist() == [[3, 2], [0, 0]]
    assert (batch.owner < 2).sum() == 5


@given(shapes, layouts, st.integers(1, 3), st.data())
def test_rows_that_are_filled_apart_are_those_of_the_whole_batch(shapes, layout, micro_batches, data):
    loader = training_loader(
        random_dataset(shapes), batch_size=3, num_steps=2, layout=layout, micro_batches=micro_batches
    )
    for step in range(2):
        whole, rows = loader.batch(step), loader.shape(step).rows
        assert loader.fill(step) == (np.asarray(whole.group) > 0).mean()
        mine = data.draw(st.sets(st.integers(0, rows - 1)))
        own, others = (
            pack(
                loader.dataset,
                loader.indices(step),
                shape=loader.shape(step),
                layout=layout,
                num_responses=loader.dataset.max_responses,
                micro_batches=micro_batches,
                own_rows=held,
            )
            for held in (mine, set(range(rows)) - mine)
        )
        here = np.isin(np.arange(rows), list(mine))[:, None]
        for name in Batch._fields:
            first, second, expected = (getattr(batch, name) for batch in (own, others, whole))
            joined = np.where(here, first, second) if name in ROW_FIELDS else first
            np.testing.assert_array_equal(joined, expected, err_msg=name)


@given(shapes, st.integers(0, 9))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_scored_tokens_are_targets_and_the_others_are_read(layout, shapes, seed):
    whole = random_dataset(shapes)
    rng = np.random.default_rng(seed)
    flags = rng.random(len(whole.response_tokens)) < 0.5
    flags[whole.response_offsets[1:] - 1] = True
    dataset = dataclasses.replace(whole, scored=flags)
    loader = evaluation_loader(dataset, batch_size=len(dataset), layout=layout)
    batch, plain = loader.batch(0), evaluation_loader(whole, batch_size=len(whole), layout=layout).batch(0)
    assert sorted(batch.tokens[batch.group > 0]) == sorted(plain.tokens[plain.group > 0])
    K = dataset.max_responses
    np.testing.assert_array_equal(batch.lengths, dataset.scored_lengths)
    for row in range(len(dataset)):
        for k, (response, mine) in enumerate(
            zip(dataset.responses(row), dataset.scored_of(row), strict=True)
        ):
            r, n = np.nonzero(batch.owner == row * K + k)
            assert batch.target[r, n].tolist() == response[mine].tolist()
            context = np.concatenate([dataset.prompt(row)[-1:], response])[:-1]
            assert batch.tokens[r, batch.source[r, n]].tolist() == context[mine].tolist()
