from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.packing import lay_out
from dpo.data.shapes import Step, choose_sizes, plan_shapes


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.floats(0, 20))
def test_sizes_are_the_cheapest_of_all_choices(needed, max_sizes, cost_of_one):
    def cost(sizes):
        return sum(min(size for size in sizes if size >= n) for n in needed) + cost_of_one * len(sizes)

    values = sorted(set(needed))
    choices = [
        {*choice, values[-1]}
        for count in range(max_sizes)
        for choice in combinations_with_replacement(values, count)
    ]
    sizes = choose_sizes(np.array(needed), max_sizes=max_sizes, cost_of_one=cost_of_one)
    assert sizes == sorted(sizes)
    assert len(sizes) <= max_sizes
    assert cost(sizes) == pytest.approx(min(map(cost, choices)))


def random_steps(num_steps=40, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Step(rng.integers(20, 300, 8).tolist(), [rng.integers(5, 120, 2).tolist() for _ in range(8)])
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(("micro_batches", "rows_multiple"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_shapes_are_few_and_hold_every_step(layout, micro_batches, rows_multiple):
    plan = plan_shapes(
        random_steps(), layout=layout, micro_batches=micro_batches, rows_multiple=rows_multiple, max_shapes=3
    )
    assert 1 <= len(plan.shapes) <= 3
    assert len({shape[1:] for shape in plan.shapes}) == 1
    assert all(shape.rows % (micro_batches * rows_multiple) == 0 for shape in plan.shapes)
    assert all(shape.row_length % 128 == 0 for shape in plan.shapes)
    assert all(plan.shapes[plan.shape_of_step[s]].rows >= plan.rows[s] for s in range(40))


def test_sharing_needs_fewest_tokens_and_padding_most_rows():
    plans = {layout: plan_shapes(random_steps(), layout=layout) for layout in ("padded", "packed", "shared")}
    assert plans["shared"].tokens.sum() < plans["packed"].tokens.sum() == plans["padded"].tokens.sum()
    area = {name: (plan.rows * plan.shapes[0].row_length).sum() for name, plan in plans.items()}
    assert area["shared"] < area["packed"] < area["padded"]


def test_a_given_row_length_is_kept_or_refused():
    steps = [Step([30], [[10, 20]])]
    assert plan_shapes(steps, layout="shared", row_length=53).shapes[0].row_length == 53
    with pytest.raises(ValueError, match=r"data\.row_length is 40; allowed is at least 50"):
        plan_shapes(steps, layout="shared", row_length=40)


def test_another_shape_must_pay_for_its_compilation():
    alike = [Step([100] * 8, [[20, 20]] * 8)] * 30
    assert len(plan_shapes(alike, layout="shared").shapes) == 1
    odd_one = [*alike, Step([100] * 8, [[100, 100]] * 8)]
    assert len(plan_shapes(odd_one[-3:], layout="shared").shapes) == 1
    assert len(plan_shapes(odd_one, layout="shared", row_length=384).shapes) == 2
    assert len(plan_shapes(odd_one, layout="shared", row_length=384, steps_per_compilation=100.0).shapes) == 1
    assert len(plan_shapes(odd_one, layout="shared", long_rows=True).shapes) == 2
    assert len(plan_shapes(odd_one, layout="shared", long_rows=True, steps_per_compilation=100.0).shapes) == 1


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_long_row_holds_a_whole_micro_batch(layout, micro_batches):
    steps = random_steps()
    plan = plan_shapes(steps, layout=layout, micro_batches=micro_batches, max_shapes=3, long_rows=True)
    assert 1 <= len(plan.shapes) <= 3
    for step, which in zip(steps, plan.shape_of_step, strict=True):
        shape = plan.shapes[which]
        assert shape.rows == micro_batches
        sizes = {"row_length": shape.row_length, "scored": shape.scored, "layout": layout}
        parts = lay_out(step.prompts, step.responses, **sizes, micro_batches=micro_batches)
        assert all(len(rows) == 1 for rows in parts)


def test_long_rows_leave_less_padding():
    steps = random_steps()
    positions = []
    for long_rows in (False, True):
        plan = plan_shapes(steps, layout="shared", long_rows=long_rows)
        positions.append(sum(plan.shapes[i].rows * plan.shapes[i].row_length for i in plan.shape_of_step))
    assert positions[1] < positions[0]
    assert plan.tokens.sum() <= positions[1]


@pytest.mark.parametrize("fixed", [{"layout": "padded"}, {"row_length": 512}, {"rows_multiple": 2}], ids=str)
def test_rows_stay_short_where_they_must(fixed):
    settings = {"layout": "shared", **fixed}
    assert (
        plan_shapes(random_steps(), **settings, long_rows=True).shapes
        == plan_shapes(random_steps(), **settings).shapes
    )
