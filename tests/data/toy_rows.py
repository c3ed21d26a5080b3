"""Random ragged data sets, for laws that must hold for every layout."""

import numpy as np
from hypothesis import strategies as st

from dpo.data.packing import Layout
from dpo.data.tokenized import TokenizedDataset, make_dataset

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
END = 2
VOCAB = 23

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=9
)
"""Lengths of a prompt and of its responses, for every row of a data set."""


def random_dataset(shapes: list[tuple[int, list[int]]], seed: int = 0) -> TokenizedDataset:
    """Tokens for prompts and responses of given lengths; the end (and padding) token occurs anywhere."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, prompt).tolist() for prompt, _ in shapes]
    responses = [
        [[*rng.integers(0, VOCAB, n - 1).tolist(), END] for n in responses] for _, responses in shapes
    ]
    return make_dataset(prompts, responses)
