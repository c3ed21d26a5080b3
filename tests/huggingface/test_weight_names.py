"""Tensors that hold several projections: cut and joined, stacked or not, of kernels and of biases."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from tiny_models import case_config

from dpo.huggingface import weight_names
from dpo.huggingface.families import FAMILIES
from dpo.huggingface.text_models import read_config
from dpo.huggingface.weight_names import Fusion
from dpo.models.decoder_config import DecoderConfig

LAYER = "model.layers.{layer}."
LEADING = [(), (5,), (3, 5)]
"""Of a bias, a kernel, and kernels of all layers."""


def small_config() -> DecoderConfig:
    """Six heads of four channels on two; two key heads of three and four value heads of five."""
    config = read_config(case_config("qwen3_next"))[1]
    assert config.delta is not None
    delta = dataclasses.replace(config.delta, num_key_heads=2, num_value_heads=4, key_dim=3, value_dim=5)
    return dataclasses.replace(config, num_heads=6, num_kv_heads=2, head_dim=4, delta=delta)


CONFIG = small_config()


def fusions() -> dict[str, Fusion]:
    """Every fusion of any family, by the family's rules and the tensor's name."""
    return {
        f"{name}-{rule.theirs}": rule.fusion
        for name, rules in vars(weight_names).items()
        if name.endswith("_RULES")
        for rule in rules
        if rule.fusion is not None
    }


FUSIONS = fusions()


@pytest.mark.parametrize("name", FUSIONS)
def test_what_is_split_is_joined_again(name):
    size = 52 if "qkvz" in name else 40 if "q" in name.lower() else 24
    for leading in LEADING:
        tensor = np.arange(size * np.prod(leading, dtype=int)).reshape(*leading, size)
        parts = FUSIONS[name].split(tensor, CONFIG)
        assert all(part.shape[:-1] == leading for part in parts)
        assert_array_equal(FUSIONS[name].join(parts, CONFIG), tensor)


def channels(fusion: Fusion, size: int) -> list[list[int]]:
    """The numbers of the channels that each part has, the same whatever leads."""
    found = []
    for leading in LEADING:
        parts = fusion.split(np.broadcast_to(np.arange(size), (*leading, size)), CONFIG)
        found.append([part.reshape(-1, part.shape[-1])[0].tolist() for part in parts])
        assert all((part == part.reshape(-1, part.shape[-1])[0]).all() for part in parts)
    assert found[0] == found[1] == found[2]
    return found[0]


def test_queries_keys_and_values_follow_one_another():
    q, k, v = channels(FUSIONS[f"PHI3_RULES-{LAYER}self_attn.qkv_proj"], 40)
    assert (q, k, v) == (list(range(24)), list(range(24, 32)), list(range(32, 40)))


def test_each_key_and_value_head_comes_with_its_queries():
    q, k, v = channels(FUSIONS["GPT_NEOX_RULES-gpt_neox.layers.{layer}.attention.query_key_value"], 40)
    assert q == [*range(12), *range(20, 32)]
    assert (k, v) == ([*range(12, 16), *range(32, 36)], [*range(16, 20), *range(36, 40)])


def test_channels_that_turn_together_are_set_apart():
    """2j and 2j + 1 of every head become j and j + n."""
    (q,) = channels(FUSIONS[f"ERNIE_RULES-{LAYER}self_attn.q_proj"], 8)
    assert q == [0, 2, 1, 3, 4, 6, 5, 7]


def test_each_query_head_comes_with_its_gate():
    q, gate = channels(FUSIONS[f"QWEN35_RULES-{LAYER}self_attn.q_proj"], 16)
    assert (q, gate) == ([*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)])


def test_each_key_head_comes_with_what_belongs_to_it():
    """Two value heads of five channels to a key head of three."""
    fusion = FUSIONS[f"QWEN3_NEXT_RULES-{LAYER}linear_attn.in_proj_qkvz"]
    q, k, v, z = channels(fusion, 2 * (3 + 3 + 10 + 10))
    assert (q, k) == ([0, 1, 2, 26, 27, 28], [3, 4, 5, 29, 30, 31])
    assert (v, z) == ([*range(6, 16), *range(32, 42)], [*range(16, 26), *range(42, 52)])
    fusion = FUSIONS[f"QWEN3_NEXT_RULES-{LAYER}linear_attn.in_proj_ba"]
    assert channels(fusion, 8) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    fusion = FUSIONS[f"QWEN35_RULES-{LAYER}linear_attn.in_proj_qkv"]
    assert channels(fusion, 32) == [[*range(6)], [*range(6, 12)], [*range(12, 32)]]


def test_modules_are_those_of_transformers_whatever_files_call_them():
    names = {rule.theirs: rule.module_of(f"{rule.theirs}.weight") for rule in weight_names.LFM3_RULES}
    assert names[f"{LAYER}self_attn.gate_proj"] == f"{LAYER}self_attn.g_proj"
    assert names[f"{LAYER}self_attn.q_proj"] == f"{LAYER}self_attn.q_proj"


PAGE = Path(__file__).resolve().parents[2] / "docs" / "lora.md"
SPELLED = {
    "falcon": "Falcon",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "granitemoehybrid": "Granite's hybrid",
    "lfm2": "LFM2",
    "lfm3": "LFM3",
    "mpt": "MPT",
    "phi3": "Phi-3",
    "qwen3_5_text": "Qwen3.5",
    "qwen3_next": "Qwen3-Next",
}
"""Families in the words of docs/lora.md."""


def test_the_page_names_the_families_whose_linears_hold_several_projections() -> None:
    """An adapter is one on such a linear; Falcon's rules are a function of its configuration."""
    fused = {
        name
        for name, family in FAMILIES.items()
        if callable(family.rules) or any(len(rule.ours) > 1 for rule in family.rules)
    }
    assert fused == SPELLED.keys()
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    listed = text.partition("stores several projections in one linear (")[2].partition(")")[0]
    assert sorted(listed.replace(" and ", ", ").split(", ")) == sorted(SPELLED.values())
