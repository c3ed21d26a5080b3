"""What a GGUF file's metadata say of its architecture, checked value by value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo.huggingface.gguf_reader import GgufContainer, GgufTensor
from dpo.outcomes import UserError


class GgufMetadata:
    """A file's header: numbers under its architecture's name, and which tensors there are."""

    def __init__(self, path: Path):
        self.path = path
        self.container = GgufContainer(path)
        self.fields = self.container.fields
        self.architecture = str(self.fields.get("general.architecture", ""))

    @property
    def is_tied(self) -> bool:
        """No output projection, or one that repeats the embedding (as GPT-2's conversion writes)."""
        tensors = self.container.tensors
        return "output.weight" not in tensors or self.container.has_equal_data(
            tensors["output.weight"], self.tensor("token_embd.weight")
        )

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number of the architecture's metadata; `ValueError` where it is none."""
        value = self.find(key, default)
        if type(value) is not int or value < 1:
            raise UserError(
                f"{self.path}: {self.architecture}.{key} is {value!r}; allowed is a number from 1"
            )
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A number from 0 of the architecture's metadata; `ValueError` where it is none."""
        value = self.find(key, default)
        return 0 if type(value) is int and value == 0 else self.count(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the architecture's metadata; `ValueError` where it is none."""
        value = self.find(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r}; allowed is a number")
        return float(value)

    def find(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's metadata, or the default; a list of equal values is one value."""
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return published(value) if isinstance(value, float) else value

    def by_layer(self, key: str, kind: type) -> list[Any]:
        """A value for each layer, of which the file has a list or one for all; `ValueError` for others."""
        return self._by_layer(f"{self.architecture}.{key}", kind)

    def numbers(self, key: str) -> list[float]:
        """A number for each layer, under a key without the architecture; `ValueError` for others."""
        return self._by_layer(key, float)

    def _by_layer(self, key: str, kind: type) -> list[Any]:
        value = self.fields.get(key)
        found = value if isinstance(value, list) else [value] * self.num_layers
        if len(found) != self.num_layers or not all(type(each) is kind for each in found):
            allowed = f"one {kind.__name__}, or one a layer, {self.num_layers}"
            raise UserError(f"{self.path}: {key} is {value!r}; allowed is {allowed}")
        return found

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self.container.tensors

    def tensor(self, name: str) -> GgufTensor:
        """A tensor that must be there."""
        if name not in self.container.tensors:
            raise UserError(f"{self.path}: tensor {name} is missing")
        return self.container.tensors[name]

    def values(self, name: str) -> np.ndarray:
        """What a small tensor holds."""
        return self.container.read(self.tensor(name))

    @property
    def num_layers(self) -> int:
        """Layers; every one has tensors."""
        layers, tensors = self.count("block_count"), len(self.container.tensors)
        if layers > tensors:
            raise UserError(
                f"{self.path}: {self.architecture}.block_count is {layers}; it has {tensors} tensors"
            )
        return layers

    def heads(self, of: Literal["attention", "delta"]) -> tuple[int, int]:
        """Query heads and key/value heads, or key heads and value heads of the delta rule."""
        if of == "attention":
            return self.num_heads
        return self.count("ssm.group_count"), self.count("ssm.time_step_rank")

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query heads, and key/value heads; layers that do not attend have 0 of these."""
        heads = self.count("attention.head_count")
        found = self.find("attention.head_count_kv", heads)
        attending = [each for each in found if each != 0] if isinstance(found, list) else []
        if attending and all(type(each) is int and each == max(attending[0], 1) for each in attending):
            return heads, attending[0]
        return heads, self.count("attention.head_count_kv", heads)


def published(value: float) -> float:
    """A float that was published in decimal and stored in float32: 9.99999975e-06 is 1e-05."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
