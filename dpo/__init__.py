"""Preference optimisation (DPO, its relatives, Plackett-Luce) of causal language models in JAX.

    import dpo

    model = dpo.load("embedded:smollm2-135m-instruct")     # a directory, hub id, GGUF file, adapter, or run
    print(model.generate(["Write one sentence about rain."])[0])
    scored = model.score(["Is it raining?"], ["Yes."])     # .logps, .token_logps, .token_ids, .lengths

    config = dpo.Config(run_dir="runs/mine", data=dpo.DataConfig(train="train.jsonl", eval="eval.jsonl"))
    result = dpo.train(config)                             # all that `dpo train` does
    rewards = dpo.implicit_rewards(dpo.load("runs/mine"), model, rows, beta=0.1)

`dpo.python` says what each takes and returns, `dpo.config` has every setting, docs/python.md shows them.
What is not named here or there may change from version to version.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.config import (
        Config,
        DataConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        TrainingConfig,
    )
    from dpo.losses import OBJECTIVES, Objective
    from dpo.python import ImplicitRewards, LanguageModel, Scored, implicit_rewards, load, train

__all__ = [
    "OBJECTIVES",
    "Config",
    "DataConfig",
    "ImplicitRewards",
    "LanguageModel",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "Scored",
    "TrainingConfig",
    "implicit_rewards",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import dpo` alone is quick, and the commands import what they need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "config" if name.endswith("Config") else "python")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


_HOMES = {"OBJECTIVES": "losses", "Objective": "losses"}


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
