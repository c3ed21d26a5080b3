"""A model as one GGUF file for llama.cpp: weights quantised as they are written, configuration, tokenizer.

What a file cannot say is refused: before it takes its name it is read again, and must mean the same decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import nnx
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from dpo.files import new_file
from dpo.huggingface.binding import Binding, bind, constants
from dpo.huggingface.families import Family, decoder_config, find_family
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.gguf_architectures import ARCHITECTURES, Architecture
from dpo.huggingface.gguf_changes import Heads, file_name, kind_of
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.gguf_sizes import rope_tensors, size_fields
from dpo.huggingface.gguf_vocabulary import vocabulary_fields
from dpo.huggingface.saving import flatten, hf_tensor
from dpo.huggingface.streamed import loaded
from dpo.models.decoder import Decoder
from dpo.models.decoder_config import DecoderConfig
from dpo.models.parts import WEIGHTS
from dpo.outcomes import UserError

Kind = gguf.GGMLQuantizationType

GGUF_DTYPES = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q5_1": Kind.Q5_1,
    "q5_0": Kind.Q5_0,
    "q4_1": Kind.Q4_1,
    "q4_0": Kind.Q4_0,
}
"""How matrices are stored: what llama.cpp reads and the `gguf` package writes without a sample of data."""

_FILE_TYPES = {name: getattr(gguf.LlamaFileType, f"MOSTLY_{name.upper()}", 0) for name in GGUF_DTYPES}

_IN_FLOAT32 = ("norm.weight", "position_embd.weight", "shortconv.conv.weight", "ssm_conv1d.weight")
"""Tensors of two dimensions that llama.cpp multiplies by nothing, or wants as they are."""

_WRITTEN_AS = {
    "mistral": ("llama", "mistral"),
    "gemma3_text": ("gemma3", "gemma3_text"),
    "gemma4_text": ("gemma4", "gemma4_text"),
    "granitemoehybrid": ("granite", "granite"),
    "olmo3": ("olmo2", "olmo3"),
    "ministral3": ("mistral3", "ministral3"),
    "hunyuan_v1_dense": ("hunyuan-dense", "hunyuan_v1_dense"),
    "qwen3_5_text": ("qwen35", "qwen3_5_text"),
}
"""`model_type` → llama.cpp's architecture, and the family whose weight names it has; others are their own."""


def save_gguf(
    model: Decoder,
    path: str | Path,
    *,
    hf_config: JsonObject,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: JsonObject | None = None,
    dtype: str = "f32",
    name: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write a causal language model as a GGUF file, which is whole or not there.

    Matrices are stored as `dtype`, norms and biases in float32.

    Raises:
      ValueError: for a model that llama.cpp has no architecture for, or whose configuration, tokenizer or
        sizes a file cannot say.
    """
    architecture, model_type = find_architecture(hf_config["model_type"])
    table, path = ARCHITECTURES[architecture], Path(path)
    leaves = flatten(nnx.to_pure_dict(nnx.state(model, WEIGHTS)))
    family = find_family(model_type)
    bindings = bind(family, model.config, {key: leaf.shape for key, leaf in leaves.items()})
    tensors = [binding for binding in bindings if not _is_numbers(table, binding)]
    named = _file_tensors(table, tensors, model.config, GGUF_DTYPES[dtype])
    metadata = {
        **_general(architecture, dtype, name, licence),
        **{f"{architecture}.{key}": value for key, value in size_fields(model.config, hf_config).items()},
        **_numbers(table, family, bindings, leaves),
        **vocabulary_fields(
            tokenizer, architecture, generation_config or {}, vocab_size=model.config.vocab_size
        ),
    }
    with new_file("the model", path) as target:
        writer = gguf.GGUFWriter(target, architecture)
        for key, value in metadata.items():
            _add_field(writer, key, value)
        ropes = rope_tensors(model.config, hf_config)
        for own, values in ropes.items():
            writer.add_tensor_info(own, values.shape, values.dtype, values.nbytes)
        for own, (shape, kind, _) in named.items():
            _add_info(writer, own, shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in ropes.values():
            writer.write_tensor_data(values)
        heads = _heads(table, model.config)
        for _, together in itertools.groupby(named.items(), key=lambda item: item[1][2][0][0].leaves):
            held: dict[str, Any] = {}  # the parameters of one binding at a time
            for own, (_, kind, parts) in together:
                held = held or loaded([binding for binding, _ in parts], leaves)
                writer.write_tensor_data(_encoded(_values(table, own, parts, held, heads), kind))
        writer.close()
        _require_same(target, model.config)
    return path


def find_architecture(model_type: str) -> tuple[str, str]:
    """llama.cpp's architecture for a family, and the family whose weight names it has.

    Raises:
      ValueError: where there is none, listing the families that have one.
    """
    architecture, names = _WRITTEN_AS.get(model_type, (model_type, model_type))
    if architecture not in ARCHITECTURES:
        allowed = sorted(
            {*ARCHITECTURES, *_WRITTEN_AS} - {"gemma3", "gemma4", "hunyuan-dense", "mistral3", "qwen35"}
        )
        raise UserError(
            f"model_type {model_type} is not written as a GGUF file; supported: {', '.join(allowed)}"
        )
    return architecture, names


_Parts = list[tuple[Binding, int]]
"""Tensors of Hugging Face's that lie in one of the file: several where heads have norms of their own."""


def _file_tensors(
    table: Architecture, bindings: list[Binding], config: DecoderConfig, kind: Kind
) -> dict[str, tuple[tuple[int, ...], Kind, _Parts]]:
    """By the file's names: shape, how it is stored, and what it is made of."""
    name_map = gguf.get_tensor_name_map(table.names, config.num_layers)
    parts: dict[str, _Parts] = {}
    for binding in bindings:
        for index, name in enumerate(binding.names):
            own = file_name(name_map, name)
            if own is None:
                raise UserError(f"a GGUF file of {gguf.MODEL_ARCH_NAMES[table.names]} has no tensor {name}")
            parts.setdefault(own, []).append((binding, index))
    found = {}
    for own, made_of in parts.items():
        shape, change = made_of[0][0].shape, table.change
        if change is not None and change.applies(kind_of(own)):
            shape = change.convert_shape(kind_of(own), shape)
        shape = shape if len(made_of) == 1 else (len(made_of), *shape)
        is_matrix = len(shape) == 2 and not own.endswith(_IN_FLOAT32)
        stored = kind if is_matrix else Kind.F32
        found[own] = (shape, _require_blocks(own, shape, stored), made_of)
    return found


def _require_blocks(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise UserError(
            f"dtype is {kind.name.lower()}, which stores blocks of {block} numbers, and rows of {name} have "
            f"{shape[-1]}; allowed: f32, f16, bf16"
        )
    return kind


def _add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape))
    if kind in (Kind.F32, Kind.F16):
        dtype = np.dtype(np.float32 if kind == Kind.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, count * dtype.itemsize)
        return
    in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), count // block * size, raw_dtype=kind)


def _values(
    table: Architecture, own: str, parts: _Parts, leaves: Mapping[str, Any], heads: tuple[int, int]
) -> np.ndarray:
    """One tensor of the file, float32."""
    tensors = [np.asarray(hf_tensor(*part, leaves), np.float32) for part in parts]
    values = tensors[0] if len(tensors) == 1 else np.stack(tensors)
    change, kind = table.change, kind_of(own)
    changed = values if change is None or not change.applies(kind) else change.convert(kind, values, heads)
    return np.ascontiguousarray(changed)


def _is_numbers(table: Architecture, binding: Binding) -> bool:
    """Whether a file has these in its metadata."""
    return any(name.format(layer=0) in binding.names for name in table.numbers)


def _numbers(
    table: Architecture, family: Family, bindings: list[Binding], leaves: Mapping[str, Any]
) -> JsonObject:
    """Tensors of one number that a file has in its metadata: a list of the layers' under each key."""
    values = constants(family, bindings[0].config)
    for binding in (each for each in bindings if _is_numbers(table, each)):
        held = loaded([binding], leaves)
        values |= {name: hf_tensor(binding, i, held).item() for i, name in enumerate(binding.names)}
    layers = range(bindings[0].config.num_layers)
    return {
        key: [float(values[name.format(layer=layer)]) for layer in layers]
        for name, key in table.numbers.items()
    }


def _heads(table: Architecture, config: DecoderConfig) -> Heads:
    """What a conversion that moves heads counts."""
    if table.change is None or table.change.heads == "attention" or config.delta is None:
        return config.num_heads, config.num_kv_heads
    return config.delta.num_key_heads, config.delta.num_value_heads


def _encoded(values: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == Kind.F32:
        return values
    return values.astype(np.float16) if kind == Kind.F16 else gguf.quantize(values, kind)


# ---- metadata ----


def _general(architecture: str, dtype: str, name: str | None, licence: str | None) -> JsonObject:
    found: JsonObject = {
        "general.type": "model",
        "general.file_type": int(_FILE_TYPES[dtype]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return found | {
        key: value for key, value in (("general.name", name), ("general.license", licence)) if value
    }


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One value of the kind that llama.cpp expects of Python's."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


# ---- the file again ----


def _require_same(path: Path, config: DecoderConfig) -> None:
    """That the file, read again, is the same decoder; its rounding of numbers to float32 is allowed."""
    hf_config = GgufFile(path).config()
    read = decoder_config(CONFIG_MAPPING[hf_config["model_type"]].from_dict(hf_config))
    differing = [
        f"{field.name} is {getattr(config, field.name)!r}, and read again {getattr(read, field.name)!r}"
        for field in fields(DecoderConfig)
        if not _is_close(getattr(config, field.name), getattr(read, field.name))
    ]
    if differing:
        raise UserError("a GGUF file cannot say this configuration:\n  " + "\n  ".join(differing))


def _is_close(first: Any, second: Any) -> bool:
    numbers, others = _parts_of(first)
    again, others_again = _parts_of(second)
    return others == others_again and np.allclose(numbers, again, rtol=1e-5, atol=0)


def _parts_of(value: Any) -> tuple[list[float], list[Any]]:
    """The floats in a value of nested tuples and records, and everything else with its place."""
    numbers: list[float] = []
    others: list[Any] = []
    for place, leaf in _walk(value, ()):
        if isinstance(leaf, float):
            numbers.append(leaf)
        else:
            others.append((place, leaf))
    return numbers, others


def _walk(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if hasattr(value, "__dataclass_fields__"):
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, tuple):
        yield place, len(value)
        yield from itertools.chain.from_iterable(_walk(item, (*place, i)) for i, item in enumerate(value))
    else:
        yield place, value
