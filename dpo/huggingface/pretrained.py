"""Hugging Face models in and out: hub id, directory, GGUF file or the embedded default; a directory out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from dpo.files import CHECKSUMS_FILE, damaged_files
from dpo.huggingface.adapter_files import AdapterDirectory, MergedTensors, is_adapter
from dpo.huggingface.binding import bind, canonical_names, check_tensors, constants, find_ends
from dpo.huggingface.config_rules import check_config, check_generation_config
from dpo.huggingface.embedded import EMBEDDED_PREFIX, fetch_embedded, find_embedded
from dpo.huggingface.families import (
    FAMILIES,
    Family,
    classifier_architecture,
    decoder_config,
    find_family,
)
from dpo.huggingface.foreign_json import read_small_json, show
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.licences import read_licence
from dpo.huggingface.loading import Placement, load_parameters
from dpo.huggingface.saving import flatten, save_pretrained
from dpo.huggingface.tokenizer_files import (
    TOKENIZER_FILES,
    expand_home,
    fetch_files,
    find_base,
    find_hub_id,
    load_tokenizer,
    open_tokenizer,
)
from dpo.huggingface.weights import SafetensorsDirectory, Tensors
from dpo.models.attention import Implementation
from dpo.models.classifier import SequenceClassifier
from dpo.models.decoder import Decoder, Remat
from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError
from dpo.parallel.partition import ONE_DEVICE, Partition

__all__ = [
    "Checkpoint",
    "Pretrained",
    "count_labels",
    "load_classifier",
    "load_decoder",
    "load_pretrained",
    "load_tokenizer",
    "open_checkpoint",
    "read_config",
    "read_model_config",
    "save_pretrained",
    "stop_tokens",
]


MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
"""Patterns of all files of a model."""


class Pretrained(NamedTuple):
    """A model with what is needed to use it and to write it back."""

    model: Decoder
    config: dict[str, Any]
    """Hugging Face's `config.json`."""
    generation_config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    source: str
    """What was loaded, with the hub's commit where there is one."""
    licence: str | None = None
    """What the source says of it: an SPDX name in lower case, as on the hub."""
    hub_id: str | None = None
    """The source's name on the hub, where that is known."""


def load_pretrained(
    source: str | Path,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = "full",
    attention: Implementation = "auto",
    placement: Placement | None = None,
    partition: Partition = ONE_DEVICE,
) -> Pretrained:
    """Load a causal language model with its tokenizer; raises what `load_decoder` raises."""
    checkpoint = open_checkpoint(source)
    model = load_decoder(
        checkpoint,
        compute_dtype=compute_dtype,
        param_dtype=param_dtype,
        remat=remat,
        attention=attention,
        placement=placement,
        partition=partition,
    )
    return _as_pretrained(model, checkpoint)


def _as_pretrained(model: Decoder, checkpoint: Checkpoint) -> Pretrained:
    return Pretrained(
        model,
        checkpoint.config,
        checkpoint.generation_config,
        checkpoint.tokenizer(),
        checkpoint.source,
        checkpoint.licence,
        checkpoint.hub_id,
    )


def open_shapes(source: str | Path, *, compute_dtype: Any = jnp.float32) -> Pretrained:
    """A model of which nothing but the shapes is made: its parameters are `jax.ShapeDtypeStruct`s."""
    checkpoint = open_checkpoint(source)
    _, config = _read_config_of(checkpoint)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), compute_dtype=compute_dtype))
    return _as_pretrained(model, checkpoint)


def load_decoder(
    checkpoint: Checkpoint,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = "full",
    attention: Implementation = "auto",
    placement: Placement | None = None,
    partition: Partition = ONE_DEVICE,
) -> Decoder:
    """The decoder of an opened checkpoint; weights are streamed, straight into their shardings.

    Raises `ValueError` for an unsupported configuration and for tensors that do not fit it, listing all.
    """
    family, config = _read_config_of(checkpoint)
    if _is_classifier(checkpoint.config):
        raise UserError(
            f"{checkpoint.source} is a {checkpoint.config['architectures'][0]}; allowed here are causal "
            "language models (a reward model serves as the judge reward_model:DIR of dpo winrate)"
        )

    def make() -> Decoder:
        return Decoder(
            config,
            rngs=nnx.Rngs(0),
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            remat=remat,
            attention=attention,
            partition=partition,
        )

    return _load(make, checkpoint, family, dtype=jnp.dtype(param_dtype), placement=placement)


def load_classifier(
    checkpoint: Checkpoint,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention: Implementation = "auto",
    placement: Placement | None = None,
) -> SequenceClassifier:
    """The sequence classifier (or reward model) of an opened checkpoint.

    Raises `ValueError` for another architecture, and as `load_decoder` does.
    """
    family, config = _read_config_of(checkpoint)
    labels = count_labels(checkpoint)

    def make() -> SequenceClassifier:
        return SequenceClassifier(
            config,
            num_labels=labels,
            pad_token_id=_parse_config(checkpoint.config).pad_token_id,
            rngs=nnx.Rngs(0),
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            attention=attention,
        )

    return _load(make, checkpoint, family, dtype=jnp.dtype(param_dtype), placement=placement)


def read_config(config: dict[str, Any]) -> tuple[Family, DecoderConfig]:
    """The family and the decoder that a `config.json` describes."""
    family = find_family(str(config.get("model_type", "(none)")))
    if config.get("quantization_config"):
        raise UserError(
            f"quantization_config is {show(config['quantization_config'])}; supported are weights in "
            "float32, bfloat16 and float16, and GGUF files"
        )
    return family, decoder_config(_parse_config(config))


def _read_config_of(checkpoint: Checkpoint) -> tuple[Family, DecoderConfig]:
    """The same of an opened source, which its errors name."""
    try:
        return read_config(checkpoint.config)
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error}") from error


def count_labels(checkpoint: Checkpoint) -> int:
    """How many numbers a sequence classifier gives; a reward model gives one.

    Raises `ValueError` for another architecture.
    """
    _require_classifier(checkpoint)
    labels = _parse_config(checkpoint.config).num_labels
    assert labels is not None
    return labels


def _parse_config(config: dict[str, Any]) -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except Exception as error:  # transformers makes it, and raises whatever its values lead to
        what = f"the configuration of a {show(config.get('model_type'))} is not valid"
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


class Checkpoint(NamedTuple):
    """An opened source, of which nothing large was read yet."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Callable[[Family, Iterable[str]], Tensors]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    source: str
    licence: str | None
    hub_id: str | None


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
    return _open_hub(*find_hub_id(source))


def stop_tokens(pretrained: Pretrained) -> list[int]:
    """What ends a response: the generation configuration's EOS tokens and the tokenizer's."""
    configured = pretrained.generation_config.get("eos_token_id")
    found = configured if isinstance(configured, list) else [configured]
    found = {token for token in [*found, pretrained.tokenizer.eos_token_id] if isinstance(token, int)}
    if not found:
        raise UserError(f"{pretrained.source} has no EOS token, so no response would end")
    return sorted(found)


def _open_directory(directory: Path, source: str) -> Checkpoint:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UserError(f"{directory} has no config.json")
    if os.path.lexists(directory / CHECKSUMS_FILE) and (problems := damaged_files(directory)):
        raise UserError(
            f"{directory} is damaged ({'; '.join(problems)}); delete its {CHECKSUMS_FILE} if that was meant, "
            "or export it again"
        )
    config = read_model_config(config_file)

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
    )


def _untied_where_different(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration, with `tie_word_embeddings` false where the file has another output head.

    So transformers 5 reads it: a head that is stored and differs from the embedding is the model's.
    """
    if config.get("model_type") not in FAMILIES or _is_classifier(config):
        return config
    try:
        parsed = _parse_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not getattr(parsed, "tie_word_embeddings", False):
        return config
    directory = path.parent
    family = find_family(config["model_type"])
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
    own_tokenizer = (directory / "tokenizer_config.json").is_file()
    return base._replace(
        tensors=lambda family, names: MergedTensors(base.tensors(family, names), adapter),
        tokenizer=(lambda: open_tokenizer(directory)) if own_tokenizer else base.tokenizer,
        source=f"{directory.resolve()} on {base.source}",
    )


def _open_base(directory: Path, base: str, *, offline: bool) -> Checkpoint:
    """The model that an adapter names (`find_base`)."""
    found = find_base(directory, base, MODEL_FILES, offline=offline)
    if found is None:
        return open_checkpoint(base)
    if Path(base).is_dir():
        return _open_directory(found, str(found.resolve()))
    hub_id = base.partition("@")[0]
    return _open_directory(found, f"{hub_id}@{found.name}")._replace(hub_id=hub_id)


def read_model_config(path: Path) -> dict[str, Any]:
    """A checked `config.json`."""
    config = read_small_json(path)
    check_config(path, config)
    return config


def _read_generation_config(path: Path) -> dict[str, Any]:
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


def _load(
    make: Callable[[], Decoder],
    checkpoint: Checkpoint,
    family: Family,
    *,
    dtype: np.dtype,
    placement: Placement | None,
) -> Any:
    """A model of which only shapes are made, filled with the checkpoint's tensors."""
    abstract = nnx.eval_shape(make)
    graphdef, state = nnx.split(abstract)
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
    bindings = bind(family, abstract.config, shapes)
    tensors = checkpoint.tensors(family, [name for binding in bindings for name in binding.names])
    check_tensors(family, bindings, tensors.shapes, checkpoint.source)
    _check_constants(family, abstract.config, tensors, checkpoint.source)
    values = load_parameters(bindings, tensors, shapes, dtype=dtype, placement=placement)
    nnx.replace_by_pure_dict(state, _unflatten(values))
    return nnx.merge(graphdef, state)


def _check_constants(family: Family, config: DecoderConfig, tensors: Tensors, source: str) -> None:
    """That what a family does not learn has the numbers that the decoder computes with."""
    for name, value in constants(family, config).items():
        found = float(tensors.read(name))
        if abs(found - value) > abs(value) / 128:  # bfloat16's rounding
            raise UserError(f"{source}: tensor {name} is {found}; supported: {value}")


def _require_classifier(checkpoint: Checkpoint) -> None:
    model_type = str(checkpoint.config.get("model_type", "(none)"))
    allowed, found = classifier_architecture(model_type), checkpoint.config.get("architectures")
    if allowed is None or allowed not in (found or []):
        raise UserError(
            f"{checkpoint.source}: architectures is {found}; allowed for a classifier or reward model of "
            f"model_type {model_type} is {allowed or 'none: transformers has none'}"
        )


def _is_classifier(config: dict[str, Any]) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested
