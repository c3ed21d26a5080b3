"""Models from opened sources: weights streamed into a decoder, or into a classifier, on its devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from dpo.huggingface.binding import Binding, Shapes, bind, check_tensors, constants
from dpo.huggingface.carried import Carried
from dpo.huggingface.families import Family, classifier_architecture
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.loading import Placement, load_parameters
from dpo.huggingface.opening import Checkpoint, is_classifier, open_checkpoint
from dpo.huggingface.saving import flatten
from dpo.huggingface.streamed import in_files
from dpo.huggingface.text_models import parse_config, read_config
from dpo.huggingface.weights import Tensors
from dpo.models.attention import Implementation
from dpo.models.classifier import SequenceClassifier
from dpo.models.decoder import Decoder, Remat
from dpo.models.decoder_config import DecoderConfig
from dpo.models.quantized import BaseDtype
from dpo.outcomes import UserError
from dpo.parallel.partition import ONE_DEVICE, Partition


class Pretrained(NamedTuple):
    """A model with what is needed to use it and to write it back."""

    model: Decoder
    config: JsonObject
    """Hugging Face's `config.json`."""
    generation_config: JsonObject
    tokenizer: PreTrainedTokenizerBase
    source: str
    """What was loaded, with the hub's commit where there is one."""
    licence: str | None = None
    """What the source says of it: an SPDX name in lower case, as on the hub."""
    hub_id: str | None = None
    """The source's name on the hub, where that is known."""
    carried: Carried | None = None
    """What the source has beside its text model, for an export."""
    unread: tuple[str, ...] = ()
    """Tensors of the source that nothing uses, and that no export has."""


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
        checkpoint.carried(),
        _unread_tensors(checkpoint, model.config),
    )


def _unread_tensors(checkpoint: Checkpoint, config: DecoderConfig) -> tuple[str, ...]:
    family, _ = _read_config_of(checkpoint)
    patterns = family.unread(config)
    names = checkpoint.tensors(family, ()).shapes if patterns else ()
    return tuple(name for name in names if any(re.search(pattern, name) for pattern in patterns))


def open_shapes(source: str | Path, *, compute_dtype: Any = jnp.float32) -> Pretrained:
    """A model of which nothing but the shapes is made: its parameters are `jax.ShapeDtypeStruct`s."""
    checkpoint = open_checkpoint(source)
    _, config = _read_config_of(checkpoint)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), compute_dtype=compute_dtype))
    return _as_pretrained(model, checkpoint)


def open_in_files(
    source: str | Path, *, held: BaseDtype = "float32", compute_dtype: Any = jnp.float32
) -> Pretrained:
    """A model to be written: its parameters stay in their files, with the numbers of one held as `held`.

    Raises what `load_decoder` raises.
    """
    checkpoint = open_checkpoint(source)
    family, config = _read_config_of(checkpoint)
    model = _filled(
        lambda: Decoder(config, rngs=nnx.Rngs(0), compute_dtype=compute_dtype),
        checkpoint,
        family,
        partial(in_files, held=held),
    )
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
    if is_classifier(checkpoint.config):
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
            pad_token_id=parse_config(checkpoint.config).pad_token_id,
            rngs=nnx.Rngs(0),
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            attention=attention,
        )

    return _load(make, checkpoint, family, dtype=jnp.dtype(param_dtype), placement=placement)


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
    labels = parse_config(checkpoint.config).num_labels
    assert labels is not None
    return labels


def stop_tokens(pretrained: Pretrained) -> list[int]:
    """What ends a response: the generation configuration's EOS tokens and the tokenizer's."""
    configured = pretrained.generation_config.get("eos_token_id")
    found = configured if isinstance(configured, list) else [configured]
    found = {token for token in [*found, pretrained.tokenizer.eos_token_id] if isinstance(token, int)}
    if not found:
        raise UserError(f"{pretrained.source} has no EOS token, so no response would end")
    return sorted(found)


def _load(
    make: Callable[[], Decoder],
    checkpoint: Checkpoint,
    family: Family,
    *,
    dtype: np.dtype,
    placement: Placement | None,
) -> Any:
    """A model of which only shapes are made, filled with the checkpoint's tensors."""
    return _filled(make, checkpoint, family, partial(load_parameters, dtype=dtype, placement=placement))


def _filled(
    make: Callable[[], Decoder],
    checkpoint: Checkpoint,
    family: Family,
    parameters: Callable[[Sequence[Binding], Tensors, Shapes], Mapping[str, Any]],
) -> Any:
    """A model with the parameters, by path, that `parameters` makes of checked tensors."""
    abstract = nnx.eval_shape(make)
    graphdef, state = nnx.split(abstract)
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
    bindings = bind(family, abstract.config, shapes)
    tensors = checkpoint.tensors(family, [name for binding in bindings for name in binding.names])
    check_tensors(family, bindings, tensors.shapes, checkpoint.source)
    _check_constants(family, abstract.config, tensors, checkpoint.source)
    values = parameters(bindings, tensors, shapes)
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(values, sep="."))
    return nnx.merge(graphdef, state)


def _check_constants(family: Family, config: DecoderConfig, tensors: Tensors, source: str) -> None:
    """That what a family does not learn has the numbers that the decoder computes with."""
    for name, value in constants(family, config).items():
        found = float(tensors.read(name))
        if not abs(found - value) <= abs(value) / 128:  # bfloat16's rounding
            raise UserError(f"{source}: tensor {name} is {found}; supported: {value}")


def _require_classifier(checkpoint: Checkpoint) -> None:
    model_type = str(checkpoint.config.get("model_type", "(none)"))
    allowed, found = classifier_architecture(model_type), checkpoint.config.get("architectures")
    if allowed is None or allowed not in (found or []):
        raise UserError(
            f"{checkpoint.source}: architectures is {found}; allowed for a classifier or reward model of "
            f"model_type {model_type} is {allowed or 'none: transformers has none'}"
        )
