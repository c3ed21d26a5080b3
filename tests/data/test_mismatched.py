import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dpo.data.mismatched import add_mismatched
from dpo.data.tokenized import TokenizedDataset
from dpo.losses.scores import MISMATCHED


def dataset(prompts, responses):
    return TokenizedDataset(
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=np.cumsum([0, *map(len, prompts)]),
        response_tokens=np.concatenate(responses).astype(np.int32),
        response_offsets=np.cumsum([0, *map(len, responses)]),
        row_offsets=np.arange(len(prompts) + 1),
        ranks=np.arange(len(prompts)) % 2,
        scores=np.full(len(prompts), np.nan),
        origin=np.arange(len(prompts)),
        fingerprint="f",
    )


def test_each_row_gets_the_next_rows_response():
    data = add_mismatched(dataset([[1], [2], [3]], [[10], [20, 21], [30]]))
    assert [[list(response) for response in data.responses(row)] for row in range(3)] == [
        [[10], [20, 21]],
        [[20, 21], [30]],
        [[30], [10]],
    ]
    assert_array_equal(data.ranks, [0, MISMATCHED, 1, MISMATCHED, 0, MISMATCHED])
    assert data.fingerprint != "f"


def test_a_response_that_would_lengthen_the_rows_is_passed_over():
    data = add_mismatched(dataset([[1] * 5, [2], [3]], [[10], [20] * 5, [30]]))
    assert list(data.responses(0)[1]) == [30]


def test_one_row_alone_is_refused():
    with pytest.raises(ValueError, match="needs other prompts' responses"):
        add_mismatched(dataset([[1]], [[10]]))
