"""Settings: frozen dataclasses with a default and a docstring a field.

An objective's hyper-parameters have their defaults where it stands (`dpo.losses`).

Range checks live in `__post_init__`, so that a bad value stops a command before anything is loaded.
"""

from dataclasses import asdict, fields
from pathlib import Path

import yaml

from dpo.config.commands import (
    EndpointConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    PlanConfig,
    ReportConfig,
    WatchConfig,
    WinrateConfig,
    heldout_settings,
    reference_source,
    starting_source,
    with_options,
)
from dpo.config.data import DataConfig
from dpo.config.experiments import (
    DiffusionConfig,
    FrontierConfig,
)
from dpo.config.model import LoraConfig, ModelConfig
from dpo.config.run import (
    Config,
    DistributedConfig,
    IdentityKind,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from dpo.files import replace_text

__all__ = [
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "DistributedConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FrontierConfig",
    "GenerateConfig",
    "IdentityKind",
    "InspectConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "ReportConfig",
    "TrainingConfig",
    "WatchConfig",
    "WinrateConfig",
    "heldout_settings",
    "is_config",
    "reference_source",
    "save_config",
    "starting_source",
    "with_options",
]


def save_config(config: Config | DiffusionConfig, path: str | Path) -> None:
    """Write every setting as YAML, whole or not at all; with another run_dir it repeats the run."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    replace_text(Path(path), text, what="the settings")


def is_config(kind: type, path: Path) -> bool:
    """Whether a file holds every setting of a kind and nothing else, as `save_config` leaves it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.keys() == {field.name for field in fields(kind)}
