"""A run goes on with other devices, hosts or micro-batches than it began with."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file
from stopping import stop_after

from dpo.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dpo.parallel.sharding import make_mesh
from dpo.training import preparation
from dpo.training.loop import train

ONE = (1, 1, 1)


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    """Six steps on made-up rankings."""
    data = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"number {i}", "responses": ["yes, very good", "perhaps", "no"][: 2 + i % 2]}
        for i in range(12)
    ]
    data.write_text(
        "".join(json.dumps(row | {"ranks": [1, 2, 3][: 2 + i % 2]}) + "\n" for i, row in enumerate(rows))
    )
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(source=str(tiny_model_dir), reference_store=str(tmp_path / "reference")),
        data=DataConfig(train=str(data), eval=None, max_length=128),
        objective={"name": "plackett_luce", "beta": 0.5},
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-2, warmup_fraction=0.0, schedule="constant"),
        training=TrainingConfig(batch_size=8, steps=6),
    )


def on(config, sizes, name):
    return dataclasses.replace(config, mesh=MeshConfig(*sizes), run_dir=config.run_dir.replace("run", name))


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """As many of the eight devices as the mesh has places."""

    def make(mesh):
        return make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])

    monkeypatch.setattr(preparation, "make_mesh", make)


def results(config):
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    metrics = [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s", "fill")} for row in rows]
    return metrics, load_file(f"{config.run_dir}/export/model.safetensors")


def train_in_two_parts(config, first, second, monkeypatch):
    stop_after(3, monkeypatch)
    assert train(on(config, first, "parts")).status == "interrupted"
    assert train(on(config, second, "parts")).status == "finished"
    return results(on(config, second, "parts"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(ONE, (1, 8, 1), marks=pytest.mark.slow),
        pytest.param((1, 4, 2), (8, 1, 1), marks=pytest.mark.ci),
        pytest.param((2, 2, 2), ONE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_of_one_mesh_goes_on_on_another(first, second, config, monkeypatch):
    whole = on(config, ONE, "whole")
    train(whole)
    metrics, weights = train_in_two_parts(config, first, second, monkeypatch)
    expected_metrics, expected = results(whole)
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        for name in theirs.keys() - {"rewards/accuracies"}:  # δ is 0 at first
            assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name, array in expected.items():
        assert_allclose(weights[name], array, atol=1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.as_users
def test_on_the_same_mesh_the_bits_are_the_same(config, monkeypatch):
    whole = on(config, (1, 4, 2), "whole")
    train(whole)
    metrics, weights = train_in_two_parts(config, (1, 4, 2), (1, 4, 2), monkeypatch)
    expected_metrics, expected = results(whole)
    assert metrics == expected_metrics
    for name, array in expected.items():
        assert_array_equal(weights[name], array, err_msg=name)
