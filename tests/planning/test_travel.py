"""Whole parameters and logits are found among collectives by their shapes."""

import dataclasses

import jax
import numpy as np
import pytest

from dpo.config import MeshConfig
from dpo.huggingface.shapes import read_shape
from dpo.huggingface.text_models import read_config
from dpo.parallel.sharding import PARAMETER_RULES, make_mesh
from dpo.planning.hlo import Collective, Program
from dpo.planning.travel import read_travel, split_parameters

DECODER = read_config(read_shape("shape:qwen3-0.6b"))[1]
L, D, F, V = 28, 1024, 3072, 151936
SHAPES = {
    "embed_tokens": {"embedding": (V, D)},
    "layers": {"mlp": {"gate_proj": {"kernel": (L, D, F)}}, "norm": {"scale": (L, D)}},
}
PARAMS = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def travel(*collectives, sizes=(1, 8, 1)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices())
    found = [Collective(kind, arrays, size, 8, 1) for kind, arrays, size in collectives]
    split = split_parameters(mesh, PARAMS, PARAMETER_RULES)
    return read_travel(Program(found, 0.0, 0), split, DECODER, mesh.shape)


def test_what_a_step_should_do_is_neither():
    """Layers, hidden states, pieces of the matrix and of its gradient, a bias and ids."""
    found = travel(
        ("all-gather", "bf16[1,128,3072]", 6291456),
        ("all-gather", "bf16[1,1024,1024]", 16777216),
        ("all-to-all", "f32[18992,8,128]", 1),
        ("reduce-scatter", "f32[151936,128]", 1),
        ("all-reduce", "f32[1,1024,3072], f32[1,1024]", 1),
        ("collective-permute", "bf16[1,64,3072]", 1),
        ("all-gather", "f32[18992]", 1),
        ("all-gather", "s32[8,18992]", 1),
    )
    assert found.parameters == []
    assert found.logits == []
    assert found.largest_gather is not None
    assert found.largest_gather.size == 16777216


@pytest.mark.parametrize(
    ("kind", "arrays", "path"),
    [
        ("all-gather", "f32[151936,128]", "['embed_tokens']['embedding']"),
        ("all-gather", "bf16[28,128,3072]", "['layers']['mlp']['gate_proj']['kernel']"),
        ("all-gather", "bf16[3584,3072], bf16[28,128,3072]", "['layers']['mlp']['gate_proj']['kernel']"),
        ("all-reduce", "bf16[1024,151936]", "['embed_tokens']['embedding']"),
        ("collective-permute", "f32[28,1024,3072]", "['layers']['mlp']['gate_proj']['kernel']"),
    ],
)
def test_a_parameter_that_becomes_whole_is_named(kind, arrays, path):
    assert travel((kind, arrays, 1)).parameters == [path]


def test_among_the_devices_of_fsdp_a_part_for_the_tensor_axis_is_whole():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices())
    shapes = split_parameters(mesh, PARAMS, PARAMETER_RULES)
    assert shapes["['layers']['mlp']['gate_proj']['kernel']"] == {(L, D, F), (L, D, F // 2)}
    assert list(shapes) == ["['embed_tokens']['embedding']", "['layers']['mlp']['gate_proj']['kernel']"]


@pytest.mark.parametrize("arrays", ["f32[8192,18992]", "bf16[1,512,151936]", "f32[8,64,18992], f32[4]"])
def test_logits_are_told_from_the_matrix(arrays):
    found = travel(("all-reduce", arrays, 1))
    assert found.logits is not None
    assert [c.arrays for c in found.logits] == [arrays]


def test_a_part_of_the_vocabulary_as_long_as_a_kernel_is_told_from_it():
    """SmolLM2-135M's 49,152 tokens in 32 parts are 1,536, its hidden units."""
    decoder = read_config(read_shape("shape:smollm2-135m"))[1]
    split = {"gate_proj": {(30, 576, 1536)}, "embed_tokens": {(49152, 576)}}
    mesh = {"data": 1, "fsdp": 32, "tensor": 1}
    kinds = [("collective-permute", "bf16[1,9,1536]"), ("all-gather", "bf16[1,18,1536]")]
    calm = [Collective(kind, arrays, 1, 32, 1) for kind, arrays in kinds]
    assert read_travel(Program(calm, 0.0, 0), split, decoder, mesh).logits == []
    loud = Collective("all-reduce", "f32[32768,1536]", 1, 32, 1)
    assert read_travel(Program([*calm, loud], 0.0, 0), split, decoder, mesh).logits == [loud]


def test_where_shapes_do_not_tell_nothing_is_said():
    decoder = dataclasses.replace(DECODER, vocab_size=8 * D)
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    assert read_travel(Program([], 0.0, 0), {}, decoder, mesh).logits is None


def test_without_fsdp_nothing_is_split_and_gradients_are_whole():
    found = travel(("all-reduce", "f32[151936,1024]", 1), sizes=(8, 1, 1))
    assert found.parameters == []
