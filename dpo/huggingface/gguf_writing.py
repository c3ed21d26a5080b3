"""A model as one GGUF file for llama.cpp: weights quantised as they are written, configuration, tokenizer.

What a file cannot say is refused: before it takes its name it is read again, and must mean the same decoder.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import nnx
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from dpo.files import new_file
from dpo.huggingface.binding import Binding, bind
from dpo.huggingface.families import decoder_config, find_family
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.gguf_architectures import ARCHITECTURES, Architecture
from dpo.huggingface.gguf_changes import kind_of
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.gguf_vocabulary import vocabulary_fields
from dpo.huggingface.saving import flatten, hf_tensor
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder import Decoder
from dpo.models.decoder_config import DecoderConfig
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

_IN_FLOAT32 = ("norm.weight", "position_embd.weight", "shortconv.conv.weight")
"""Tensors of two dimensions that llama.cpp multiplies by nothing, or wants as they are."""

_WRITTEN_AS = {
    "mistral": ("llama", "mistral"),
    "gemma3_text": ("gemma3", "gemma3_text"),
    "granitemoehybrid": ("granite", "granite"),
    "hunyuan_v1_dense": ("hunyuan-dense", "hunyuan_v1_dense"),
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
    leaves = flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    bindings = bind(find_family(model_type), model.config, {key: leaf.shape for key, leaf in leaves.items()})
    named = _file_tensors(table, bindings, model.config, GGUF_DTYPES[dtype])
    metadata = {
        **_general(architecture, dtype, name, licence),
        **{f"{architecture}.{key}": value for key, value in _sizes(model.config, hf_config).items()},
        **vocabulary_fields(
            tokenizer, architecture, generation_config or {}, vocab_size=model.config.vocab_size
        ),
    }
    with new_file("the model", path) as target:
        writer = gguf.GGUFWriter(target, architecture)
        for key, value in metadata.items():
            _add_field(writer, key, value)
        ropes = _rope_tensors(model.config, hf_config)
        for own, values in ropes.items():
            writer.add_tensor_info(own, values.shape, values.dtype, values.nbytes)
        for own, (shape, kind, _) in named.items():
            _add_info(writer, own, shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in ropes.values():
            writer.write_tensor_data(values)
        heads = (model.config.num_heads, model.config.num_kv_heads)
        for own, (_, kind, parts) in named.items():
            values = _values(table, own, parts, leaves, heads)
            writer.write_tensor_data(_encoded(values, kind))
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
        allowed = sorted({*ARCHITECTURES, *_WRITTEN_AS} - {"gemma3", "hunyuan-dense"})
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
            whole = re.sub(r"\.norms\.\d+\.weight$", ".weight", name)
            own = name_map.get_name(whole, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise UserError(f"a GGUF file of {gguf.MODEL_ARCH_NAMES[table.names]} has no tensor {name}")
            parts.setdefault(own, []).append((binding, index))
    found = {}
    for own, made_of in parts.items():
        shape, change = made_of[0][0].shape, table.change
        if change is not None and change.applies(kind_of(own)):
            shape = change.convert_shape(shape)
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


def _sizes(config: DecoderConfig, hf_config: JsonObject) -> JsonObject:
    """Numbers under the architecture's name."""
    is_rms = config.norm.startswith("rms")
    window = min(config.windows)
    has_granite_scales = hf_config["model_type"].startswith("granite")
    found: JsonObject = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.layer_norm_{'rms_' if is_rms else ''}epsilon": float(config.norm_eps),
        "attention.sliding_window": None if window == NO_WINDOW else window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "shortconv.l_cache": max(config.convolution_width, 1) if hf_config["model_type"] == "lfm2" else None,
        "use_parallel_residual": config.residual != "sequential"
        if hf_config["model_type"] == "stablelm"
        else None,
        "attention.scale": config.attention_scale if has_granite_scales else None,
        "embedding_scale": config.embedding_scale if has_granite_scales else None,
        "residual_scale": config.residual_scale if has_granite_scales else None,
        "logit_scale": 1 / config.logit_scale if has_granite_scales else None,
        **(_rotation(config, hf_config) if config.ropes else {}),
    }
    return {key: value for key, value in found.items() if value is not None}


def _kv_heads(config: DecoderConfig) -> int | list[int]:
    """One number, or one a layer with 0 for those that do not attend."""
    if config.is_uniform:
        return config.num_kv_heads
    return [config.num_kv_heads if kind == "attention" else 0 for kind in config.layer_kinds]


def _rotation(config: DecoderConfig, hf_config: JsonObject) -> JsonObject:
    """Base, channels that turn, and scaling by a rule; Llama 3's and LongRoPE's divisors are tensors."""
    rope = _rope_parameters(hf_config)
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    theta = float(rope["rope_theta"])
    if rope.get("alpha"):  # Hunyuan's stretch of the base, which the file has once and for all
        theta *= rope["alpha"] ** (config.head_dim / (config.head_dim - 2))
    found: JsonObject = {
        "rope.freq_base": theta,
        "rope.dimension_count": 2 * len(config.ropes[0].inv_freq),
        "rope.freq_base_swa": None if local is None else float(local["rope_theta"]),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = float(config.ropes[0].attention_factor)
    original = rope.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3") and original:
        found["rope.scaling.original_context_length"] = int(original)
    return found


def _rope_parameters(hf_config: JsonObject) -> JsonObject:
    return CONFIG_MAPPING[hf_config["model_type"]].from_dict(hf_config).rope_parameters


def _rope_tensors(config: DecoderConfig, hf_config: JsonObject) -> dict[str, np.ndarray]:
    """Divisors of the frequencies."""
    if not config.ropes:
        return {}
    rope = _rope_parameters(hf_config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], np.float32)
            for kind in ("long", "short")
        }
    if rope.get("rope_type") == "llama3":
        n = len(config.ropes[0].inv_freq)
        plain = 1 / rope["rope_theta"] ** (np.arange(0, 2 * n, 2) / (2 * n))
        return {"rope_freqs.weight": (plain / np.asarray(config.ropes[0].inv_freq)).astype(np.float32)}
    return {}


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
