"""What commands write besides a run: figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.files import replace_text


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Plain numbers and texts as an indented file, whole or not at all."""
    replace_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n", what="figures")
