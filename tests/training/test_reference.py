import json
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dpo.data.batch import Batch
from dpo.outcomes import StopRequested
from dpo.training.pieces import Pieces, read_pieces
from dpo.training.reference import (
    SOME_ROWS,
    fingerprint_parameters,
    open_or_compute,
    score_rows,
    with_progress,
)

IDENTITY = {"weights": "w", "data": "d", "dtype": "float32"}
TRUTH = np.array([[-1.0, -2.0], [-3.0, np.nan], [-5.0, -6.0]], np.float32)


def batch_of(rows):
    rows = np.asarray(rows)
    present = ~np.isnan(TRUTH[np.maximum(rows, 0)]) & (rows >= 0)[:, None]
    nothing = np.zeros((1, 1), np.int32)
    zeros = np.zeros(present.shape, np.int32)
    scores = zeros.astype(np.float32)
    tokens = (nothing, nothing, nothing, nothing, nothing, nothing, nothing)
    return Batch(*tokens, rows, zeros, present, zeros, zeros, scores)


def score(batch):
    return {"logps": np.nan_to_num(TRUTH[np.maximum(batch.index, 0)])}


def open_store(directory, *, score=score, identity=IDENTITY, log=lambda _: None):
    batches = [batch_of([0, 1]), batch_of([2, -1])]
    return open_or_compute(
        directory,
        identity,
        score=score,
        make_batches=lambda: batches,
        make_probe=lambda: batches[0],
        num_rows=3,
        num_scored=3,
        num_responses=2,
        locate=lambda row: f"data.jsonl:{row + 1}",
        log=log,
    )


def test_lookup_returns_each_rows_log_probs_and_zero_where_there_is_none(tmp_path):
    store = open_store(tmp_path)
    assert_array_equal(store.lookup(np.array([2, 1, -1]))["logps"], [[-5, -6], [-3, 0], [0, 0]])


def test_only_the_rows_that_are_read_are_scored_and_a_whole_store_serves_them_too(tmp_path):
    some = IDENTITY | {SOME_ROWS: "of a short run"}

    def open_some(directory, log):
        batches = [batch_of([0, 2])]
        given = {"make_batches": lambda: batches, "make_probe": lambda: batches[0], "log": log}
        shape = {"num_rows": 3, "num_scored": 2, "num_responses": 2}
        return open_or_compute(directory, some, score=score, locate=str, **shape, **given)

    said: list[str] = []
    store = open_some(tmp_path / "some", said.append)
    assert "computing 2 of 3 rows" in said[0]
    assert_array_equal(store.lookup(np.array([2, 0, -1]))["logps"], [[-5, -6], [-1, -2], [0, 0]])
    with pytest.raises(LookupError, match=r"not scored the rows \[1\]"):
        store.lookup(np.array([0, 1]))

    open_store(tmp_path / "whole")
    said.clear()
    assert_array_equal(open_some(tmp_path / "whole", said.append).rows["logps"], TRUTH)
    assert "opened" in said[0]
    assert_array_equal(
        open_store(tmp_path / "some").rows["logps"], TRUTH
    )  # and the other way round it does not


def test_a_store_is_computed_once(tmp_path):
    open_store(tmp_path)
    scored = []

    def count(batch):
        scored.append(batch)
        return score(batch)

    assert_array_equal(open_store(tmp_path, score=count).rows["logps"], TRUTH)
    assert len(scored) == 1  # the re-scored probe only


def test_another_identity_is_another_store(tmp_path):
    open_store(tmp_path)
    open_store(tmp_path, identity=IDENTITY | {"dtype": "bfloat16"})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_whose_rows_score_differently_is_refused(tmp_path):
    open_store(tmp_path)
    with pytest.raises(
        ValueError, match=r"logps of data\.jsonl:1 \(row 0\), response 0 is -1\.0+ there and -2"
    ):
        open_store(tmp_path, score=lambda batch: {"logps": score(batch)["logps"] - 1})
    with pytest.raises(ValueError, match=r"row 0\), response 0 is -1\.0000 there and nan now"):
        open_store(tmp_path, score=lambda batch: {"logps": score(batch)["logps"] * np.nan})


@pytest.mark.parametrize("damage", ["flip", "truncate", "meta"])
def test_a_damaged_store_is_refused_by_name(tmp_path, damage):
    open_store(tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray((path / "sums.safetensors").read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    if damage == "truncate":
        content = content[:-4]
    (path / "sums.safetensors").write_bytes(bytes(content))
    if damage == "meta":
        (path / "meta.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        open_store(tmp_path)


def test_scores_that_are_not_finite_stop_with_their_rows(tmp_path):
    def broken(batch):
        return {"logps": np.where(np.asarray(batch.index)[:, None] == 1, np.nan, score(batch)["logps"])}

    with pytest.raises(ValueError, match=r"logps of data\.jsonl:2 \(row 1\) are not finite"):
        open_store(tmp_path, score=broken)
    assert not list(tmp_path.iterdir())


def test_scoring_that_was_stopped_goes_on_with_the_rows_that_are_missing(tmp_path):
    scored, said = [], []

    def stops_after_one(batch):
        scored.append(np.asarray(batch.index).tolist())
        if len(scored) == 2:
            raise StopRequested
        return score(batch)

    whole = open_store(tmp_path / "whole").rows
    with pytest.raises(StopRequested):
        open_store(tmp_path / "run", score=stops_after_one)
    store = open_store(tmp_path / "run", score=stops_after_one, log=said.append)
    assert scored == [[0, 1], [2, -1], [2, -1]]
    assert store.rows["logps"].tobytes() == whole["logps"].tobytes()
    assert "reference log-probs: 2 of these rows are there from a start before" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [
        path.name for path in (tmp_path / "whole").iterdir()
    ], "no piece is left"


def test_a_damaged_piece_is_scored_again(tmp_path):
    pieces = Pieces(tmp_path / "pieces", TRUTH.shape, {})
    pieces.remembered(score)(batch_of([0, 1]))
    pieces.write()
    pieces.remembered(score)(batch_of([2, -1]))
    pieces.write()
    assert_array_equal(read_pieces(tmp_path / "pieces", TRUTH.shape)["logps"], TRUTH)
    damaged = sorted((tmp_path / "pieces").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    rows = read_pieces(tmp_path / "pieces", TRUTH.shape)["logps"]
    assert 1 <= np.isnan(rows).all(axis=1).sum() <= 2
    known = ~np.isnan(rows).all(axis=1)
    assert_array_equal(rows[known], TRUTH[known])


def test_a_piece_is_written_every_minute(tmp_path):
    now, noted = [0.0], Mock()
    pieces = Pieces(tmp_path / "pieces", TRUTH.shape, {}, clock=lambda: now[0], noted=noted)
    remembered = pieces.remembered(score)
    remembered(batch_of([0, 1]))
    assert not (tmp_path / "pieces").exists()
    assert not noted.called
    now[0] = 61.0
    remembered(batch_of([2, -1]))
    assert len(list((tmp_path / "pieces").iterdir())) == 1
    noted.assert_called_once_with()


def test_long_scoring_says_how_far_it_has_come():
    """Seven rows in batches of two, the last filled up, eight seconds each."""
    now, said = [0.0], []
    batches = [batch_of(rows) for rows in ([0, 1], [2, 0], [1, 2], [0, -1])]
    for _ in with_progress(batches, num_rows=7, log=said.append, every=15.0, clock=lambda: now[0]):
        now[0] += 8
    assert said == ["reference log-probs: 4 of 7 rows, 0:00:12 left"]


def test_fingerprint_sees_values_names_shapes_and_dtypes():
    base = {"a": np.zeros((2, 3), np.float32)}
    variants = [
        base,
        {"b": base["a"]},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"].astype(np.float16)},
        {"a": base["a"] + 1},
    ]
    assert len({fingerprint_parameters(variant) for variant in variants}) == len(variants)


def test_of_a_row_that_comes_again_the_first_sums_count():
    calls = iter((0.0, 100.0))

    def drifting(batch):
        return {"logps": score(batch)["logps"] + next(calls)}

    batches = [batch_of([1, 0]), batch_of([2, 1])]
    rows = score_rows(drifting, batches, num_rows=3, num_responses=2, locate=str)
    assert_array_equal(rows["logps"], TRUTH + np.array([[0.0], [0.0], [100.0]], np.float32))
