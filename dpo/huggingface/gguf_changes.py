"""What llama.cpp's conversion does to some tensors, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import gguf
import numpy as np

Heads = tuple[int, int]
"""Query heads, and key/value heads; of the delta rule key heads, and value heads."""
Shape = tuple[int, ...]
STILL = np.float32(1e30)
"""Divisor of the frequency of channels that do not turn (Gemma 4)."""


def _same(kind: str, shape: Shape) -> Shape:
    return shape


def _turned(kind: str, shape: Shape) -> Shape:
    return shape[::-1]


class Change(NamedTuple):
    """How the values of some tensors differ between a GGUF file and Hugging Face."""

    applies: Callable[[str], bool]
    """Whether a tensor is changed, by its name in its layer."""
    restore: Callable[[str, np.ndarray, Heads], np.ndarray]
    """Hugging Face's values from the file's."""
    convert: Callable[[str, np.ndarray, Heads], np.ndarray]
    """The file's values from Hugging Face's."""
    restore_shape: Callable[[str, Shape], Shape] = _same
    """Hugging Face's shape from the file's."""
    convert_shape: Callable[[str, Shape], Shape] = _same
    """The file's shape from Hugging Face's."""
    heads: Literal["attention", "delta"] = "attention"
    """Whose heads it counts."""


def file_name(name_map: gguf.TensorNameMap, name: str) -> str | None:
    """llama.cpp's name of a tensor of Hugging Face's; None where it has none.

    StableLM's norms of single heads are one tensor, the delta rule's steps are named as Mamba's, and a
    layer's scalar is a weight.
    """
    name = re.sub(r"\.norms\.\d+\.weight$", ".weight", name)
    name = re.sub(r"linear_attn\.dt_bias$", "linear_attn.dt_proj.bias", name)
    name = re.sub(r"layer_scalar$", "layer_scalar.weight", name)
    return name_map.get_name(name, try_suffixes=(".weight", ".bias"))


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
    lambda kind, shape: (shape[0], 1, *shape[1:]),
    lambda kind, shape: (shape[0], *shape[2:]),
)
"""A convolution of each channel by itself has no second dimension."""
UNGROUPED = Change(_is_falcon_qkv, _regroup, _ungroup)
"""Falcon keeps a key/value head with its queries; llama.cpp puts all queries first, keys, values."""


def _is_of_delta_rule(kind: str) -> bool:
    return kind in _ORDERED or (kind.endswith("norm.weight") and kind != "ssm_norm.weight")


_CONVOLUTION = "ssm_conv1d.weight"
_ORDERED = {
    **dict.fromkeys(("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"), 0),
    **dict.fromkeys(("attn_qkv.weight", _CONVOLUTION), 0),
    "ssm_out.weight": 1,
}
"""Tensors of linear attention that have channels of value heads, and their axis."""


def _reordered(kind: str, tensor: np.ndarray, heads: Heads, *, turns: bool) -> np.ndarray:
    """Value heads by key head (k0 k0 k1 k1) ↔ key heads in turn (k0 k1 k0 k1), along their axis.

    Queries and keys, which are as wide as values, stay before them.
    """
    keys, values = heads
    axis, before = _ORDERED[kind], 2 * keys if kind in ("attn_qkv.weight", _CONVOLUTION) else 0
    by_head = np.moveaxis(tensor, axis, 0)
    rows = by_head.reshape(before + values, -1, *by_head.shape[1:])
    counts = (keys, values // keys) if turns else (values // keys, keys)
    moved = rows[before:].reshape(*counts, *rows.shape[1:]).swapaxes(0, 1).reshape(rows[before:].shape)
    return np.moveaxis(np.concatenate([rows[:before], moved]).reshape(by_head.shape), 0, axis)


def _restore_delta(kind: str, tensor: np.ndarray, heads: Heads) -> np.ndarray:
    if kind not in _ORDERED:
        return tensor - 1
    found = _reordered(kind, tensor, heads, turns=False)
    if kind == "ssm_a":
        return np.log(-found)
    return found[:, None, :] if kind == _CONVOLUTION else found


def _convert_delta(kind: str, tensor: np.ndarray, heads: Heads) -> np.ndarray:
    if kind not in _ORDERED:
        return tensor + 1
    if kind == "ssm_a":
        tensor = -np.exp(tensor)
    return _reordered(kind, tensor[:, 0, :] if kind == _CONVOLUTION else tensor, heads, turns=True)


DELTA_RULE = Change(
    _is_of_delta_rule,
    _restore_delta,
    _convert_delta,
    lambda kind, shape: (shape[0], 1, *shape[1:]) if kind == _CONVOLUTION else shape,
    lambda kind, shape: (shape[0], *shape[2:]) if kind == _CONVOLUTION else shape,
    heads="delta",
)
"""Qwen3.5: norms that multiply by 1 + scale but the delta rule's, -exp(A_log), and value heads in turn."""
