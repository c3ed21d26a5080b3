"""Named tensors in safetensors files: all headers are checked before any data is read, and read by rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from dpo.huggingface.foreign_json import parse_object, require_file
from dpo.outcomes import UserError
from dpo.regular_files import is_there, require_regular

MAX_HEADER_BYTES = 100_000_000
"""Longest safetensors header, or index of a sharded model, that is read; the format's own limit."""
MAX_AXES = 8
_RUN_BYTES = 16 * 2**20
MAX_SIZE = 2**48
"""Longest axis of a tensor."""

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of weights that are read."""

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
_BITS |= dict.fromkeys(("I64", "U64", "F64"), 64)
"""Bits of an element of every dtype of the format."""


@runtime_checkable
class Tensors(Protocol):
    """Weights by Hugging Face name."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a run of its rows (indices of the first axis)."""
        ...


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

    def stored(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """A tensor's dtype as the format names it, its shape and its bytes."""
        entry = self._entries[name]
        return entry.dtype, entry.shape, entry.end - entry.begin

    def read_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor as it is stored, in runs of at most 16 MiB.

        Raises:
          ValueError: for a file that was cut since its header was read.
        """
        entry = self._entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.begin)
            for start in range(entry.begin, entry.end, _RUN_BYTES):
                piece = file.read(min(_RUN_BYTES, entry.end - start))
                if len(piece) != min(_RUN_BYTES, entry.end - start):
                    raise UserError(
                        f"{entry.path}: tensor {name} ends before its {entry.end - entry.begin} bytes"
                    )
                yield piece

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor or a run of its rows, in the dtype of the file.

        Raises:
          ValueError: for a dtype that is not floating, or a file that was cut since its header was read.
        """
        path, begin, _, dtype, shape = self._entries[name]
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{path}: tensor {name} has dtype {dtype}; supported: {', '.join(SAFETENSORS_DTYPES)}"
            )
        stored = SAFETENSORS_DTYPES[dtype]
        if shape:
            start, stop, _ = rows.indices(shape[0])
            begin += start * math.prod(shape[1:]) * stored.itemsize
            shape = (max(stop - start, 0), *shape[1:])
        count = math.prod(shape)
        values = np.fromfile(path, stored, count=count, offset=begin)
        if values.size != count:
            raise UserError(f"{path}: tensor {name} ends after {values.size} of {count} elements")
        return values.reshape(shape)


def read_safetensors_header(path: Path) -> dict[str, _Entry]:
    """Where each tensor of one file lies; `ValueError` unless sizes and offsets are consistent.

    The data must be exactly covered by the tensors, none overlapping, before any of it is read.
    """
    size = require_regular(path).stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{path}: header of {length} bytes in a file of {size}; allowed is up to "
                f"{min(MAX_HEADER_BYTES, max(size - 8, 0))}"
            )
        header = parse_object(path, file.read(length))
    _check_metadata(path, header.pop("__metadata__", {}))
    start = 8 + length
    entries = {name: _check_entry(path, name, value, start, size) for name, value in header.items()}
    _check_cover(path, entries, start, size)
    return entries


def _read_directory(directory: Path) -> dict[str, _Entry]:
    index = directory / "model.safetensors.index.json"
    if is_there(index):
        return _read_index(directory, index)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors_header(files[0])
    if files:
        raise UserError(
            f"{directory} has {len(files)} safetensors files ({', '.join(file.name for file in files)}) and "
            f"no {index.name}; allowed is one file, or several with an index"
        )
    pickled = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in directory.glob(pattern)
    )
    if pickled:
        raise UserError(
            f"{directory} has its weights pickled ({', '.join(pickled)}), and reading those would run code. "
            "Convert them once, where you trust them: transformers.AutoModelForCausalLM.from_pretrained(path)"
            ".save_pretrained(new_path) writes safetensors"
        )
    raise UserError(f"{directory} has no safetensors file")


def _read_index(directory: Path, index: Path) -> dict[str, _Entry]:
    """All tensors named by an index, each from the file that the index says."""
    require_file(index, MAX_HEADER_BYTES)
    weight_map = parse_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    entries: dict[str, _Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.+-]{1,200}\.safetensors", file, re.ASCII):
            raise UserError(
                f"{index}: weight_map names {file!r}; allowed are .safetensors files beside the index"
            )
        if not (directory / file).is_file():
            raise UserError(f"{index}: {file} is missing")
        found = read_safetensors_header(directory / file)
        named = {name for name, where in weight_map.items() if where == file}
        if named != set(found):
            raise UserError(
                f"{directory / file}: not the tensors that {index.name} says: missing "
                f"{sorted(named - set(found))}, left over {sorted(set(found) - named)}"
            )
        entries |= found
    return entries


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map names to texts")


def _check_entry(path: Path, name: str, value: object, start: int, size: int) -> _Entry:
    def natural(item: object) -> bool:
        return type(item) is int and 0 <= item <= MAX_SIZE

    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            fits = len(shape) <= MAX_AXES and all(map(natural, [*shape, begin, end]))
            fits = fits and dtype in _BITS and begin <= end and start + end <= size
            if fits and math.prod(shape) * _BITS[dtype] == 8 * (end - begin):
                return _Entry(path, start + begin, start + end, dtype, tuple(shape))
    raise UserError(
        f"{path}: tensor {name} is {str(value)[:200]}; allowed is a dtype of the format, at most {MAX_AXES} "
        f"axes, and data_offsets that agree with them and lie in the {size - start} bytes of data"
    )


def _check_cover(path: Path, entries: dict[str, _Entry], start: int, size: int) -> None:
    """Tensors follow one another without gap or overlap and end with the file."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps" if entry.begin < position else "leaves a gap after"
            raise UserError(f"{path}: tensor {name} at byte {entry.begin} {kind} the tensor before it")
        position = entry.end
    if position != size:
        raise UserError(f"{path}: {size - position} bytes after the last tensor; allowed are none")
