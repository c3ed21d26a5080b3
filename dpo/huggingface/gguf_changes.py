"""What llama.cpp's conversion does to some tensors, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Heads = tuple[int, int]
"""Query heads, and key/value heads."""
Shape = tuple[int, ...]


def _same(shape: Shape) -> Shape:
    return shape


def _turned(shape: Shape) -> Shape:
    return shape[::-1]


class Change(NamedTuple):
    """How the values of some tensors differ between a GGUF file and Hugging Face."""

    applies: Callable[[str], bool]
    """Whether a tensor is changed, by its name in its layer."""
    restore: Callable[[str, np.ndarray, Heads], np.ndarray]
    """Hugging Face's values from the file's."""
    convert: Callable[[str, np.ndarray, Heads], np.ndarray]
    """The file's values from Hugging Face's."""
    restore_shape: Callable[[Shape], Shape] = _same
    """Hugging Face's shape from the file's."""
    convert_shape: Callable[[Shape], Shape] = _same
    """The file's shape from Hugging Face's."""


def kind_of(file_name: str) -> str:
    """The name without its layer: blk.3.attn_q.weight → attn_q.weight."""
    return re.sub(r"^blk\.\d+\.", "", file_name)


def _is_query_or_key(kind: str) -> bool:
    return re.fullmatch(r"attn_[qk]\.(weight|bias)", kind) is not None


def _undo_interleaving(kind: str, tensor: np.ndarray, heads: Heads) -> np.ndarray:
    count = heads[0 if kind.startswith("attn_q") else 1]
    return tensor.reshape(count, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _interleave(kind: str, tensor: np.ndarray, heads: Heads) -> np.ndarray:
    count = heads[0 if kind.startswith("attn_q") else 1]
    return tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _is_falcon_qkv(kind: str) -> bool:
    return kind == "attn_qkv.weight"


def _regroup(kind: str, tensor: np.ndarray, heads: Heads) -> np.ndarray:
    queries, groups = heads
    rows = tensor.reshape(queries + 2 * groups, -1, tensor.shape[-1])
    parts = np.split(rows, [queries, queries + groups])
    grouped = [part.reshape(groups, -1, *rows.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(tensor.shape)


def _ungroup(kind: str, tensor: np.ndarray, heads: Heads) -> np.ndarray:
    queries, groups = heads
    rows = tensor.reshape(groups, queries // groups + 2, -1, tensor.shape[-1])
    parts = np.split(rows, [queries // groups, queries // groups + 1], axis=1)
    return np.concatenate([part.reshape(-1, tensor.shape[-1]) for part in parts])


INTERLEAVED = Change(_is_query_or_key, _undo_interleaving, _interleave)
"""llama.cpp interleaves the two halves of every query and key head of Llama's architecture."""
OFFSET_NORMS = Change(
    lambda kind: kind.endswith("norm.weight"),
    lambda kind, tensor, heads: tensor - 1,
    lambda kind, tensor, heads: tensor + 1,
)
"""Gemma multiplies by 1 + scale; llama.cpp stores the sum."""
TURNED_CONV1D = Change(
    lambda kind: kind in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    lambda kind, tensor, heads: tensor.T,
    lambda kind, tensor, heads: tensor.T,
    restore_shape=_turned,
    convert_shape=_turned,
)
"""GPT-2's Conv1D is [in, out]."""
SQUEEZED = Change(
    lambda kind: kind == "shortconv.conv.weight",
    lambda kind, tensor, heads: tensor[:, None, :],
    lambda kind, tensor, heads: tensor[:, 0, :],
    lambda shape: (shape[0], 1, *shape[1:]),
    lambda shape: (shape[0], *shape[2:]),
)
"""A convolution of each channel by itself has no second dimension."""
UNGROUPED = Change(_is_falcon_qkv, _regroup, _ungroup)
"""Falcon keeps a key/value head with its queries; llama.cpp puts all queries first, keys, values."""
