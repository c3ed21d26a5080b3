"""What can name a model, looked at without the libraries that open one."""

from __future__ import annotations

import re
from pathlib import Path

from dpo.huggingface.embedded import EMBEDDED_PREFIX, find_embedded
from dpo.huggingface.foreign_json import show
from dpo.outcomes import UserError
from dpo.regular_files import is_there, near_name

CONFIG_FILE = "adapter_config.json"
"""What a directory with adapters has."""


def require_model(source: str | Path, *, setting: str) -> None:
    """Refuse a source that is no model on this machine and cannot be one elsewhere; nothing is opened.

    Raises:
      UserError: naming the setting, what stands there, and what is allowed.
    """
    try:
        _require_model(source)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def _require_model(source: str | Path) -> None:
    path = expand_home(source)
    if str(source).startswith(EMBEDDED_PREFIX):
        find_embedded(str(source))
    elif path.is_dir():
        if not is_adapter(path):
            require_model_directory(path)
    elif (parts := split_on_base(source)) is not None:
        _require_model(parts[1])
    elif path.suffix != ".gguf" or not is_there(path):
        find_hub_id(source)


def expand_home(source: str | Path) -> Path:
    """A source as a path, `~` as the home directory.

    Raises:
      UserError: for what no path can be: a home of nobody, a zero in it, too many characters.
    """
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{show(str(source))} is no place that can be: {error}") from error
    return path


def find_hub_id(source: str | Path) -> tuple[str, str | None]:
    """Hub id and revision, where a source is neither here nor embedded.

    Raises:
      ValueError: when it cannot be a hub id, with what is allowed.
    """
    text, path = str(source), expand_home(source)
    if not path.is_dir() and is_there(path):
        raise UserError(f"{path} is a file; allowed are .gguf files, and directories with safetensors")
    hub_id, _, revision = text.partition("@")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id) and path.suffix != ".gguf":
        return hub_id, revision or None
    raise UserError(
        f"no model at {show(text)}{near_name(path)}; allowed: a directory, a .gguf file, a hub id "
        "(owner/name or owner/name@revision), embedded:<name>"
    )


def require_model_directory(directory: Path) -> None:
    """Refuse a directory that is no model, with the place in it where one is: a run's export, for one.

    Raises:
      UserError: where the directory has no config.json.
    """
    if (directory / "config.json").is_file():
        return
    inside = sorted(
        path
        for path in directory.iterdir()
        if path.suffix == ".gguf" or (path / "config.json").is_file() or is_adapter(path)
    )
    beside = f"; allowed: {' or '.join(map(str, inside[:3]))}" if inside else ""
    raise UserError(f"{directory} has no config.json{beside}")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, and no model."""
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def split_on_base(source: str | Path) -> tuple[Path, str] | None:
    """Adapter and base of "ADAPTER on BASE", whatever base the adapter names; None for any other source."""
    words = str(source).split(" on ")
    for place in range(1, len(words)):
        directory = Path(" on ".join(words[:place])).expanduser()
        if is_adapter(directory):
            return directory, " on ".join(words[place:])
    return None
