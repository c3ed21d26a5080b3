from numpy.testing import assert_array_equal

from dpo.data.ties import has_order, without_ties
from dpo.data.tokenized import make_dataset

PROMPTS = [[1], [2, 2], [3], [4, 4, 4]]
RESPONSES = [[[5], [6, 6]], [[7], [8]], [[9, 9]], [[10], [11], [12, 12]]]
RANKS = [[0, 1], [0, 0], [0], [0, 0, 1]]
SCORES = [None, [1.0, 1.0], None, [2.0, 2.0, 1.0]]


def dataset(rows):
    return make_dataset(
        [PROMPTS[row] for row in rows],
        [RESPONSES[row] for row in rows],
        ranks=[RANKS[row] for row in rows],
        scores=[SCORES[row] for row in rows],
    )


def test_what_is_left_are_the_rows_with_two_ranks_as_if_there_had_been_no_others():
    """A tie and a response alone have no pair."""
    whole = dataset(range(4))
    assert_array_equal(has_order(whole), [True, False, False, True])
    left, expected = without_ties(whole), dataset([0, 3])
    for name in ("prompt_tokens", "prompt_offsets", "response_tokens", "response_offsets", "row_offsets"):
        assert_array_equal(getattr(left, name), getattr(expected, name), err_msg=name)
        assert getattr(left, name).dtype == getattr(expected, name).dtype
    assert_array_equal(left.ranks, expected.ranks)
    assert_array_equal(left.scores, expected.scores)
    assert_array_equal(left.origin, [0, 3])
    assert left.dropped == {"no_pair": 2}
    assert left.fingerprint != whole.fingerprint


def test_without_any_tie_nothing_is_made_anew():
    whole = dataset([0, 3])
    assert without_ties(whole) is whole
