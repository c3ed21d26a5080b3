"""What of the settings is allowed and seldom meant is said at the start."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from dpo.config import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig
from dpo.data.distinct import prompt_digests
from dpo.data.preferences import ReadSummary
from dpo.data.tokenized import make_dataset
from dpo.huggingface.adapter_files import AdapterDirectory
from dpo.parallel.partition import ONE_DEVICE
from dpo.training.announce import _a_step, _about_heldout, _advice, _attention, _counts, _longest, _text
from dpo.training.reading import Dataset


@pytest.mark.parametrize(
    ("lora", "rate", "said"),
    [
        (LoraConfig(rank=4), OptimizerConfig().learning_rate, True),
        (LoraConfig(rank=4), 1e-4, False),
        (LoraConfig(), OptimizerConfig().learning_rate, False),
    ],
)
def test_adapters_at_the_rate_for_all_weights_are_remarked_on(lora, rate, said):
    lines = _advice(Config(lora=lora, optimizer=OptimizerConfig(learning_rate=rate)))
    assert len(lines) == said
    assert all(line.startswith("learning rate: ") and "ten times" in line for line in lines)


@pytest.mark.parametrize(
    ("base", "source", "said"),
    [
        ("owner/one", "owner/one", None),
        ("owner/one", "owner/two", "was trained on owner/one, and model.source is owner/two"),
        (None, "owner/one", "says of no model"),
        ("HERE", "HERE/../model", None),
        ("HERE", "owner/one", "and model.source is owner/one"),
    ],
)
def test_adapters_of_another_base_are_remarked_on(base, source, said, tmp_path: Path, monkeypatch):
    here = tmp_path / "model"
    here.mkdir()
    monkeypatch.setattr(AdapterDirectory, "_find_modules", lambda self: ())
    safetensors.numpy.save_file({}, tmp_path / "adapter_model.safetensors")
    base, source = (text and text.replace("HERE", str(here)) for text in (base, source))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    config = Config(
        model=ModelConfig(source=source),
        lora=LoraConfig(init=str(tmp_path)),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    lines = _advice(config)
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines)


def dataset(prompts: Sequence[Sequence[int]], *, rows: int) -> Dataset:
    """Two responses to each prompt, read from so many rows."""
    tokens = make_dataset(prompts, [[[1], [2, 3]]] * len(prompts))
    skipped = {"empty": rows - len(prompts)} if rows > len(prompts) else {}
    return Dataset(ReadSummary(rows, skipped, [], {}, {}), tokens, [], "")


def test_rows_that_are_left_out_are_counted_of_those_that_were_read():
    data = dataset([[5], [6]], rows=3)
    assert _counts(data, prompt_digests(data.tokens)) == (
        "2 prompts, 4 responses, from 3 rows (left out: 1 empty)"
    )


def test_pairs_of_one_ranking_are_told_from_prompts():
    data = dataset([[5], [5], [6]], rows=2)
    counted = _counts(data, prompt_digests(data.tokens))
    assert counted == "3 preferences of 2 different prompts, 6 responses, from 2 rows"


def test_a_step_of_preferences_says_how_many_prompts_it_has():
    first = [np.array([0, 1, 2]), np.array([0, 1, -1])]
    assert _a_step(3, first, [b"a", b"b", b"c"]) == "3 prompts"
    shared = _a_step(3, first, [b"a", b"a", b"b"])
    assert shared == "3 preferences (about 2 different prompts a step)"


def test_held_out_prompts_that_are_trained_on_are_warned_of():
    trained_on, heldout = dataset([[5, 6], [7]], rows=2), dataset([[7], [5], [8]], rows=3)
    config = Config(data=DataConfig(eval="eval.jsonl"))
    first, warning = _about_heldout(heldout, config, set(prompt_digests(trained_on.tokens)))
    assert first.endswith("from 3 rows, 1 of them also trained on")
    assert warning.startswith("WARNING: held out: 1 of 3 prompts are also trained on")
    (alone,) = _about_heldout(heldout, config, set())
    assert alone.endswith("none of them trained on")


@pytest.mark.parametrize(
    ("given", "own", "said"),
    [
        ("mine.jinja", "{{ x }}", "the chat template mine.jinja"),
        (None, "{{ x }}", "model's own chat template"),
        (None, None, "plain, prompt and response one after the other"),
    ],
)
def test_how_rows_become_text_is_said(given, own, said):
    assert said in _text(given, own)


@pytest.mark.parametrize(
    ("settings", "alibi", "row", "row_length", "said"),
    [
        ("auto", True, 8, None, "plain (the model has ALiBi): all pairs of a row's 8 tokens are visited; "),
        ("plain", False, 8, None, "plain (model.attention is plain): all pairs of a row's 8 tokens"),
        ("auto", False, 8, None, None),
        ("auto", True, 5, None, None),
        ("auto", True, 8, 8, None),
    ],
)
def test_attention_to_all_pairs_of_long_rows_is_remarked_on(settings, alibi, row, row_length, said):
    config = Config(model=ModelConfig(attention=settings), data=DataConfig(row_length=row_length))
    longest = _longest(dataset([[5], [6, 7]], rows=2).tokens)  # two tokens, and two more
    lines = _attention(config, ONE_DEVICE, alibi=alibi, row=row, longest=longest)
    assert len(lines) == (said is not None)
    assert all(f"attention  {said}" in line and "--data.row_length=4 " in line for line in lines)
