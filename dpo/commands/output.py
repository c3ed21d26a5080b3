"""What every command says and writes: plain lines, and figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.files import replace_text
from dpo.terminal import console


def print_plain(text: str) -> None:
    """Lines to standard output as they are, without markup; control characters show as symbols.

    A reader that has gone (`dpo report RUN | head`) is no error.
    """
    from dpo.training.progress import printed

    printed(lambda: console().print(text, markup=False, highlight=False, soft_wrap=True))


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Plain numbers and texts as an indented file, whole or not at all."""
    replace_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n", what="figures")
