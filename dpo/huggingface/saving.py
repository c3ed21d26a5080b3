"""A model as a Hugging Face directory: weights streamed into safetensors, configurations, tokenizer, card.

Parameters are copied one tensor at a time (of a large one: a run of its rows), so that writing a model needs
little memory beside the model, and of a checkpoint that of its largest parameters alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from transformers import PreTrainedTokenizerBase

from dpo.files import new_directory
from dpo.huggingface.binding import Binding, bind, constants
from dpo.huggingface.carried import Carried
from dpo.huggingface.families import Family, classifier_architecture
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.spellings import respell_tokenizer, spelled_for_all
from dpo.huggingface.streamed import loaded, take
from dpo.huggingface.text_models import family_of
from dpo.huggingface.weights import SAFETENSORS_DTYPES
from dpo.models.classifier import SequenceClassifier
from dpo.models.decoder import Decoder
from dpo.models.parts import WEIGHTS
from dpo.outcomes import UserError

MAX_PIECE_BYTES = 16 * 2**20
"""Large tensors are written in runs of rows of about this size."""
SHARD_BYTES = 5 * 10**9
"""Weights up to this size are one file; more are several."""


def save_pretrained(
    model: Decoder,
    directory: str | Path,
    *,
    hf_config: JsonObject,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: JsonObject | None = None,
    dtype: Any = None,
    max_shard_size: int = SHARD_BYTES,
    model_card: str | None = None,
    carried: Carried | None = None,
) -> Path:
    """Write a directory that `transformers` opens, 4 or 5: weights, configurations, tokenizer, chat template.

    Everything is written beside `directory` and then renamed, so that it is whole or not there, with
    checksums that are verified when it is opened again. An existing model directory is replaced. `dtype` of
    the weights is the parameters' own when not given. What is `carried` stands beside as it was.
    """
    directory = Path(directory)
    _check_replaceable(directory)
    with new_directory("the model", directory) as target:
        dtype = jnp.dtype(dtype or model.embed_tokens.embedding.get_value().dtype)
        family = family_of(hf_config, *(() if carried is None else (carried.spelling,)))
        _save_weights(model, target, family, dtype, max_shard_size, carried)
        architecture = family.architecture
        if isinstance(model, SequenceClassifier):
            architecture = classifier_architecture(hf_config["model_type"])
        _save_configs(target, hf_config, generation_config, architecture=architecture, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
            respell_tokenizer(target)
        if carried is not None:
            carried.write_settings(target)
        if model_card is not None:
            (target / "README.md").write_text(model_card)
    return directory


_Part = tuple[Binding, int]
"""One tensor: the binding, and which of its tensors."""
Place = tuple[Path, int]
"""A file, and where in it a tensor begins."""


def _save_weights(
    model: Decoder,
    target: Path,
    family: Family,
    dtype: np.dtype,
    max_shard_size: int,
    carried: Carried | None,
) -> None:
    leaves = flatten(nnx.to_pure_dict(nnx.state(model, WEIGHTS)))
    bindings = bind(family, model.config, {path: leaf.shape for path, leaf in leaves.items()})
    shards = _plan_shards(bindings, dtype, max_shard_size)
    fixed = constants(family, model.config)
    others = [] if carried is None else carried.shards(max_shard_size)
    if len(shards) == 1 and not others:
        _fill(_begin_shard(target / "model.safetensors", shards[0], dtype, fixed), bindings, leaves, dtype)
        return
    places: dict[str, Place] = {}
    count = len(shards) + len(others)
    for number, shard in enumerate(shards, start=1):
        own = fixed if number == len(shards) else {}
        places |= _begin_shard(target / f"model-{number:05d}-of-{count:05d}.safetensors", shard, dtype, own)
    _fill(places, bindings, leaves, dtype)
    weight_map = {name: path.name for name, (path, _) in places.items()}
    total = sum(leaf.size for leaf in leaves.values()) + len(fixed)
    size = total * dtype.itemsize
    for number, names in enumerate(others, start=len(shards) + 1):
        assert carried is not None
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        carried.write_tensors(target / name, names)
        weight_map |= dict.fromkeys(names, name)
        total += sum(math.prod(carried.tensors.shapes[each]) for each in names)
        size += sum(carried.num_bytes(each) for each in names)
    index = {"metadata": {"total_size": size, "total_parameters": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _plan_shards(bindings: Sequence[Binding], dtype: np.dtype, max_shard_size: int) -> list[list[_Part]]:
    """Consecutive tensors, as many as fit; a single larger tensor has a shard of its own."""
    shards: list[list[_Part]] = [[]]
    filled = 0
    for binding in bindings:
        size = math.prod(binding.shape) * dtype.itemsize
        for index in range(len(binding.names)):
            if shards[-1] and filled + size > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append((binding, index))
            filled += size
    return shards


def _begin_shard(
    path: Path, shard: Sequence[_Part], dtype: np.dtype, fixed: Mapping[str, float]
) -> dict[str, Place]:
    """One file, of which nothing is written but what is fixed; returns where each tensor belongs."""
    shapes = {binding.names[index]: binding.shape for binding, index in shard}
    shapes |= dict.fromkeys(fixed, ())
    places = begin_safetensors(path, {name: shapes[name] for name in sorted(shapes)}, dtype)
    for name, value in fixed.items():
        write_at(places[name], [np.asarray(value)], dtype)
    return places


def _fill(
    places: Mapping[str, Place], bindings: Sequence[Binding], leaves: Mapping[str, Any], dtype: np.dtype
) -> None:
    """Write every tensor where it belongs, parameter by parameter: no more than those of one are held."""
    for binding in bindings:
        held = loaded([binding], leaves)
        for index, name in enumerate(binding.names):
            write_at(places[name], _pieces(binding, index, held), dtype)
        held.clear()  # before the next ones are read


def begin_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, Place]:
    """Write the header of a file of tensors of one dtype, in the order of `shapes`: filled, the file has the
    same bytes as the library writes of the same tensors. Returns where each tensor belongs."""
    stored = next(name for name, known in SAFETENSORS_DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [begin, end]}
        begins[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: (path, 8 + len(text) + begin) for name, begin in begins.items()}


def write_at(place: Place, pieces: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Write one tensor where it belongs, given as runs of its rows."""
    path, begin = place
    with path.open("r+b") as file:
        file.seek(begin)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data)


def hf_tensor(binding: Binding, index: int, leaves: Mapping[str, Any]) -> np.ndarray:
    """One tensor as Hugging Face has it, whole, on the host."""
    return binding.to_theirs([take(leaves[leaf], index, binding.num_leading) for leaf in binding.leaves])


def _pieces(binding: Binding, index: int, leaves: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """One tensor as Hugging Face has it, as runs of rows; what is fused or transposed is whole."""
    parts = [take(leaves[leaf], index, binding.num_leading) for leaf in binding.leaves]
    if binding.rule.fusion is not None or binding.is_transposed:
        yield binding.to_theirs(parts)
        return
    (rows,) = parts
    step = max(1, MAX_PIECE_BYTES // max(1, rows[:1].nbytes)) if rows.ndim else 1
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def written_config(hf_config: JsonObject, *, architecture: str | None, dtype: np.dtype) -> JsonObject:
    """The `config.json` of an export."""
    config = {key: value for key, value in hf_config.items() if not key.startswith("_")}
    return spelled_for_all(config) | {
        "architectures": [architecture],
        "dtype": dtype.name,
        "torch_dtype": dtype.name,
        "transformers_version": transformers.__version__,
    }


def _save_configs(
    target: Path,
    hf_config: JsonObject,
    generation_config: JsonObject | None,
    *,
    architecture: str | None,
    dtype: np.dtype,
) -> None:
    config = written_config(hf_config, architecture=architecture, dtype=dtype)
    generation = generation_config or {
        key: hf_config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if hf_config.get(key) is not None
    }
    generation = generation | {"transformers_version": transformers.__version__}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (target / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _check_replaceable(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} holds something that is not a model; allowed is a new, empty or model directory"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; allowed is a new, empty or model directory")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with paths such as layers.mlp.up_proj.kernel."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
