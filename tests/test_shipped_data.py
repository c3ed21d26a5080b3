"""The shipped preferences are what their card says."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from dpo.data.preferences import read_preferences
from dpo.judging.rewards import vader

DATA = Path(__file__).parents[1] / "data"
SPLITS = ("train", "eval")
FIELDS = {"id", "source", "subject", "prompt", "responses", "scores"}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        split: [
            json.loads(line)
            for line in (DATA / f"sentiment_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def make_sentiment():
    spec = importlib.util.spec_from_file_location("make_sentiment", DATA / "make_sentiment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_one_user_message_and_four_scored_responses(rows, split):
    for row in rows[split]:
        assert set(row) == FIELDS
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert row["subject"] in row["prompt"][0]["content"]
        assert len(row["responses"]) == len(row["scores"]) == 4
        assert len(set(row["responses"])) == 4
        assert all(text == text.strip() != "" and len(text.splitlines()) == 1 for text in row["responses"])


@pytest.mark.parametrize("split", SPLITS)
def test_scores_are_vaders_best_first_without_ties(rows, split):
    for row in rows[split]:
        prompt = tuple(row["prompt"])
        assert [vader(prompt, text) for text in row["responses"]] == row["scores"]
        assert row["scores"] == sorted(set(row["scores"]), reverse=True)
        assert row["scores"][0] - row["scores"][-1] >= 0.3


def test_prompts_hint_at_no_sentiment(rows):
    assert all(vader("", row["subject"]) == 0.0 for split in SPLITS for row in rows[split])
    prompts = {vader("", row["prompt"][0]["content"]) for split in SPLITS for row in rows[split]}
    assert prompts == {vader("", "sentence")}  # the one word of every phrasing that the lexicon has
    assert vader("", "sentence") < 0.08


def test_counts(rows):
    assert {split: len(rows[split]) for split in SPLITS} == {"train": 333, "eval": 83}


@pytest.mark.parametrize("field", ["id", "subject", "prompt"])
def test_nothing_appears_twice_in_or_across_the_splits(rows, field):
    counts = Counter(json.dumps(row[field]) for split in SPLITS for row in rows[split])
    assert counts.most_common(1)[0][1] == 1


def test_phrasings_are_the_same_in_both_splits(rows, make_sentiment):
    def phrasings(split):
        return {row["prompt"][0]["content"].replace(row["subject"], "{}") for row in rows[split]}

    assert phrasings("train") == phrasings("eval") == set(make_sentiment.PHRASINGS)


def test_rows_come_from_the_subjects_by_the_rule_of_the_script(rows, make_sentiment):
    prompts = {f"sentiment-{p.number:03d}": p for p in make_sentiment.read_prompts(DATA / "subjects.txt")}
    for split in SPLITS:
        for row in rows[split]:
            prompt = prompts[row["id"]]
            assert (prompt.split, prompt.subject, prompt.text) == (
                split,
                row["subject"],
                row["prompt"][0]["content"],
            )


def test_chosen_answers_are_the_ends_and_thirds_of_the_range(make_sentiment):
    answers = [make_sentiment.Answer(str(score), score) for score in (0.0, 0.9, 0.5, 0.31, 0.62, 0.1)]
    assert [a.score for a in make_sentiment.choose(answers)] == [0.9, 0.62, 0.31, 0.0]


def test_of_equal_scores_the_first_sampled_is_chosen(make_sentiment):
    answers = [
        make_sentiment.Answer(name, {"a": 0.9, "b": 0.6, "c": 0.3, "d": 0.0}[name.lower()])
        for name in "dDcCBbaA"
    ]
    assert [answer.text for answer in make_sentiment.choose(answers)] == ["a", "B", "c", "d"]


@pytest.mark.parametrize("scores", [(0.0, 0.0, 0.5, 0.9), (0.1, 0.2, 0.3, 0.39)])
def test_too_few_different_scores_or_too_small_a_range_is_no_choice(make_sentiment, scores):
    assert make_sentiment.choose([make_sentiment.Answer(str(s), s) for s in scores]) is None


@pytest.mark.parametrize("split", SPLITS)
def test_the_reader_serves_rankings_and_pairs(rows, split):
    path = str(DATA / f"sentiment_{split}.jsonl")
    rankings = read_preferences(path, expand="ranking").preferences
    pairs = read_preferences(path, expand="best_worst").preferences
    for row, ranking, pair in zip(rows[split], rankings, pairs, strict=True):
        assert ranking.responses == tuple(row["responses"])
        assert pair.responses == (row["responses"][0], row["responses"][-1])
