"""What a mixture has of each source: so many rows, drawn by the seed and by what the source says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.mixing import Share, Source, count_rows, draw, mix
from dpo.data.tokenized import make_dataset

CONTENT = "0123456789abcdef" * 4


def share(rows=None, weight=None, seed=0, name="a"):
    return Share(f"data.train[{name}]", name, rows, weight, seed)


def source(count, *, rows=None, weight=None, seed=0, content=CONTENT, first=100, name="a"):
    """A data set whose prompt i is the token first + i, read from as many preferences."""
    prompts = [[first + i] for i in range(count)]
    responses = [[[1] * (1 + i % 3), [2]] for i in range(count)]
    return Source(share(rows, weight, seed, name), make_dataset(prompts, responses), count, content)


def tokens_of(dataset):
    return [int(dataset.prompt(row)[0]) for row in range(len(dataset))]


def test_three_to_one_is_three_to_one_with_no_row_twice():
    dataset, drawn = mix(
        [
            source(90, weight=3.0, name="a"),
            *[source(60, weight=1.0, first=1000 * k, name=f"{k}") for k in range(1, 5)],
        ]
    )
    assert [one.drawn for one in drawn] == [90, 30, 30, 30, 30]
    assert dataset.dropped == {"not_drawn": 120}
    found = tokens_of(dataset)
    assert len(found) == len(set(found)) == 210
    assert [sum(1000 * k <= token < 1000 * k + 60 for token in found) for k in range(1, 5)] == [30] * 4


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 10.0)), min_size=1, max_size=6),
)
def test_weights_are_proportions_as_large_as_the_rows_allow(sources):
    shares = [share(weight=weight) for _, weight in sources]
    counts = count_rows(shares, [count for count, _ in sources])
    unit = min(count / weight for count, weight in sources)
    for (kept, weight), count in zip(sources, counts, strict=True):
        assert 1 <= count <= kept
        assert abs(count - unit * weight) <= 1
    assert any(count == kept for (kept, _), count in zip(sources, counts, strict=True))


def test_rows_and_nothing_stand_beside_weights():
    shares = [share(rows=7), share(), share(weight=2.0), share(weight=1.0)]
    assert count_rows(shares, [10, 11, 40, 30]) == [7, 11, 40, 20]


def test_more_rows_than_there_are_are_refused_by_name():
    with pytest.raises(ValueError, match=r"data\.train\[b\]\.rows is 12, and 10 rows of b can be trained on"):
        mix([source(10), source(10, rows=12, name="b")])


def test_a_draw_is_the_seeds_and_the_contents_alone():
    drawn = draw(source(100, seed=1), 30)
    assert drawn.sum() == 30
    assert (drawn == draw(source(100, seed=1, first=5, name="elsewhere"), 30)).all()
    assert (drawn != draw(source(100, seed=2), 30)).any()
    assert (drawn != draw(source(100, seed=1, content=CONTENT[::-1]), 30)).any()
    assert not (draw(source(100, seed=1), 20) & ~drawn).any(), "fewer rows are some of the same"


def test_rows_that_are_left_out_change_nothing_else_of_a_draw():
    whole = source(100, seed=4)
    kept = np.arange(100) % 10 != 3
    tokens = dataclasses.replace(
        make_dataset([[i] for i in np.flatnonzero(kept).tolist()], [[[1], [2]]] * int(kept.sum())),
        origin=np.flatnonzero(kept),
    )
    fewer = whole._replace(tokens=tokens)
    before = set(np.flatnonzero(draw(whole, 40)))
    after = set(tokens.origin[draw(fewer, 40)])
    assert {row for row in before if kept[row]} <= after


def test_all_of_one_source_is_the_source():
    alone = source(20)
    dataset, _ = mix([alone])
    for name in ("prompt_tokens", "prompt_offsets", "response_tokens", "response_offsets", "row_offsets"):
        assert (getattr(dataset, name) == getattr(alone.tokens, name)).all()
    assert (dataset.origin == alone.tokens.origin).all()


def test_origin_counts_in_the_preferences_of_all():
    dataset, _ = mix([source(10, rows=4), source(5, first=500, name="b")])
    assert dataset.origin[-5:].tolist() == [10, 11, 12, 13, 14]
    assert (dataset.origin[:4] < 10).all()
    assert tokens_of(dataset)[:4] == [100 + i for i in dataset.origin[:4]]


def test_scored_positions_come_along_from_sources_that_have_them():
    responses = [[[1, 2, 3], [4]], [[5], [6, 7]]]
    flags = [[[True, False, True], [True]], None]
    marked = Source(share(), make_dataset([[8], [9]], responses, scored=flags), 2, CONTENT)
    dataset, _ = mix([source(2, name="b"), marked])
    assert [list(map(bool, one)) for one in dataset.scored_of(2)] == [[True, False, True], [True]]
    assert all(one.all() for row in (0, 1, 3) for one in dataset.scored_of(row))
