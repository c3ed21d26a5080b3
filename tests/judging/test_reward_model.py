"""A reward model judges by the score of the whole conversation, chat template applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny_model import write_tiny_model, write_tiny_reward_model

from dpo.cli import main
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_classifier
from dpo.judging import reward_model
from dpo.judging.judges import Question
from dpo.judging.reward_model import RewardModelJudge
from dpo.models.classifier import classify


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_reward_model(tmp_path_factory.mktemp("reward"))


def test_rewards_are_the_scores_of_the_rendered_conversations(reward_dir: Path) -> None:
    conversation = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})
    conversation = (*conversation, {"role": "user", "content": "Say A."})
    questions = [
        Question(conversation, "A", "No."),
        Question(conversation, "No.", "A"),
        Question("Say B.", "B", "B"),
    ]
    checkpoint = open_checkpoint(reward_dir)
    tokenizer = checkpoint.tokenizer()
    rendered: Any = [
        tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], return_dict=False)
        for messages, text in (
            (conversation, "A"),
            (conversation, "No."),
            ([{"role": "user", "content": "Say B."}], "B"),
        )
    ]
    found = dict(classify(load_classifier(checkpoint), rendered))
    a, no, b = (float(found[i][0]) for i in range(3))
    judge = RewardModelJudge(str(reward_dir), identity="weights", batch_size=2)
    verdicts = dict(judge.ask(questions))
    for number, expected in enumerate([(a, no), (no, a), (b, b)]):
        details = verdicts[number].details
        assert details is not None
        assert "rewards" in details
        assert_allclose(details["rewards"], expected, rtol=1e-5, atol=1e-6)
    assert [verdicts[i].choice for i in range(3)] == [
        *(("first", "second") if a > no else ("second", "first")),
        "tie",
    ]
    assert list(judge.ask([])) == []


def test_a_text_in_several_questions_is_read_once(reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(model, sequences, *, batch_size):
        seen.append(len(sequences))
        return ((i, np.zeros(1, np.float32)) for i in range(len(sequences)))

    monkeypatch.setattr(reward_model, "classify", count)
    questions = [Question("x", "a", "b"), Question("x", "b", "a"), Question("y", "a", "b")]
    verdicts = dict(RewardModelJudge(str(reward_dir), identity="weights").ask(questions))
    assert seen == [4]
    assert [verdicts[i].choice for i in range(3)] == ["tie"] * 3


def test_winrate_with_a_reward_model(
    reward_dir: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean rewards of both sides are in the figures; a second start loads no reward model."""
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Say {x}.", "chosen": f"{x} yes", "rejected": "no"} for x in "ABC"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "winrate",
        f"--policy={tiny_model_dir}",
        "--opponent=data:best",
        f"--data={data}",
        f"--output={tmp_path / 'out'}",
        f"--judge=reward_model:{reward_dir}",
        "--max_new_tokens=4",
    ]
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "winrate.json").read_text())
    assert result["judge"]["judge"] == "reward_model"
    assert result["judge"]["weights"].startswith("sha256:")
    figures = result["temperatures"]["1.0"]
    assert figures["prompts"] == 3
    assert set(figures["reward"]) == {"reward, policy", "reward, opponent"}
    monkeypatch.setattr(reward_model, "load_classifier", None)
    assert main(command) == 0


def test_what_is_no_reward_model_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the model has 2 labels; a reward model has 1"):
        RewardModelJudge(str(write_tiny_reward_model(tmp_path, num_labels=2)), identity="")
    causal = write_tiny_model(tmp_path)
    with pytest.raises(
        ValueError, match="allowed for a classifier or reward model of model_type llama is Llama"
    ):
        RewardModelJudge(str(causal), identity="")
