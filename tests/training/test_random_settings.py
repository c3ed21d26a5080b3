"""Settings together, drawn by seed: what only rounds otherwise agrees, and a stop changes nothing."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from stopping import stop_after

from dpo.config import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dpo.losses import OBJECTIVES
from dpo.losses.objectives import LISTWISE, UNPAIRED
from dpo.parallel.sharding import make_mesh
from dpo.training import preparation
from dpo.training.loop import train

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DRAWS, STEPS = 300, 6
OFTEN = range(12)
"""Draws that are trained with every change; the others when somebody asks."""
TOLERANCE = 2e-4
"""Largest difference of a metric, relative to it where it is above one, between settings that only round."""
MODIFIED: dict[str, Any] = {"ld_alpha": 0.5, "wpo": True}
"""Modifiers that can be added to the objectives that admit them."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def draw(number: int, directory: Path, model: Path) -> Config:
    """One setting of everything that a run's numbers come from."""
    rng = random.Random(number)
    name = rng.choice([*OBJECTIVES])
    objective: dict[str, Any] = {"name": name}
    modifiers = [key for key in MODIFIED if key in OBJECTIVES[name]().admits]
    if modifiers and rng.random() < 0.5:
        key = rng.choice(modifiers)
        objective[key] = MODIFIED[key]
    data = directory / "train.jsonl"
    rows = labels(rng) if name in UNPAIRED else rankings(rng, most=4 if name in LISTWISE else 3)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        run_dir=str(directory / "one"),
        model=ModelConfig(
            source=str(model),
            attention="plain",
            reference_store=str(directory / "reference"),
        ),
        data=DataConfig(train=str(data), eval=None, max_length=128),
        objective=objective,
        lora=LoraConfig(rank=rng.choice([None, 4])),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, schedule="constant"),
        training=TrainingConfig(batch_size=rng.choice([2, 4]), steps=STEPS, seed=number),
    )


def labels(rng: random.Random) -> list[dict[str, Any]]:
    """Labelled single responses."""
    return [
        {"prompt": words(rng), "completion": words(rng), "label": bool((i + rng.randrange(2)) % 2)}
        for i in range(12)
    ]


def rankings(rng: random.Random, *, most: int) -> list[dict[str, Any]]:
    """Pairs and rankings, some with ties and scores of all."""
    rows = []
    for _ in range(12):
        count = rng.randint(2, most)
        ranks = [1, *(rng.randint(1, count) for _ in range(count - 2)), count]
        responses = [f"{words(rng)} {i}" for i in range(count)]
        scores = [float(count - rank) for rank in ranks]
        rows.append({"prompt": words(rng), "responses": responses, "ranks": ranks, "scores": scores})
    return rows


def words(rng: random.Random) -> str:
    return " ".join(rng.choice(["yes", "perhaps", "no", "very", "good"]) for _ in range(rng.randint(1, 8)))


def rounded_otherwise(config: Config, number: int) -> Config:
    """The same run in another layout, other parts of a batch, other blocks, other saved values."""
    rng = random.Random(-1 - number)
    micro = [n for n in (1, 2) if n <= config.training.batch_size]
    whole = OBJECTIVES[config.objective["name"]]().whole_batch
    return dataclasses.replace(
        config,
        run_dir=f"{config.run_dir}-otherwise",
        model=dataclasses.replace(
            config.model,
            remat=rng.choice(["none", "dots", "full"]),
            log_prob_chunk=rng.choice([16, 64, 1024]),
        ),
        data=dataclasses.replace(config.data, layout=rng.choice(["padded", "packed", "shared"])),
        training=dataclasses.replace(config.training, micro_batches=1 if whole else rng.choice(micro)),
    )


def metrics(config: Config) -> list[dict[str, float]]:
    """Lines of the steps without what the clock or the layout decides."""
    lines = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    other = ("seconds", "tokens/s", "fill")
    return [{name: value for name, value in line.items() if name not in other} for line in lines]


def largest_difference(config: Config, other: Config) -> tuple[float, str]:
    """Of all metrics but accuracies, which are steps of δ's sign, and where it is."""
    found = [(0.0, "nowhere")]
    for ours, theirs in zip(metrics(config), metrics(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"rewards/accuracies"}:
            if np.isnan(ours[name]) and np.isnan(theirs[name]):
                continue
            difference = abs(ours[name] - theirs[name]) / max(1.0, abs(ours[name]))
            found.append((float(difference), f"{name} of step {ours['step']}: {ours[name]}, {theirs[name]}"))
    return max(found, key=lambda pair: pair[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[pytest.mark.ci] if n in OFTEN else []) for n in range(DRAWS)]
)
def test_settings_that_differ_in_rounding_only_agree_and_a_stopped_run_has_the_same_bits(
    number, tmp_path, tiny_model_dir, monkeypatch, capsys
):
    config = draw(number, tmp_path, tiny_model_dir)
    other = rounded_otherwise(config, number)
    for one in (config, other):
        assert train(one).status == "finished"
    difference, where = largest_difference(config, other)
    with capsys.disabled():
        print(f"{number}: {config.objective}, {other.data.layout}: {difference:.1e}", flush=True)
    assert difference <= TOLERANCE, (where, config, other)

    stopped = dataclasses.replace(config, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as stopping:
        stop_after(random.Random(number).randint(1, STEPS - 1), stopping)
        assert train(stopped).status == "interrupted"
    assert train(stopped).status == "finished"
    assert metrics(stopped) == metrics(config)
    ours, theirs = (load_file(Path(c.run_dir) / "export" / "model.safetensors") for c in (config, stopped))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
