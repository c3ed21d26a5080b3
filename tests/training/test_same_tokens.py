"""A reference that makes other tokens than the policy, or lacks some of them, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import CHAT_TEMPLATE, byte_tokenizer, tiny_config
from tiny_models import case_config
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dpo.config import Config, DataConfig, ModelConfig, WinrateConfig
from dpo.huggingface.pretrained import Pretrained
from dpo.huggingface.text_models import read_config
from dpo.judging.journal import Journal
from dpo.judging.match import log_ratios
from dpo.judging.match_figures import Pair
from dpo.judging.samples import Request, Sample
from dpo.models.decoder_config import DecoderConfig
from dpo.models.drawing import SamplingConfig
from dpo.models.vocabulary import require_known
from dpo.training.reading import read_dataset
from dpo.training.same_tokens import require_same_tokens, require_same_vocabulary


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


def other_letters() -> PreTrainedTokenizerFast:
    """A tokenizer with two letters in each other's places, which are in none of the prompts."""
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["x"], vocabulary["z"] = vocabulary["z"], vocabulary["x"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_samples_of_the_policy_are_tokens_of_the_reference() -> None:
    """Data may hold few of the tokens, samples hold any: a lookup beyond the reference's would be clipped."""
    policy = model_of(byte_tokenizer())._replace(source="the policy")
    require_same_vocabulary(policy, model_of(byte_tokenizer()), longest=9999)
    with_names = byte_tokenizer()
    with_names.chat_template = None
    require_same_vocabulary(policy, model_of(with_names), longest=9999)
    message = "eval_samples asks the reference about samples of the policy, of "
    with pytest.raises(ValueError, match=message + "258 tokens, of which it knows 60"):
        require_same_vocabulary(policy, model_of(byte_tokenizer(), vocab_size=60), longest=9)
    with pytest.raises(ValueError, match=message + r"other tokens: \d+ is another one there"):
        require_same_vocabulary(policy, model_of(other_letters()), longest=9)
    learned = load_case_config("gpt2")
    theirs = model_of(byte_tokenizer())._replace(model=Shape(learned))  # pyright: ignore[reportArgumentType]
    ours = policy._replace(model=Shape(learned))  # pyright: ignore[reportArgumentType]
    require_same_vocabulary(ours, theirs, longest=learned.max_positions)
    with pytest.raises(ValueError, match=message + r"up to \d+ tokens, and it has \d+ learned positions"):
        require_same_vocabulary(ours, theirs, longest=learned.max_positions + 1)


def load_case_config(case: str) -> DecoderConfig:
    return read_config(case_config(case))[1]


@pytest.mark.parametrize(
    ("text", "vocab_size", "problem"),
    [
        ("xylophone", 258, "policy and opponent have different tokens under the same numbers"),
        ("a flute", 60, "OPPONENT lacks tokens, or positions, of the policy's responses"),
    ],
)
def test_an_opponent_is_not_asked_of_tokens_that_mean_others_to_it(
    tmp_path: Path, text: str, vocab_size: int, problem: str
) -> None:
    """The prompts' tokens are the same in both; those of the policy's responses need not be."""
    policy, opponent = (tmp_path / name for name in ("policy", "opponent"))
    for directory, tokenizer in ((policy, byte_tokenizer()), (opponent, other_letters())):
        tokenizer.save_pretrained(directory)
        config = tiny_config(byte_tokenizer()) | {"vocab_size": vocab_size}
        (directory / "config.json").write_text(json.dumps(config))
    tokenizer = byte_tokenizer()
    sample = Sample(text, [1, 5], tokenizer.encode(text), True)
    pair = Pair(Request("?", 0, SamplingConfig()), sample, "no", [1, 5], True)
    models = ModelConfig(source=str(policy), reference=str(opponent))
    said: list[str] = []
    with Journal(tmp_path / "log_probs.jsonl") as journal:
        given = WinrateConfig(policy="p", opponent="o", data="d", output="x", judge="longer")
        assert log_ratios(given, Config(model=models), [pair], journal, said.append) is None
    assert said == [f"{problem}: no log-ratios".replace("OPPONENT", str(opponent))]
