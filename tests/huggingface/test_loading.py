"""Weights go straight to where they live: the same numbers under any sharding, and never twice in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal
from tiny_models import CASES, write_checkpoint

from dpo.huggingface import loading
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.weights import SafetensorsDirectory

BASES = [case for case in CASES if "-" not in case]


def parameters(model):
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def last_axis_over(mesh, axis):
    """Split the last dimension where it divides, else leave the parameter whole."""

    def place(path, shape):
        fits = shape[-1] % mesh.shape[axis] == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), axis if fits else None))

    return place


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))


@pytest.mark.parametrize("case", BASES)
def test_a_sharded_model_has_the_same_numbers(case, tmp_path, mesh, monkeypatch):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, case))
    expected = parameters(load_decoder(checkpoint))
    monkeypatch.setattr(loading, "MAX_PIECE_BYTES", 1000)
    place = last_axis_over(mesh, "fsdp")
    for path, array in parameters(load_decoder(checkpoint, placement=place)).items():
        assert array.sharding == place("", array.shape)
        assert_array_equal(array, expected[path])


def test_every_element_is_read_once_for_all_devices(tmp_path, mesh, monkeypatch):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"))
    read, counted = SafetensorsDirectory.read, []

    def count(self, name, rows=slice(None)):
        values = read(self, name, rows)
        counted.append(values.size)
        return values

    monkeypatch.setattr(SafetensorsDirectory, "read", count)
    model = load_decoder(checkpoint, placement=last_axis_over(mesh, "fsdp"))
    assert sum(counted) == sum(array.size for array in parameters(model).values())


def test_a_process_reads_only_the_rows_of_its_shards():
    """Rows of a transposed matrix are columns here: a quarter of them, and no other, are asked for."""

    class OneOfFour(jax.sharding.Sharding):
        def addressable_devices_indices_map(self, shape):
            return {"cpu": (slice(None), slice(shape[1] // 4, shape[1] // 2))}

    target = loading._Target((8, 16), np.dtype(np.float32), OneOfFour())
    assert [start for start in range(0, 16, 2) if target.wants(((0, 8), (start, start + 2)))] == [4, 6]


def write_sparse_model(directory: Path, layers: int = 4) -> int:
    """A Llama of zeros, 100 million parameters in float32, that takes no room on disk; their number."""
    D, F, V = 1024, 4096, 32768
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{at}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)
    config = {"model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16}
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return position // 4


MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder, read_config

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

directory, dtype, devices = sys.argv[1], jnp.dtype(sys.argv[2]), int(sys.argv[3])
checkpoint = open_checkpoint(directory)
mesh = Mesh(np.asarray(jax.devices()[:devices]), ("fsdp",))

def place(path, shape):
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp"))

read_config(checkpoint.config)  # transformers imports what it needs, torch too where it is installed
jnp.zeros(8).block_until_ready()
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = memory("VmRSS")
model = load_decoder(checkpoint, param_dtype=dtype, placement=place if devices > 1 else None)
print(memory("VmHWM") - before)
"""


@pytest.mark.as_users
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(("dtype", "devices"), [("float32", 1), ("bfloat16", 1), ("float32", 4)])
def test_peak_host_memory_is_at_most_1_3_times_the_model(dtype, devices, tmp_path):
    size = write_sparse_model(tmp_path) * jnp.dtype(dtype).itemsize
    flags = f"--xla_force_host_platform_device_count={devices}"
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype, str(devices)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    ratio = int(found.stdout) / size
    print(f"{dtype} on {devices}: growth of the peak is {ratio:.3f} of {size / 1e6:.0f} MB")
    assert 0.9 < ratio <= 1.3
