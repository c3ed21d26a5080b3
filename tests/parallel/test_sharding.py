import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dpo.config import MeshConfig
from dpo.parallel.sharding import make_mesh, own_mesh, parameter_sharding, row_multiple


def specs(mesh, shapes):
    leaves = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return {name: sharding.spec for name, sharding in parameter_sharding(mesh, leaves).items()}


def test_minus_one_takes_the_rest_of_the_devices():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert row_multiple(mesh) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "3 places for 8 devices"),
        ((-1, -1, 1), "at most one size"),
        ((-1, 3, 1), "6 places for 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(*sizes), jax.devices()[:8])


def test_what_a_run_left_is_read_on_whatever_devices_there_are():
    """A run of sixteen devices is exported on the eight that tests see; one that fits them keeps its mesh."""
    assert dict(own_mesh(MeshConfig(data=2, fsdp=8)).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(own_mesh(MeshConfig(data=2, fsdp=-1)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(own_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_each_role_has_its_axes_and_the_layer_axis_stays_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    found = specs(
        mesh,
        {
            "layers.self_attn.q_proj.kernel": (3, 8, 16),
            "layers.mlp.down_proj.kernel": (3, 16, 8),
            "embed_tokens.embedding": (32, 8),
            "layers.input_layernorm.scale": (3, 8),
        },
    )
    assert found == {
        "layers.self_attn.q_proj.kernel": PartitionSpec(None, "fsdp", "tensor"),
        "layers.mlp.down_proj.kernel": PartitionSpec(None, "tensor", "fsdp"),
        "embed_tokens.embedding": PartitionSpec("tensor", "fsdp"),
        "layers.input_layernorm.scale": PartitionSpec(None, None),
    }


def test_a_dimension_that_an_axis_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    assert specs(mesh, {"q_proj.kernel": (6, 4)})["q_proj.kernel"] == PartitionSpec(None, "tensor")
