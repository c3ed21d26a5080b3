"""A reference that makes other tokens than the policy, or lacks some of them, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import byte_tokenizer, tiny_config

from dpo.config import DataConfig
from dpo.huggingface.pretrained import Pretrained
from dpo.huggingface.text_models import read_config
from dpo.models.decoder_config import DecoderConfig
from dpo.models.vocabulary import require_known
from dpo.training.reading import read_dataset
from dpo.training.same_tokens import require_same_tokens


class Shape:
    """A model of which only the configuration is asked."""

    def __init__(self, config: DecoderConfig):
        self.config = config


def model_of(tokenizer, **choices) -> Pretrained:
    hf_config = tiny_config(tokenizer) | choices
    return Pretrained(Shape(read_config(hf_config)[1]), hf_config, {}, tokenizer, "the reference")  # pyright: ignore[reportArgumentType]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    rows = [{"prompt": f"Question {n}?", "chosen": "yes", "rejected": f"no, {n}"} for n in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=str(path))


def check(data: DataConfig, reference: Pretrained) -> None:
    tokenizer = byte_tokenizer()
    dataset = read_dataset(data, tokenizer)
    require_same_tokens(("the policy", tokenizer), reference, data, {"data.train": dataset})


def test_the_same_tokenizer_is_taken(data: DataConfig) -> None:
    check(data, model_of(byte_tokenizer()))


def test_a_tokenizer_that_differs_where_the_data_are_not_is_taken(data: DataConfig) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["never in the data"])
    check(data, model_of(tokenizer))


def test_other_tokens_are_refused(data: DataConfig) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Question"])
    with pytest.raises(ValueError, match="the policy and the reference make different tokens of data"):
        check(data, model_of(tokenizer))


def test_another_template_is_refused(data: DataConfig) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="make different tokens of data"):
        check(data, model_of(tokenizer))


def test_a_vocabulary_that_is_too_small_is_refused(data: DataConfig) -> None:
    """A lookup beyond it would be clipped to its last token, and the run go on."""
    with pytest.raises(ValueError, match=r"data.train under the reference: .* has token \d+, and the model"):
        check(data, model_of(byte_tokenizer(), vocab_size=60))


def test_a_judge_is_not_asked_of_tokens_that_it_lacks() -> None:
    config = read_config(tiny_config(byte_tokenizer()) | {"vocab_size": 60})[1]
    require_known([[1, 59]], config, source="the judge")
    with pytest.raises(ValueError, match="the judge: its tokenizer makes token 60, the model knows 60"):
        require_known([[1, 2], [3, 60]], config, source="the judge")
