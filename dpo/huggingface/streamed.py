"""Parameters made one tensor at a time while they are written: read from files, or merged with adapters.

A model of such parameters has its shapes, and takes the memory of one tensor while it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo.huggingface.adapters import locate, plain_shapes
from dpo.huggingface.binding import Binding
from dpo.huggingface.weights import Tensors
from dpo.models.decoder import Decoder
from dpo.models.linear import Linear
from dpo.models.lora import LoraLinear
from dpo.models.quantized import BaseDtype, Int8Linear, as_held


@runtime_checkable
class Streamed(Protocol):
    """A parameter that stacks what is made on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int

    def part(self, index: int) -> np.ndarray:
        """What belongs to one tensor of a file, counted along the leading axes."""
        ...


@runtime_checkable
class Stored(Protocol):
    """A parameter that is read whole when it is asked for, and kept by who asked alone."""

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int

    def load(self) -> np.ndarray:
        """All of it, on the host."""
        ...


class InFile:
    """A parameter that stays in its file, with the numbers that it has once it is held as `held`."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, binding: Binding, leaf: str, tensors: Tensors, shape: tuple[int, ...], held: BaseDtype
    ):
        self.shape, self.size = shape, math.prod(shape)
        self._binding, self._leaf, self._tensors = binding, leaf, tensors
        self._held: BaseDtype = held

    def part(self, index: int) -> np.ndarray:
        """Read the tensor, of which this may be a part."""
        parts = self._binding.to_ours(self._tensors.read(self._binding.names[index]))
        values = np.asarray(parts[self._binding.leaves.index(self._leaf)], np.float32)
        return as_held(values, self._leaf.rpartition(".")[2], self._held)


class Merged:
    """The kernel that a linear computes with, adapter merged, in float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, module: LoraLinear | Int8Linear, shape: tuple[int, ...]):
        self.shape, self.size = shape, math.prod(shape)
        self._module = module

    def part(self, index: int) -> np.ndarray:
        """One layer's kernel: the linear of that layer alone is made."""
        graphdef, state = nnx.split(self._module)
        num_leading = len(self.shape) - 2
        layer = jax.tree.map(lambda leaf: jnp.asarray(take(leaf, index, num_leading)), state)
        return np.asarray(nnx.merge(graphdef, layer).full_kernel)


def in_files(
    bindings: Sequence[Binding], tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], *, held: BaseDtype
) -> dict[str, InFile]:
    """Every parameter by path, none of them read."""
    return {
        leaf: InFile(binding, leaf, tensors, shapes[leaf], held)
        for binding in bindings
        for leaf in binding.leaves
    }


def plain_model(model: Decoder) -> Decoder:
    """The same model without adapters, to be written: its kernels are merged one layer at a time."""
    graphdef, state = nnx.split(plain_shapes(model))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    flat = {path: _plain(model, ".".join(map(str, path)), shape) for path, shape in shapes.items()}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(flat))
    return nnx.merge(graphdef, state)


def loaded(bindings: Iterable[Binding], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of some bindings, read where they are stored: to be given up before others are."""
    found = {path: leaves[path] for binding in bindings for path in binding.leaves}
    return {path: leaf.load() if isinstance(leaf, Stored) else leaf for path, leaf in found.items()}


def take(leaf: Any, index: int, num_leading: int) -> np.ndarray:
    """One tensor's part of a parameter, on the host; the others are not copied."""
    if isinstance(leaf, Streamed):
        return leaf.part(index)
    for position in np.unravel_index(index, leaf.shape[:num_leading]) if num_leading else ():
        if isinstance(leaf, jax.Array):
            leaf = jax.lax.dynamic_index_in_dim(leaf, int(position), keepdims=False)
        else:
            leaf = leaf[int(position)]
    return np.asarray(leaf)


def _plain(model: Decoder, path: str, shape: tuple[int, ...]) -> Any:
    """One parameter of the plain model: as it is held, or merged on demand."""
    parent, name = locate(model, path)
    module, leaf = getattr(parent, name), path.rpartition(".")[2]
    if leaf == "kernel" and not isinstance(module, Linear):
        return Merged(module, shape)
    base = module.base if isinstance(module, LoraLinear) else module
    return getattr(base, leaf).get_value()
