"""Two real steps of SmolLM2-135M-Instruct with every objective, on the shipped preferences."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from dpo.losses import OBJECTIVES
from dpo.losses.objectives import UNPAIRED
from dpo.training import preparation
from dpo.training.loop import train

SHIPPED = Path(__file__).parents[2] / "data" / "sentiment_train.jsonl"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One directory for all objectives, so that they share a reference store."""
    return tmp_path_factory.mktemp("objectives")


def as_labels(path):
    """The best and the worst response of each prompt as rated single responses."""
    rows = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()[:8]]
    labelled = [
        {"prompt": row["prompt"], "completion": row["responses"][k], "label": k == 0}
        for i, row in enumerate(rows)
        for k in ((0,) if i % 2 else (-1,))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_steps(name, directory, monkeypatch):
    make_mesh = preparation.make_mesh
    monkeypatch.setattr(preparation, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    data = as_labels(directory / "labels.jsonl") if name in UNPAIRED else str(SHIPPED)
    config = Config(
        run_dir=str(directory / name),
        data=DataConfig(train=data, eval=None, max_train=8, max_length=256),
        objective={"name": name},
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_fraction=0.0, schedule="constant"),
        training=TrainingConfig(batch_size=4, steps=2),
    )
    result = train(config)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses, norms = ([line[key] for line in lines] for key in ("loss", "grad_norm"))
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert np.all(np.asarray(norms) > 0)
    (result.run_dir / "export" / "model.safetensors").unlink()
