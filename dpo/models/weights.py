"""Named tensors in files: validated safetensors and GGUF, read one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000
"""Longest safetensors header that is read; the format's own limit."""

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@runtime_checkable
class Tensors(Protocol):
    """Weights by Hugging Face name."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


class _Entry(NamedTuple):
    path: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


class SafetensorsDirectory:
    """The safetensors of a model directory, one file or several under an index."""

    def __init__(self, directory: Path):
        self._entries = _read_directory(directory)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file; `ValueError` for a dtype that is not floating."""
        path, begin, _, dtype, shape = self._entries[name]
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{path}: tensor {name} has dtype {dtype}; supported: {', '.join(SAFETENSORS_DTYPES)}"
            )
        count = math.prod(shape)
        return np.fromfile(path, SAFETENSORS_DTYPES[dtype], count=count, offset=begin).reshape(shape)


def read_safetensors_header(path: Path) -> dict[str, _Entry]:
    """Where each tensor of one file lies; `ValueError` unless sizes and offsets are consistent.

    The data must be exactly covered by the tensors, none overlapping, before any of it is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path}: header of {length} bytes in a file of {size}; allowed is up to "
                f"{min(MAX_HEADER_BYTES, max(size - 8, 0))}"
            )
        header = _parse_header(path, file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _check_entry(path, name, value, start, size) for name, value in header.items()}
    _check_cover(path, entries, start, size)
    return entries


def _read_directory(directory: Path) -> dict[str, _Entry]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return _read_index(directory, index)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors_header(files[0])
    if files:
        raise ValueError(
            f"{directory} has {len(files)} safetensors files ({', '.join(file.name for file in files)}) and "
            f"no {index.name}; allowed is one file, or several with an index"
        )
    pickled = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in directory.glob(pattern)
    )
    if pickled:
        raise ValueError(
            f"{directory} has its weights pickled ({', '.join(pickled)}), and reading those would run code. "
            "Convert them once, where you trust them: transformers.AutoModelForCausalLM.from_pretrained(path)"
            ".save_pretrained(new_path) writes safetensors"
        )
    raise ValueError(f"{directory} has no safetensors file")


def _read_index(directory: Path, index: Path) -> dict[str, _Entry]:
    """All tensors named by an index, each from the file that the index says."""
    weight_map = _parse_header(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    entries: dict[str, _Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.+-]{1,200}\.safetensors", file, re.ASCII):
            raise ValueError(
                f"{index}: weight_map names {file!r}; allowed are .safetensors files beside the index"
            )
        if not (directory / file).is_file():
            raise ValueError(f"{index}: {file} is missing")
        found = read_safetensors_header(directory / file)
        named = {name for name, where in weight_map.items() if where == file}
        if named != set(found):
            raise ValueError(
                f"{directory / file}: not the tensors that {index.name} says: missing "
                f"{sorted(named - set(found))}, left over {sorted(set(found) - named)}"
            )
        entries |= found
    return entries


def _parse_header(path: Path, content: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"duplicate names {sorted({name for name in names if names.count(name) > 1})}")
        return dict(pairs)

    try:
        header = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid JSON header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header must be a JSON object, not {type(header).__name__}")
    return header


def _check_entry(path: Path, name: str, value: object, start: int, size: int) -> _Entry:
    def natural(item: object) -> bool:
        return type(item) is int and item >= 0

    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            if all(map(natural, [*shape, begin, end])) and begin <= end and start + end <= size:
                width = SAFETENSORS_DTYPES[dtype].itemsize if dtype in SAFETENSORS_DTYPES else None
                if width is None or math.prod(shape) * width == end - begin:
                    return _Entry(path, start + begin, start + end, dtype, tuple(shape))
    raise ValueError(
        f"{path}: tensor {name} is {value!r}; allowed is a dtype, a shape and data_offsets that agree and "
        f"lie in the {size - start} bytes of data"
    )


def _check_cover(path: Path, entries: dict[str, _Entry], start: int, size: int) -> None:
    """Tensors follow one another without gap or overlap and end with the file."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            kind = "overlaps" if entry.begin < position else "leaves a gap after"
            raise ValueError(f"{path}: tensor {name} at byte {entry.begin} {kind} the tensor before it")
        position = entry.end
    if position != size:
        raise ValueError(f"{path}: {size - position} bytes after the last tensor; allowed are none")
