"""The tokenizer of any source, without its weights: of the hub, only the small files are fetched."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.files import CHECKSUMS_FILE, damaged_files
from dpo.huggingface.adapter_files import is_adapter, read_base
from dpo.huggingface.embedded import EMBEDDED_PREFIX, fetch_embedded
from dpo.huggingface.gguf_files import GgufFile
from dpo.outcomes import UserError

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""Patterns of all files of a model but its weights."""
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any source that `load_pretrained` takes."""
    if str(source).startswith(EMBEDDED_PREFIX):
        return GgufFile(fetch_embedded(str(source))).tokenizer()
    path = Path(source).expanduser()
    if path.is_dir():
        return _tokenizer_of_directory(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path).tokenizer()
    return _tokenizer_of_directory(fetch_files(*find_hub_id(source), TOKENIZER_FILES))


def _tokenizer_of_directory(directory: Path) -> PreTrainedTokenizerBase:
    if is_adapter(directory) and not (directory / "tokenizer_config.json").is_file():
        base = read_base(directory)
        try:
            return load_tokenizer(base)
        except ValueError as error:
            raise UserError(f"{directory} is an adapter of {base!r}: {error}") from error
    if not is_adapter(directory) and not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json")
    problems = damaged_files(directory, but_for=_WEIGHTS) if (directory / CHECKSUMS_FILE).is_file() else []
    if problems:
        raise UserError(
            f"{directory} is damaged ({'; '.join(problems)}); delete its {CHECKSUMS_FILE} if that was meant, "
            "or export it again"
        )
    return open_tokenizer(directory)


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Without code from the directory: transformers would otherwise ask whether to run it.

    Raises:
      ValueError: when there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads to
        raise UserError(
            f"{directory}: its tokenizer cannot be opened: {type(error).__name__}: {error}"
        ) from error


def find_hub_id(source: str | Path) -> tuple[str, str | None]:
    """Hub id and revision, where a source is neither here nor embedded.

    Raises:
      ValueError: when it cannot be a hub id, with what is allowed.
    """
    text, path = str(source), Path(source).expanduser()
    if path.is_file():
        raise UserError(f"{path} is a file; allowed are .gguf files, and directories with safetensors")
    hub_id, _, revision = text.partition("@")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id) and path.suffix != ".gguf":
        return hub_id, revision or None
    raise UserError(
        f"no model at {text!r}; allowed: a directory, a .gguf file, a hub id (owner/name or "
        "owner/name@revision), embedded:<name>"
    )


def fetch_files(hub_id: str, revision: str | None, patterns: tuple[str, ...] | list[str]) -> Path:
    """Files of a hub repository, at the newest commit or at a branch, tag or commit that is named.

    Raises:
      ValueError: when they could not be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id!r} is no directory here and could not be fetched from the Hugging Face hub: {error}"
        ) from error
