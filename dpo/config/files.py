"""Settings as a file."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import yaml

from dpo.config.experiments import DiffusionConfig
from dpo.config.run import Config


def save_config(config: Config | DiffusionConfig, path: str | Path) -> None:
    """Write every setting as YAML; `dpo train --config PATH` repeats the run."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    beside = Path(f"{path}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
