"""Rotary positions turn channels by angles that are proportional to positions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from dpo.models.rotary import ROPE_TYPES, cos_sin, make_rope, no_rope, reversed_rope, rotate

DEFAULT = make_rope({"rope_type": "default", "rope_theta": 10000.0}, 8, 64)
DYNAMIC = make_rope({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 8, 4)
LONG = make_rope(
    {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4},
        **{"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "attention_factor": 1.0},
    },
    8,
    64,
)

CASES = json.loads(Path(__file__).with_name("rotary_values.json").read_text(encoding="utf-8"))
"""Types with transformers' cosines and sines of a text's last position, for a head of 16 and theta 10,000."""


def turn(x, rope, positions, group=None):
    positions = jnp.asarray(positions)[None]
    group = jnp.ones_like(positions) if group is None else jnp.asarray(group)[None]
    return rotate(x, *cos_sin(rope, positions, group))


def test_frequencies_are_powers_of_theta():
    assert_allclose(DEFAULT.inv_freq, 10000.0 ** (-np.arange(4) / 4), rtol=1e-6)


def test_scores_depend_on_the_difference_of_positions():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 3, 1, 8))
    near = (turn(q, DEFAULT, [5, 6, 7]) * turn(k, DEFAULT, [3, 1, 7])).sum(-1)
    far = (turn(q, DEFAULT, [25, 26, 27]) * turn(k, DEFAULT, [23, 21, 27])).sum(-1)
    assert_allclose(near, far, atol=1e-4)


@pytest.mark.parametrize("rope", [DEFAULT, DYNAMIC, LONG], ids=["default", "dynamic", "longrope"])
def test_the_reversed_rope_turns_back(rope):
    """In texts that are longer than the original length, too."""
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    assert_allclose(turn(turn(x, rope, [1, 5, 9]), reversed_rope(rope), [1, 5, 9]), x, atol=1e-5)


def test_partial_rotary_leaves_later_channels():
    rope = make_rope({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, 8, 64)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    turned = turn(x, rope, [1, 2, 3])
    assert_allclose(turned[..., 4:], x[..., 4:])
    assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_layers_without_positions_leave_all_channels():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    assert_allclose(turn(x, no_rope(DEFAULT), [1, 2, 3]), x)


def test_dynamic_scaling_depends_on_the_own_group_only():
    """A group within the original length is turned as without scaling, whatever it is packed with."""
    x = jnp.ones((1, 8, 1, 8))
    packed = turn(x, DYNAMIC, [0, 1, 2, 0, 1, 2, 3, 4], [1, 1, 1, 2, 2, 2, 2, 2])
    assert_allclose(packed[:, :3], turn(x[:, :3], DEFAULT, [0, 1, 2]), atol=1e-6)
    assert_allclose(packed[:, 3:], turn(x[:, 3:], DYNAMIC, [0, 1, 2, 3, 4]), atol=1e-6)
    assert np.abs(packed[:, 3:] - turn(x[:, 3:], DEFAULT, [0, 1, 2, 3, 4])).max() > 0.01


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']['rope_type']}-{case['length']}")
def test_every_type_turns_as_in_transformers(case):
    """The last position of a text, also of one that is longer than the type was made for."""
    position = jnp.full((1, 1), case["length"] - 1)
    rope = make_rope({"rope_theta": 10000.0, **case["kind"]}, 16, case["max_positions"])
    for name, found in zip(("cos", "sin"), cos_sin(rope, position, jnp.ones_like(position)), strict=True):
        assert_allclose(found[0, 0], case[name], atol=5e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']['rope_type']}-{case['length']}")
def test_the_stored_values_are_transformers(case):
    torch = pytest.importorskip("torch", reason="the oracle's frequencies are torch's")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=case["max_positions"],
        rope_parameters={"rope_theta": 10000.0, **case["kind"]},
    )
    position = torch.tensor([[case["length"] - 1]])
    for name, expected in zip(
        ("cos", "sin"), LlamaRotaryEmbedding(config)(torch.ones(1), position), strict=True
    ):
        assert_allclose(case[name], expected[0, 0, :8].numpy(), atol=1e-6)


def test_a_factor_that_is_not_given_is_that_of_the_lengths():
    parameters = {"rope_theta": 1e4, "rope_type": "yarn", "original_max_position_embeddings": 256}
    assert make_rope(parameters, 16, 1024) == make_rope({**parameters, "factor": 4.0}, 16, 1024)


def test_an_unknown_type_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=f"'spiral'; supported are {', '.join(ROPE_TYPES)}"):
        make_rope({"rope_type": "spiral"}, 8, 64)
