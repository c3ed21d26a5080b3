"""Every setting: frozen dataclasses, one comment a field. Nothing else holds defaults.

Range checks live in `__post_init__`, so that a bad value stops a command before anything is loaded.
"""

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
)
from dpo.config.experiments import (
    DiffusionConfig,
    FrontierConfig,
)
from dpo.config.files import (
    save_config,
)
from dpo.config.run import (
    Config,
    DataConfig,
    DistributedConfig,
    IdentityKind,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

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
    "save_config",
]
