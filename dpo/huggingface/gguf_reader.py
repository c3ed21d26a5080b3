"""The container of a GGUF file: its header is checked before any tensor is read; tensors are read by rows.

The layout is that of llama.cpp's `docs/gguf.md`, versions 2 and 3, little-endian; blocks of quantised numbers
are decoded by the `gguf` package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import gguf
import numpy as np

from dpo.outcomes import UserError

MAX_HEADER_BYTES = 2**28
"""Longest header that is read; a large vocabulary with its merges needs a tenth."""
MAX_AXES = 4

Value = TypeVar("Value")

_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class GgufTensor(NamedTuple):
    """Where one tensor lies."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    """Slowest axis first, as in numpy."""
    begin: int
    num_bytes: int


class GgufContainer:
    """Metadata and tensors of one file; `ValueError` unless the header is consistent and all data there."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            cursor = _Cursor(path, file, path.stat().st_size)
            num_tensors, num_fields = _read_counts(cursor)
            self.fields = _unique(path, (_read_field(cursor) for _ in range(num_fields)))
            infos = _unique(path, (_read_tensor_info(cursor) for _ in range(num_tensors)))
        alignment = self.fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{path}: general.alignment is {alignment!r}; allowed is a power of two")
        start = -(-cursor.position // alignment) * alignment
        self.tensors = {
            name: _place(path, name, info, start=start, alignment=alignment, size=cursor.size)
            for name, info in infos.items()
        }
        _check_overlap(path, self.tensors)

    def read(self, tensor: GgufTensor, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a run of its rows, as float32."""
        if len(tensor.shape) < 2:
            return self._decode(tensor, tensor.begin, tensor.num_bytes, tensor.shape)[rows]
        start, stop, _ = rows.indices(tensor.shape[0])
        row_bytes = tensor.num_bytes // max(tensor.shape[0], 1)
        shape = (max(stop - start, 0), *tensor.shape[1:])
        return self._decode(tensor, tensor.begin + start * row_bytes, shape[0] * row_bytes, shape)

    def has_equal_data(self, first: GgufTensor, second: GgufTensor) -> bool:
        """Whether two tensors are the same bytes of the same kind."""
        if first[1:3] != second[1:3]:
            return False
        return all(
            np.array_equal(
                self._bytes(first, first.begin + at, min(_BLOCK, first.num_bytes - at)),
                self._bytes(second, second.begin + at, min(_BLOCK, first.num_bytes - at)),
            )
            for at in range(0, first.num_bytes, _BLOCK)
        )

    def _decode(self, tensor: GgufTensor, begin: int, num_bytes: int, shape: tuple[int, ...]) -> np.ndarray:
        raw = self._bytes(tensor, begin, num_bytes)
        if not math.prod(shape):
            return np.zeros(shape, np.float32)
        raw = raw.reshape(math.prod(shape[:-1]), -1)
        try:
            return gguf.dequantize(raw, tensor.kind).reshape(shape)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {tensor.name} is stored as {tensor.kind.name}, which the gguf package "
                "does not decode"
            ) from error

    def _bytes(self, tensor: GgufTensor, begin: int, num_bytes: int) -> np.ndarray:
        raw = np.fromfile(self.path, np.uint8, count=num_bytes, offset=begin)
        if raw.size != num_bytes:
            raise UserError(f"{self.path}: tensor {tensor.name} ends after {raw.size} of {num_bytes} bytes")
        return raw


_BLOCK = 2**24


class _Cursor:
    """Reads a header forwards, never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.size, self.position = path, size, 0
        self._file, self._limit = file, min(size, MAX_HEADER_BYTES)

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self._limit - self.position:
            raise UserError(
                f"{self.path}: not a readable GGUF file: {num_bytes} bytes at byte {self.position} of the "
                f"header, which may reach to byte {self._limit}"
            )
        self.position += num_bytes
        return self._file.read(num_bytes)

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        content = self.take(self.number("<Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not a readable GGUF file: text that is not UTF-8") from error


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    magic, version = cursor.take(4), cursor.number("<I")
    if magic != b"GGUF" or version not in (2, 3):
        raise UserError(
            f"{cursor.path}: not a readable GGUF file: it begins with {magic!r} and version {version}; "
            "allowed are b'GGUF' and version 2 or 3, little-endian"
        )
    return cursor.number("<Q"), cursor.number("<Q")


def _read_field(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.text(), _read_value(cursor, cursor.number("<I"))


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        item, count = cursor.number("<I"), cursor.number("<Q")
        if item == _STRING:
            return [cursor.text() for _ in range(count)]
        return _read_scalars(cursor, item, count)
    return _read_scalars(cursor, kind, 1)[0]


def _read_scalars(cursor: _Cursor, kind: int, count: int) -> list[Any]:
    if kind not in _SCALARS and kind != _BOOL:
        raise UserError(f"{cursor.path}: not a readable GGUF file: metadata of type {kind}")
    dtype = np.dtype(_SCALARS.get(kind, "u1"))
    values = np.frombuffer(cursor.take(count * dtype.itemsize), dtype)
    return (values != 0).tolist() if kind == _BOOL else values.tolist()


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """Name; shape, kind and offset in the data."""
    name, num_axes = cursor.text(), cursor.number("<I")
    if num_axes > MAX_AXES:
        raise UserError(f"{cursor.path}: tensor {name} has {num_axes} axes; allowed are {MAX_AXES}")
    shape = tuple(cursor.number("<Q") for _ in range(num_axes))[::-1]
    return name, (shape, cursor.number("<I"), cursor.number("<Q"))


def _unique(path: Path, items: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, value in items:
        if name in found:
            raise UserError(f"{path}: not a readable GGUF file: {name} is there twice")
        found[name] = value
    return found


def _place(
    path: Path,
    name: str,
    info: tuple[tuple[int, ...], int, int],
    *,
    start: int,
    alignment: int,
    size: int,
) -> GgufTensor:
    shape, raw_kind, offset = info
    if raw_kind not in gguf.GGML_QUANT_SIZES:
        raise UserError(f"{path}: tensor {name} is stored as type {raw_kind}, which is not known")
    kind = gguf.GGMLQuantizationType(raw_kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(shape) // block * block_bytes
    begin = start + offset
    if not shape or 0 in shape or shape[-1] % block or offset % alignment or begin + num_bytes > size:
        raise UserError(
            f"{path}: tensor {name} of shape {list(shape)}, {kind.name}, at byte {begin}: allowed are one or "
            f"more blocks of {block}, aligned to {alignment} bytes, within the file's {size}"
        )
    return GgufTensor(name, kind, shape, begin, num_bytes)


def _check_overlap(path: Path, tensors: dict[str, GgufTensor]) -> None:
    position = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.num_bytes)):
        if tensor.begin < position:
            raise UserError(f"{path}: tensor {tensor.name} overlaps the tensor before it")
        position = tensor.begin + tensor.num_bytes
