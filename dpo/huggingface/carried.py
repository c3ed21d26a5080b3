"""What a model has beside its text model: tensors and settings for images, copied as they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo.huggingface.foreign_json import read_small_json
from dpo.huggingface.weight_names import SPELLINGS, Spelling, find_spelling
from dpo.huggingface.weights import SafetensorsDirectory
from dpo.outcomes import UserError

_SETTINGS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""How images become numbers."""


class Carried(NamedTuple):
    """The tensors beside a text model, of which nothing but the headers was read."""

    directory: Path
    tensors: SafetensorsDirectory
    names: tuple[str, ...]
    spelling: Spelling
    """How the checkpoint names its text model's tensors."""

    def __str__(self) -> str:
        """Their number, their bytes, and the parts that they are of."""
        parts = Counter(_part(name) for name in self.names)
        total = sum(self.num_bytes(name) for name in self.names)
        listed = ", ".join(f"{name} ({count})" for name, count in parts.items())
        return f"{len(self.names)} tensors, {total / 1e6:.1f} MB: {listed or 'none'}"

    def num_bytes(self, name: str) -> int:
        """Of a tensor, as it is stored."""
        return self.tensors.stored(name)[2]

    def shards(self, max_bytes: int) -> list[list[str]]:
        """The names, as many together as fit; a single larger tensor is alone."""
        shards: list[list[str]] = []
        filled = 0
        for name in self.names:
            size = self.num_bytes(name)
            if not shards or filled + size > max_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        return shards

    def write_tensors(self, path: Path, names: Sequence[str]) -> None:
        """Copy tensors into one safetensors file, in runs of bytes."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name in names:
            dtype, shape, size = self.tensors.stored(name)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
            begin += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in self.tensors.read_bytes(name):
                    file.write(piece)

    def write_settings(self, target: Path) -> None:
        """Copy the files that say how images are made ready."""
        for name in _SETTINGS:
            if (self.directory / name).is_file():
                text = json.dumps(read_small_json(self.directory / name), indent=2, sort_keys=True)
                (target / name).write_text(text + "\n", encoding="utf-8")


def find_carried(directory: Path) -> Carried:
    """The tensors of a directory that are not the text model's."""
    tensors = SafetensorsDirectory(directory)
    spelling = find_spelling(list(tensors.shapes))
    if spelling is None:
        raise UserError(
            f"{directory} has no tensor of a text model; allowed are names that begin with "
            + ", ".join(body for body, _ in SPELLINGS)
        )
    return Carried(
        directory,
        tensors,
        tuple(sorted(name for name in tensors.shapes if not name.startswith(spelling))),
        spelling,
    )


def _part(name: str) -> str:
    """vision_tower of vision_tower.encoder.layers.0.mlp.fc1.bias; model.visual of model.visual.merger.…"""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] == "model" else 1])
