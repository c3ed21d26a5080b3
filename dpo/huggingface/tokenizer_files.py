"""The tokenizer of any source, without its weights: of the hub, only the small files are fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.files import CHECKSUMS_FILE, damaged_files
from dpo.hub_names import named_by
from dpo.huggingface.adapter_files import read_base
from dpo.huggingface.config_rules import check_config
from dpo.huggingface.embedded import EMBEDDED_PREFIX, fetch_embedded
from dpo.huggingface.foreign_json import find_problem, read_small_json, require_file, show
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.model_names import (
    CONFIG_FILE,
    expand_home,
    find_hub_id,
    is_adapter,
    require_model_directory,
    split_on_base,
)
from dpo.huggingface.tokenizer_settings import check_tokenizer_file
from dpo.limited import look
from dpo.outcomes import UserError, raising_user_errors
from dpo.proxies import check_proxies

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""Patterns of all files of a model but its weights."""
WORKER = Path(__file__).with_name("tokenizer_worker.py")
_TRIED: set[tuple[str, int, int]] = set()
"""Files and directories that were tried, with size and time."""
_OF_MODELS = {
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
    ".gitattributes",
    CHECKSUMS_FILE,
}
"""Files that say nothing of a tokenizer."""
_MORE_TEMPLATES = "additional_chat_templates"
"""A directory in which transformers looks for templates by name."""
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_WRITES = 1 << 12
"""Bytes of a file that the process may write: what transformers imports looks for a place for such ones."""


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any source that `load_pretrained` takes."""
    if str(source).startswith(EMBEDDED_PREFIX):
        return GgufFile(fetch_embedded(str(source))).tokenizer()
    path = expand_home(source)
    if path.is_dir():
        return _tokenizer_of_directory(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path).tokenizer()
    if (parts := split_on_base(source)) is not None:
        directory, base = parts
        has_own = (directory / "tokenizer_config.json").is_file()
        return _tokenizer_of_directory(directory) if has_own else load_tokenizer(base)
    return _tokenizer_of_directory(fetch_files(*find_hub_id(source), TOKENIZER_FILES), offline=False)


def _tokenizer_of_directory(directory: Path, *, offline: bool = True) -> PreTrainedTokenizerBase:
    if is_adapter(directory) and not (directory / "tokenizer_config.json").is_file():
        base = read_base(directory)
        try:
            found = find_base(directory, base, TOKENIZER_FILES, offline=offline)
            return load_tokenizer(base) if found is None else _tokenizer_of_directory(found)
        except ValueError as error:
            raise UserError(f"{directory} is an adapter of {show(base)}: {error}") from error
    if not is_adapter(directory):
        require_model_directory(directory)
    problems = (
        damaged_files(directory, but_for=_WEIGHTS) if os.path.lexists(directory / CHECKSUMS_FILE) else []
    )
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
    _check_files(directory)
    with raising_user_errors(f"{directory}: its tokenizer cannot be opened"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except ValueError as error:
            raise (
                UserError(f"{directory}/{_OWN_CODE}") if _asks_to_run_code(str(error)) else error
            ) from error
    _check_templates(directory, tokenizer.chat_template)
    return tokenizer


def _check_files(directory: Path) -> None:
    """What transformers reads is regular, of a size that it can have, and JSON that can be written again."""
    settings: dict[str, Any] = {}
    for name in _OBJECTS:
        if os.path.lexists(directory / name):
            values = read_small_json(directory / name)
            if name == "tokenizer_config.json":
                settings = values
            check = check_config if name == "config.json" else check_tokenizer_file
            check(directory / name, values)
    for name, most in _LARGEST.items():
        if os.path.lexists(directory / name):
            require_file(directory / name, most)
    for path in sorted((directory / _MORE_TEMPLATES).glob("*.jinja")):
        require_file(path, _LARGEST["chat_template.jinja"])
    if (directory / "tokenizer.json").is_file() and "fast_tokenizer_files" not in settings:
        _try(directory / "tokenizer.json")
    else:
        _try_directory(directory)


def _try_directory(directory: Path) -> None:
    """The same of what transformers makes of other files, whatever their names are."""
    paths = [one for one in sorted(directory.iterdir()) if not one.is_dir() and one.suffix not in _WEIGHTS]
    if all(path.name in _OF_MODELS or path.name.endswith(".index.json") for path in paths):
        raise UserError(
            f"{directory} has no tokenizer; allowed: a tokenizer.json, or another vocabulary with its "
            "tokenizer_config.json, beside the weights"
        )
    for path in paths:
        require_file(path, _LARGEST["tokenizer.json"])
    _try(directory)


def _try(path: Path) -> None:
    """Have a limited process make tokens with a file or a directory, once for each as it is.

    Raises:
      UserError: where that fails, or what its rules could make of a text has no bound.
    """
    paths = (
        [path, *(one for one in path.iterdir() if one.suffix not in _WEIGHTS)] if path.is_dir() else [path]
    )
    found = [one.stat() for one in paths]
    key = (str(path.resolve()), sum(one.st_size for one in found), max(one.st_mtime_ns for one in found))
    if key not in _TRIED:
        said = look(WORKER, {"path": key[0]}, size=key[1], writes=_WRITES)
        if "error" in said:
            reason = " ".join(str(said["error"]).split())  # transformers' takes five lines
            if _asks_to_run_code(reason):
                raise UserError(f"{path}/{_OWN_CODE}")
            raise UserError(f"{path}: its tokenizer cannot be opened: {reason}")
        _TRIED.add(key)


_OWN_CODE = (
    "tokenizer_config.json: auto_map names code of the tokenizer's own, which is not run; allowed is a "
    "tokenizer_class of transformers, or none beside a tokenizer.json"
)


def _asks_to_run_code(reason: str) -> bool:
    return "trust_remote_code" in reason


def _check_templates(directory: Path, templates: Any) -> None:
    """They are files of their names where the tokenizer is written again."""
    if templates is None:
        return
    named = templates if isinstance(templates, dict) else {"default": templates}
    for name, text in named.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
            raise UserError(
                f"{directory}: a chat template is named {show(name)}; allowed are letters, digits, _, - and ."
            )
        if not isinstance(text, str) or find_problem(text):
            raise UserError(f"{directory}: its chat template {name} is {show(text)}; allowed is a text")


_OBJECTS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LARGEST = {
    "tokenizer.json": 1 << 28,
    "vocab.json": 1 << 26,
    "merges.txt": 1 << 26,
    "vocab.txt": 1 << 26,
    "tokenizer.model": 1 << 26,
    "chat_template.jinja": 1 << 22,
    "chat_template.json": 1 << 24,
}
"""Bytes of each file."""


def find_base(directory: Path, base: str, patterns: Sequence[str], *, offline: bool) -> Path | None:
    """The directory of the model that an adapter names; None where it names something else than one.

    An adapter on this machine may be anybody's. So for it nothing is fetched (`offline`), and its base is a
    model: an adapter of an adapter may be one of itself.

    Raises:
      UserError: for an adapter, and for a model of the hub that is not in its cache, with what helps.
    """
    found = Path(base)
    if not os.path.isdir(found):
        if base.startswith(EMBEDDED_PREFIX) or found.suffix == ".gguf":
            return None
        found = fetch_files(*find_hub_id(base), patterns, offline=offline)
    if is_adapter(found):
        raise UserError(f"{directory / CONFIG_FILE}: base_model_name_or_path names an adapter")
    return found


def fetch_files(hub_id: str, revision: str | None, patterns: Sequence[str], *, offline: bool = False) -> Path:
    """Files of a hub repository, at the newest commit or at a branch, tag or commit that is named.

    `offline` takes them from the hub's cache on this machine; so does what only a run directory names.

    Raises:
      ValueError: when they are not there, or could not be fetched.
    """
    from huggingface_hub import snapshot_download

    run = named_by(hub_id)
    offline = offline or run is not None
    if not offline:
        check_proxies()
    only: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=offline, **only))
    except (OSError, ValueError) as error:
        if offline:
            at = f" --revision {revision}" if revision else ""
            reason = "for an adapter on this machine" if run is None else f"for what {run} names"
            raise UserError(
                f"{hub_id!r} is not in the hub's cache here, and {reason} nothing is fetched; allowed: "
                f"fetch it first, `hf download {hub_id}{at}`, if you trust it"
            ) from error
        raise UserError(
            f"{hub_id!r} is no directory here and could not be fetched from the Hugging Face hub: {error}"
        ) from error
