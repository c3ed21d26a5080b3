"""The unbroken run that every broken one is compared with, and the process that forks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import Server, outcome

from dpo.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Where runs are forked."""
    server = Server(tmp_path_factory.mktemp("compiled"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def make_config(tmp_path_factory, tiny_model_dir):
    """Of a directory, a run in it: nine steps of four prompts, three epochs of twelve, two micro-batches."""
    data = tmp_path_factory.mktemp("data")
    for name, num_rows in (("train", 12), ("eval", 5)):
        rows = [
            {
                "prompt": f"{name} number {i}",
                "responses": ["yes, very good", "perhaps", "no"][: 2 + i % 2],
                "ranks": [1, 2, 3][: 2 + i % 2],
            }
            for i in range(num_rows)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(run_dir: Path, **training) -> Config:
        settings = {"batch_size": 4, "micro_batches": 2, "epochs": 3.0, "eval_every": 3, "save_every": 1}
        return Config(
            run_dir=str(run_dir),
            model=ModelConfig(
                source=str(tiny_model_dir),
                reference_store=str(run_dir.parent / "reference"),
                attention="plain",  # the quickest to trace
            ),
            data=DataConfig(train=str(data / "train.jsonl"), eval=str(data / "eval.jsonl"), max_length=128),
            objective={"name": "dpo", "beta": 0.5},
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.1),
            training=TrainingConfig(**{**settings, **training}),
        )

    return make


@pytest.fixture(scope="session")
def unbroken(server, make_config, tmp_path_factory):
    """The run that nothing happened to."""
    config = make_config(tmp_path_factory.mktemp("unbroken") / "run")
    assert server.run(config) == 0, server.printed(config)
    return config


@pytest.fixture(scope="session")
def expected(unbroken):
    """What it came to."""
    return outcome(unbroken)
