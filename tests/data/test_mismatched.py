import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dpo.data.mismatched import add_mismatched
from dpo.data.tokenized import TokenizedDataset, make_dataset
from dpo.losses.scores import MISMATCHED


def other_responses(data: TokenizedDataset, seed: int = 0) -> list[list[int]]:
    added = add_mismatched(data, seed=seed)
    return [added.responses(row)[-1].tolist() for row in range(len(data))]


def test_each_row_gets_one_more_response_and_keeps_its_own():
    data = make_dataset(
        [[1], [2]], [[[10], [11]], [[20, 21]]], ranks=[[0, 1], [0]], scores=[[3.0, 2.0], [1.0]]
    )
    added = add_mismatched(data, seed=0)
    assert [response.tolist() for response in added.responses(0)] == [[10], [11], [20, 21]]
    assert added.responses(1)[0].tolist() == [20, 21]
    assert added.responses(1)[1].tolist() in ([10], [11])
    assert_array_equal(added.ranks, [0, 1, MISMATCHED, 0, MISMATCHED])
    assert_array_equal(added.scores, [3.0, 2.0, np.nan, 1.0, np.nan])
    assert added.fingerprint != data.fingerprint


def test_it_is_never_the_same_prompts_other_answer():
    """Liked and disliked answers to one prompt stand on rows of their own, one after the other."""
    prompts = [[n // 2] for n in range(20)]
    data = make_dataset(prompts, [[[100 + n]] for n in range(20)])
    for seed in range(20):
        for row, (other,) in enumerate(other_responses(data, seed)):
            assert (other - 100) // 2 != row // 2


def test_every_response_of_the_others_is_as_likely_as_the_next():
    data = make_dataset([[1], [2], [3]], [[[10], [11]], [[20], [21]], [[30]]])
    drawn = np.array([other_responses(data, seed) for seed in range(900)])[:, :, 0]
    for row, allowed in enumerate(([20, 21, 30], [10, 11, 30], [10, 11, 20, 21])):
        values, counts = np.unique(drawn[:, row], return_counts=True)
        assert values.tolist() == allowed
        chance = 1 / len(allowed)
        assert np.all(np.abs(counts - 900 * chance) < 4 * np.sqrt(900 * chance * (1 - chance)))


def test_it_is_a_function_of_the_seed():
    data = make_dataset([[n] for n in range(30)], [[[n]] for n in range(30)])
    assert other_responses(data, 3) == other_responses(data, 3) != other_responses(data, 4)
    assert add_mismatched(data, seed=3).fingerprint != add_mismatched(data, seed=4).fingerprint


@pytest.mark.parametrize(("one", "another"), [(0, 1), (0, 128), (0, 2**32), (-1, 1)])
def test_seeds_of_any_size_and_sign_draw_otherwise(one, another):
    data = make_dataset([[n] for n in range(30)], [[[n]] for n in range(30)])
    assert other_responses(data, one) != other_responses(data, another)


def test_what_is_scored_of_a_response_follows_it_and_is_cut_with_it():
    """The first row's longer response is cut to the longest row that there is, its marks too."""
    data = make_dataset(
        [[1] * 3, [2]],
        [[[10, 11]], [[20, 21, 22, 23]]],
        scored=[[[True, False]], [[True, False, True, False]]],
    )
    added = add_mismatched(data, seed=0)
    assert [added.scored_of(0)[1].tolist(), added.responses(0)[1].tolist()] == [[True, False], [20, 21]]
    assert added.scored_of(1)[1].tolist() == [True, False]


def test_a_response_that_would_lengthen_the_rows_is_cut():
    data = make_dataset([[1] * 5, [2]], [[[10]], [[20, 21, 22, 23, 24]]])
    assert other_responses(data) == [[20], [10]]


def test_the_baseline_is_the_one_of_trl_on_planted_log_ratios():
    """TRL rolls the responses of shuffled rows by one, all of them, liked and disliked.

    A policy that raised liked responses by one nat and lowered the others by one has KL 0 with its own
    prompts' responses taken at random: neither draw may prefer the liked.
    """
    rng = np.random.default_rng(0)
    num_prompts = 2000
    data = make_dataset([[n] for n in range(num_prompts)], [[[1], [2]] for _ in range(num_prompts)])
    planted = {1: 1.0, 2: -1.0}
    ours = np.mean([planted[other] for (other,) in other_responses(data)])
    responses = rng.permutation(np.repeat([1, 2], num_prompts))
    trl = np.mean([planted[int(response)] for response in np.roll(responses, 1)])
    assert trl == 0.0
    assert abs(ours - trl) < 4 / np.sqrt(num_prompts)


def test_sixty_thousand_rows_take_a_moment():
    lengths = np.random.default_rng(0).integers(1, 9, 60_000)
    data = make_dataset([[n] for n in range(60_000)], [[[7] * length] for length in lengths.tolist()])
    assert len(add_mismatched(data, seed=0).ranks) == 120_000


@pytest.mark.parametrize("num_rows", [1, 3])
def test_one_prompt_alone_is_refused(num_rows):
    with pytest.raises(ValueError, match=f"all {num_rows} rows have the same prompt"):
        add_mismatched(make_dataset([[1]] * num_rows, [[[10]]] * num_rows), seed=0)
