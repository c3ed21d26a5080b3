"""Every family computes what transformers computes, in every layout."""

import json
import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from numpy.testing import assert_allclose
from tiny_models import (
    CASES,
    CLASSIFIERS,
    ORACLES,
    TOKENS,
    batch_arrays,
    case_config,
    load_case,
    write_checkpoint,
)
from transformers import AutoConfig

from dpo.huggingface.classic_configurations import alibi_slopes
from dpo.huggingface.families import FAMILIES, classifier_architecture
from dpo.huggingface.gguf_architectures import ARCHITECTURES
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.saving import flatten, save_pretrained
from dpo.huggingface.text_models import read_config
from dpo.huggingface.weights import SafetensorsDirectory
from dpo.models.attention import NO_WINDOW
from dpo.models.drawing import SamplingConfig
from dpo.models.log_probs import token_log_probs
from dpo.models.rotary import ROPE_TYPES
from dpo.models.sampling import generate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LAYOUT_CASES = [
    "llama",
    "mistral",
    "gemma3_text",
    "smollm3",
    "gpt2",
    "gpt_neo",
    "opt",
    "falcon",
    "mpt",
    "lfm2",
    "gemma4_text",
]
"""One of every kind of positions and windows."""
QUICK = {"llama", "gemma3_text", "gpt2", "mpt", "lfm2"}
"""Rotary, windows, learned positions, ALiBi, convolutions: a family is a program, and is dear to compile."""


def for_ci(cases: Iterable[str]) -> list[Any]:
    """The cases as parameters; those that the quick suite leaves out are for CI."""
    return [pytest.param(case, marks=() if case in QUICK else pytest.mark.ci) for case in cases]


@pytest.fixture(scope="module")
def oracles():
    return json.loads(ORACLES.read_text())


def log_probs(model, hidden, targets):
    """Of the token after each hidden state."""
    out = token_log_probs(
        hidden.reshape(-1, hidden.shape[-1]),
        model.output_embedding,
        jnp.asarray(targets).reshape(-1),
        chunk=16,
        softcap=model.config.logit_softcap,
    )
    return np.asarray(out).reshape(targets.shape)


@pytest.mark.parametrize("case", for_ci(CASES))
def test_logits_and_log_probs_are_transformers(case, tmp_path, oracles):
    model = load_case(tmp_path, case)
    hidden = model.hidden(*batch_arrays(TOKENS))
    logits = np.asarray(model.logits(hidden[1, jnp.asarray([0, 11, 23])]))
    assert_allclose(logits[:, :8], oracles[case]["logits"], rtol=0, atol=2e-4)
    assert_allclose(log_probs(model, hidden[:, :-1], TOKENS[:, 1:]), oracles[case]["log_probs"], atol=2e-4)


@pytest.mark.parametrize("case", for_ci(LAYOUT_CASES))
def test_a_shared_group_scores_as_its_separate_sequences(case, tmp_path, oracles):
    """Prompt of 12, then the oracle's own continuation as branch 2 behind a sibling that must not be seen."""
    model = load_case(tmp_path, case)
    prompt, response, sibling = TOKENS[0, :12], TOKENS[0, 12:], (TOKENS[1, :9] + 3) % 89
    tokens = np.concatenate([prompt, sibling, response])[None]
    positions = np.concatenate([np.arange(12), 12 + np.arange(9), 12 + np.arange(12)])[None]
    branch = np.repeat([0, 1, 2], [12, 9, 12])[None]
    hidden = model.hidden(*map(jnp.asarray, (tokens, positions, np.ones_like(branch), branch)))
    source = np.concatenate([[11], 21 + np.arange(11)])
    scored = log_probs(model, hidden[:, source], response[None])
    assert_allclose(scored[0], oracles[case]["log_probs"][0][11:], atol=2e-4)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in LAYOUT_CASES]
)
def test_cached_decoding_is_the_whole_forward_pass(case, tmp_path):
    """Where decoding greedily is as transformers' (below), which CI runs for all of these, this holds too."""
    model = load_case(tmp_path, case)
    tokens, positions, *layout = batch_arrays(TOKENS)
    cache = model.init_cache(2, 30)
    first, cache = model.decode(tokens[:, :10], positions[:, :10], cache)
    second, cache = model.decode(tokens[:, 10:], positions[:, 10:], cache)
    whole = model.hidden(tokens, positions, *layout)
    assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-4)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.ci if c in LAYOUT_CASES else pytest.mark.slow) for c in CASES]
)
def test_greedy_decoding_is_transformers(case, tmp_path, oracles):
    model = load_case(tmp_path, case)
    # beyond the original length, rope scaling changes keys that are cached already: transformers recomputes
    original = min((rope.original_length or 64 for rope in model.config.ropes), default=64)
    expected = oracles[case]["greedy"][: original - 9]
    sampling = SamplingConfig(max_new_tokens=len(expected), temperature=0.0)
    assert generate(model, [TOKENS[0, :9].tolist()], sampling=sampling, seeds=[0], stop_tokens=[]) == [
        expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_seed_is_transformers(case):
    """Logits, log-probs of a shared layout, the export reopened by torch, and greedy tokens."""
    pytest.importorskip("torch")
    from parity import SEEDS, measure

    # Of float64, transformers is within 0.7e-4 and this decoder within 1.7e-4; seed 2 has 2.07e-4 between.
    limit = 2.5e-4 if case == "gemma" else 2e-4
    for seed in SEEDS:
        parity = measure(case, seed)
        assert max(parity.logits, parity.log_probs, parity.export) <= limit, (seed, parity)
        assert parity.agreed == parity.compared, (seed, parity)


@pytest.mark.parametrize("case", [case for case in CASES if "-" not in case])
def test_export_and_load_keep_every_bit(case, tmp_path):
    write_checkpoint(tmp_path / "in", case)
    model = load_decoder(open_checkpoint(tmp_path / "in"))
    save_pretrained(
        model, tmp_path / "out", hf_config=case_config(case), tokenizer=None, max_shard_size=20_000
    )
    before, after = open_checkpoint(tmp_path / "in"), open_checkpoint(tmp_path / "out")
    family, _ = read_config(before.config)
    first, second = before.tensors(family, []), after.tensors(family, [])
    assert first.shapes == second.shapes
    for name in first.shapes:
        np.testing.assert_array_equal(first.read(name), second.read(name))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tensors_have_the_names_that_transformers_writes(case, tmp_path):
    """Its modules may be named otherwise than what it writes and reads: LFM3's gates are."""
    pytest.importorskip("torch")
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[case.split("-")[0]].from_dict(case_config(case))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    write_checkpoint(tmp_path / "ours", case)
    ours, theirs = (SafetensorsDirectory(tmp_path / name).shapes for name in ("ours", "theirs"))
    assert ours == theirs


def test_every_family_has_a_case_and_a_line_in_the_documentation():
    assert {case.split("-")[0] for case in CASES} == set(FAMILIES)
    document = (ORACLES.parents[2] / "docs" / "models.md").read_text()
    assert [case for case in CASES if f"| {case} |" not in document] == []


def test_the_page_is_its_text_with_what_there_is_filled_in():
    """A change of the page alone would be gone when it is written the next time."""
    text = ORACLES.with_name("models_page.md").read_text(encoding="utf-8")
    pattern = re.sub(r"\\\{\\\{\\ (\w+)\\ \\\}\\\}", r"(?P<\1>.*?)", re.escape(text))
    page = (ORACLES.parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    filled = re.fullmatch(pattern, page, re.DOTALL)
    assert filled is not None
    assert filled["model_types"] == ", ".join(f"`{name}`" for name in FAMILIES)
    assert filled["gguf"] == ", ".join(f"`{name}`" for name in ARCHITECTURES)
    assert filled["rope_types"] == ", ".join(ROPE_TYPES)
    names = [classifier_architecture(name) for name in CLASSIFIERS]
    assert filled["classifiers"] == ", ".join(f"`{name}`" for name in names)


def test_an_unsupported_value_is_named_with_what_is_supported():
    with pytest.raises(ValueError, match=r"model_type 'bert' is not supported; supported: llama, mistral"):
        read_config({"model_type": "bert"})
    with pytest.raises(ValueError, match=r"scale_attn_weights is False; supported: True"):
        read_config({**case_config("gpt2"), "scale_attn_weights": False})
    for case in ("llama", "gpt2", "gemma3_text"):
        for given in (False, None):
            with pytest.raises(ValueError, match=rf"is_causal is {given}; supported: True"):
                read_config(case_config(case) | {"is_causal": given})
        assert read_config(case_config(case) | {"is_causal": True})
    with pytest.raises(ValueError, match=r"activation is 'mish'; supported: silu"):
        read_config({**case_config("llama"), "hidden_act": "mish"})
    with pytest.raises(ValueError, match="quantization_config is"):
        read_config({**case_config("llama"), "quantization_config": {"bits": 4}})


def test_a_rotation_is_what_the_familys_own_code_makes_of_it():
    """transformers' Llama reads no share of a head where nothing is scaled, and no original length."""

    def ropes(**changes):
        parameters = {"rope_type": "default", "rope_theta": 1e4, **changes}
        return read_config({**case_config("llama"), "rope_parameters": parameters})[1].ropes

    assert ropes(partial_rotary_factor=0.5) == ropes()
    assert len(ropes(rope_type="proportional", partial_rotary_factor=0.5)[0].inv_freq) == 4
    scaled = {"rope_type": "dynamic", "factor": 2.0}
    assert ropes(**scaled, original_max_position_embeddings=12) == ropes(**scaled)


def test_gemma3_does_not_cap_scores():
    """transformers 5.23 hands its configuration's cap to no attention of Gemma 3's, and to Gemma 2's."""
    caps = [
        read_config({**case_config(case), "attn_logit_softcapping": 2.0})[1].attention_softcap
        for case in ("gemma3_text", "gemma2")
    ]
    assert caps == [None, 2.0]


def test_a_mistral_with_kinds_of_layers_is_a_ministral(tmp_path):
    """As transformers 5.23 opens it (`AutoConfig`): of the layers some have the window, not all."""
    write_checkpoint(
        tmp_path, "mistral", layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    )
    config = open_checkpoint(tmp_path).config
    assert config["model_type"] == "ministral"
    assert read_config(config)[1].windows == (7, NO_WINDOW, 7)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "ministral"


def test_numbers_of_layers_are_no_parameters_and_part_of_the_weights(tmp_path):
    _, _, rest = nnx.split(load_case(tmp_path, "gemma4_text"), nnx.Param, ...)
    found = flatten(nnx.to_pure_dict(rest))
    kinds = ["attention", "global", "attention_kept", "global_kept", "attention_reader", "global_reader"]
    numbers = [(0, 1), (2,), (3,), (4,), (5,), (6,)]
    layers = {f"layers.{kind}.layer_scalar": each for kind, each in zip(kinds, numbers, strict=True)}
    assert found.keys() == layers.keys()
    stored = SafetensorsDirectory(tmp_path)
    for path, values in found.items():
        expected = [stored.read(f"model.layers.{layer}.layer_scalar") for layer in layers[path]]
        np.testing.assert_array_equal(values, expected)


def test_keys_and_values_that_readers_do_not_have_are_left_out(tmp_path):
    """Published files of Gemma 4 hold them; transformers passes over them too, and over nothing else."""
    directory = write_checkpoint(tmp_path, "gemma4_text")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")

    def add(*names: str) -> None:
        more = {f"model.layers.6.self_attn.{name}.weight": np.ones(10, np.float32) for name in names}
        safetensors.numpy.save_file(tensors | more, directory / "model.safetensors")

    add("v_proj", "k_norm")
    load_decoder(open_checkpoint(directory))
    add("v_proj", "r_proj")
    with pytest.raises(ValueError, match=r"configuration:\n  left over: model.layers.6.self_attn.r_proj"):
        load_decoder(open_checkpoint(directory))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enable_moe_block": True}, "enable_moe_block is True; supported: False"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; supported: None"),
        ({"vocab_size_per_layer_input": 90}, "vocab_size_per_layer_input is 90; supported: vocab_size, 89"),
        (
            {"num_kv_shared_layers": 6},
            "num_kv_shared_layers is 6; supported: at least one layer of each type",
        ),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config has intermediate_size"),
    ],
)
def test_what_of_gemma4_is_not_supported_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        read_config({**case_config("gemma4_text"), **changes})


def test_alibi_slopes_are_a_geometric_sequence():
    assert_allclose(alibi_slopes(8), [2.0**-h for h in range(1, 9)])
    assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
