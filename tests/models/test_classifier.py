"""A sequence classifier gives transformers' numbers, whatever it is batched with."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny_models import CLASSIFIERS, ORACLES, SEQUENCES, write_checkpoint, write_classifier

from dpo.huggingface.families import classifier_architecture
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import count_labels, load_classifier, load_decoder
from dpo.huggingface.saving import save_pretrained
from dpo.models.classifier import classify, pooled_position

QUICK = ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "falcon"]
OFTEN = ["llama", "gpt2"]
"""Of which CI asks torch for other numbers of labels than the oracles have."""


def load(directory):
    return load_classifier(open_checkpoint(directory))


def scores(model, sequences, **choices):
    found = dict(classify(model, sequences, **choices))
    return np.stack([found[i] for i in range(len(sequences))])


@pytest.mark.parametrize("case", QUICK)
def test_scores_are_transformers(case, tmp_path):
    model = load(write_classifier(tmp_path, case))
    expected = json.loads(ORACLES.read_text())[case]["scores"]
    assert_allclose(scores(model, SEQUENCES), expected, atol=2e-4)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.ci if c in OFTEN else pytest.mark.slow) for c in CLASSIFIERS],
)
def test_three_labels_are_those_of_torch(case, tmp_path):
    pytest.importorskip("torch")
    from torch_models import torch_scores

    directory = write_classifier(tmp_path, case, num_labels=3)
    assert count_labels(open_checkpoint(directory)) == 3
    ours = scores(load(directory), SEQUENCES)
    assert_allclose(ours, torch_scores(directory, SEQUENCES), atol=2e-4)


def test_a_score_does_not_depend_on_the_batch(tmp_path):
    model = load(write_classifier(tmp_path, "llama"))
    alone = [scores(model, [sequence])[0] for sequence in SEQUENCES]
    assert_allclose(scores(model, SEQUENCES, batch_size=2), alone, atol=1e-5)


def test_the_pooled_token_is_the_last_that_is_no_padding():
    assert pooled_position([5, 0, 7, 0, 0], 0) == 2
    assert pooled_position([5, 0, 7, 0, 0], None) == 4
    assert pooled_position([0, 0], 0) == 0


def test_a_classifier_saved_and_loaded_keeps_every_bit(tmp_path):
    checkpoint = open_checkpoint(write_classifier(tmp_path / "in", "qwen2"))
    first = load_classifier(checkpoint)
    out = save_pretrained(first, tmp_path / "out", hf_config=checkpoint.config, tokenizer=None)
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        "Qwen2ForSequenceClassification"
    ]
    second = load(out)
    assert_array_equal(first.score.kernel[...], second.score.kernel[...])
    assert_array_equal(scores(first, SEQUENCES), scores(second, SEQUENCES))


def test_what_is_no_classifier_is_refused_and_a_classifier_is_no_policy(tmp_path):
    write_checkpoint(tmp_path / "causal", "llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match=r"\['LlamaForCausalLM'\]; allowed .* is LlamaForSequenceClassif"):
        load(tmp_path / "causal")
    write_checkpoint(tmp_path / "granite", "granite", architectures=["GraniteForSequenceClassification"])
    with pytest.raises(ValueError, match="none: transformers has none"):
        load(tmp_path / "granite")
    write_classifier(tmp_path / "reward", "llama")
    with pytest.raises(ValueError, match=r"is a LlamaForSequenceClassification; allowed here are causal"):
        load_decoder(open_checkpoint(tmp_path / "reward"))


def test_sequences_without_tokens_or_embeddings_are_refused(tmp_path):
    model = load(write_classifier(tmp_path, "gpt2"))
    with pytest.raises(ValueError, match=r"sequences \[1\] have no tokens"):
        list(classify(model, [[1], []]))
    with pytest.raises(ValueError, match="65 tokens; the model has 64 positions"):
        list(classify(model, [[1] * 65]))
    V = model.config.vocab_size
    with pytest.raises(ValueError, match=f"a sequence has token {V}; the model knows {V} from 0"):
        list(classify(model, [[1], [1, V]]))


def test_every_named_architecture_is_transformers(tmp_path):
    pytest.importorskip("torch")  # transformers' table cannot be imported without it
    import transformers

    table = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for model_type in CLASSIFIERS:
        names = [table[model_type]] if isinstance(table[model_type], str) else table[model_type]
        assert classifier_architecture(model_type) in names, model_type
