"""Data that do not go with a model or an objective are refused, and what an objective needs is added."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_model import byte_tokenizer, tiny_config

from dpo.config import DataConfig, MeshConfig
from dpo.data.preferences import ReadSummary
from dpo.data.tokenized import make_dataset
from dpo.huggingface.text_models import read_config
from dpo.losses import Objective, make_objective
from dpo.parallel.sharding import make_mesh
from dpo.training.datasets import EVALUATION_BATCH, fit_to_objective, require_embeddings, scoring_loader
from dpo.training.reading import Dataset

MODEL = replace(
    read_config(tiny_config(byte_tokenizer()))[1], vocab_size=10, position="learned", max_positions=6
)


def data(*rows: tuple[list[int], list[list[int]]]) -> Dataset:
    """One row a line, from line 1."""
    tokens = make_dataset([prompt for prompt, _ in rows], [responses for _, responses in rows])
    locations = [f"a.jsonl:{line}" for line in range(1, len(rows) + 1)]
    return Dataset(ReadSummary(len(rows), {}, [], {}, {}), tokens, locations, "")


def test_the_first_row_with_an_unknown_token_is_named():
    known = ([9, 0], [[1, 9], [2]])
    require_embeddings(data(known), MODEL, name="data.train")
    for unknown in (([10], [[1], [2]]), ([1], [[1], [10]])):
        with pytest.raises(ValueError, match=r"^data.train: a.jsonl:2 has token 10, .* knows 10 from 0"):
            require_embeddings(data(known, unknown, ([11], [[1]])), MODEL, name="data.train")


def test_learned_positions_end():
    fits, beyond = ([1, 2, 3], [[1, 2, 3], [1]]), ([1, 2, 3], [[1], [1, 2, 3, 4]])
    require_embeddings(data(fits), MODEL, name="data.eval")
    with pytest.raises(ValueError, match=r"^data.eval: a.jsonl:2 has 7 tokens, and the model 6 learned"):
        require_embeddings(data(fits, beyond), MODEL, name="data.eval")
    require_embeddings(data(fits, beyond), replace(MODEL, position="rotary"), name="data.eval")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["kto", "dpo"], "objective dpo compares responses, but every"), (["kto", "odpo"], "needs scores")],
)
def test_a_sum_with_kto_is_refused_where_its_other_terms_would_be(names, message):
    """The responses that measure KTO's baseline are no second ones that could be compared."""
    singles = data(([1], [[2]]), ([3], [[4]]))
    alone = fit_to_objective(singles, make_objective({"name": "kto"}))
    assert alone.tokens.num_responses.tolist() == [2, 2]
    with pytest.raises(ValueError, match=message):
        fit_to_objective(singles, make_objective([{"name": name} for name in names]))


def test_an_objective_says_itself_that_it_learns_from_ties():
    """One that is made in Python keeps tied rows as a built-in does, and is named where it compares."""
    tied, ordered = ([1], [[2], [3]]), ([3], [[4], [5]])
    tokens = make_dataset([[1], [3]], [[[2], [3]], [[4], [5]]], ranks=[[0, 0], [0, 1]])
    rows = data(tied, ordered)._replace(tokens=tokens)

    def loss(scores):
        return scores.policy.sum(axis=1)

    assert len(fit_to_objective(rows, Objective(loss)).tokens) == 1
    assert len(fit_to_objective(rows, Objective(loss, learns_from_ties=True)).tokens) == 2
    with pytest.raises(ValueError, match="objective mine compares responses, but every prompt has one"):
        fit_to_objective(data(([1], [[2]])), Objective(loss, learns_from_ties=True, name="mine"))


@pytest.mark.parametrize("devices", [1, 4])
def test_a_device_scores_as_many_prompts_at_a_time_on_any_mesh(devices):
    tokens = make_dataset([[1, 2]] * 100, [[[3], [4]]] * 100)
    mesh = make_mesh(MeshConfig(data=devices, fsdp=1), jax.devices()[:devices])
    loader = scoring_loader(DataConfig(train="x"), tokens, mesh)
    assert loader.num_steps == -(-100 // (EVALUATION_BATCH * devices))
    scored = np.concatenate([loader.indices(step) for step in range(loader.num_steps)])
    assert scored[scored >= 0].tolist() == list(range(100))
