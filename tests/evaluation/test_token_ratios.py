"""Token by token: pieces make up the text, log-ratios make up the sum, and the extremes are the extremes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_model import byte_tokenizer, write_tiny_model

from dpo.config import Config, DataConfig, ModelConfig
from dpo.evaluation.heldout import score_heldout
from dpo.evaluation.rows import Rows
from dpo.evaluation.token_ratios import extreme_pairs, score_extremes, token_texts


def rows_with(log_ratio: np.ndarray) -> Rows:
    """Rankings without ties that the policy puts apart as given."""
    n, K = log_ratio.shape
    return Rows(
        policy=log_ratio.astype(float),
        reference=np.zeros((n, K)),
        lengths=np.full((n, K), 3),
        present=np.ones((n, K), bool),
        ranks=np.tile(np.arange(K), (n, 1)),
        prompts=np.arange(n),
        sources=np.full(n, "all"),
    )


@pytest.mark.parametrize("text", ["plain", "naïve ☕ 中文", "\n\n", "a\tb  c"])
def test_pieces_make_up_the_text_and_no_piece_is_half_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_text_that_ends_within_a_character_says_so_once() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a☕", add_special_tokens=False)[:-1]
    assert token_texts(tokenizer, ids) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_extremes_are_the_lowest_and_the_highest_once_a_row() -> None:
    rng = np.random.default_rng(0)
    log_ratio = rng.normal(size=(40, 3))
    extremes = extreme_pairs(rows_with(log_ratio), beta=0.5, count=4)
    pairs = [(0, 1), (0, 2), (1, 2)]
    delta = np.array([[0.5 * (row[i] - row[j]) for i, j in pairs] for row in log_ratio])
    assert [pair.row for pair in extremes.worst] == np.argsort(delta.min(1))[:4].tolist()
    taken = {pair.row for pair in extremes.worst}
    best = [row for row in np.argsort(-delta.max(1)).tolist() if row not in taken]
    assert [pair.row for pair in extremes.best] == best[:4]
    for pair in [*extremes.worst, *extremes.best]:
        expected = 0.5 * (log_ratio[pair.row, pair.better] - log_ratio[pair.row, pair.worse])
        assert pair.delta == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_no_row_is_at_both_ends(n: int) -> None:
    extremes = extreme_pairs(rows_with(np.random.default_rng(n).normal(size=(n, 2))), beta=1.0, count=5)
    rows = [pair.row for pair in [*extremes.worst, *extremes.best]]
    assert sorted(rows) == list(range(n))


def test_token_log_ratios_add_up_to_the_responses(tmp_path: Path) -> None:
    """Two random models, rankings of three, characters of several bytes."""
    sources = [str(write_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    data = tmp_path / "eval.jsonl"
    rows = [
        {"prompt": f"item {i}", "responses": [f"☕ yes {i}", "perhaps so", "no"], "ranks": [1, 2, 3]}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(source=sources[0], reference=sources[1], reference_store=str(tmp_path / "store")),
        data=DataConfig(eval=str(data)),
    )
    heldout = score_heldout(config, log=lambda text: None)
    kept = score_extremes(config, heldout, beta=0.1)
    assert len(kept["pairs"]) == 6
    for pair in kept["pairs"]:
        for name in ("better", "worse"):
            side, place = pair["sides"][name], pair[name]
            total = np.sum(np.array(side["policy"], float)) - np.sum(np.array(side["reference"], float))
            assert total == pytest.approx(heldout.rows.log_ratio[pair["row"], place], abs=2e-3)
            assert "".join(side["tokens"]) == f"{heldout.preferences[pair['row']].responses[place]}</s>\n"
            assert len(side["tokens"]) == heldout.rows.lengths[pair["row"], place]
