"""GGUF files of llama.cpp as Hugging Face configuration, tokenizer and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.gguf_architectures import ARCHITECTURES, ROPE_TENSORS
from dpo.huggingface.gguf_changes import file_name, kind_of
from dpo.huggingface.gguf_metadata import GgufMetadata
from dpo.huggingface.gguf_reader import GgufTensor
from dpo.huggingface.gguf_tokenizer import end_tokens, make_tokenizer
from dpo.outcomes import UserError


class GgufFile(GgufMetadata):
    """One GGUF file, opened; nothing of its tensors is read before `tensors(...).read`."""

    def __init__(self, path: Path):
        super().__init__(path)
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; supported: "
                + ", ".join(ARCHITECTURES)
            )
        self._table = ARCHITECTURES[self.architecture]

    def config(self) -> JsonObject:
        """The configuration as `config.json` would say it."""
        self._require_supported()
        return {
            "vocab_size": self.tensor("token_embd.weight").shape[0],
            "tie_word_embeddings": self.is_tied,
            **self._table.configure(self),
            **self.token_ids(),
        }

    def _require_supported(self) -> None:
        """Refuse what llama.cpp reads of every architecture and no configuration here says."""
        allowed: dict[str, tuple[Any, ...]] = {"attention.causal": (None, True)}
        if not self.has("rope_factors_long.weight"):
            allowed["rope.scaling.attn_factor"] = (None, 1)
        for key, values in allowed.items():
            value = self.find(key)
            if value not in values:
                raise UserError(
                    f"{self.path}: {self.architecture}.{key} is {value!r}; supported: {values[-1]}, or none"
                )

    def token_ids(self) -> dict[str, int | None]:
        """Ids of the special tokens, as a generation configuration names them."""
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {name: self.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        return {name: value if type(value) is int else None for name, value in found.items()}

    def generation_config(self) -> JsonObject:
        """What ends a response, and the other special tokens; the vocabulary says more than its one EOS."""
        found = {name: value for name, value in self.token_ids().items() if value is not None}
        if "tokenizer.ggml.tokens" not in self.fields:
            return found
        ends = end_tokens(self.path, self.fields)
        first = [found["eos_token_id"]] if "eos_token_id" in found else []
        ends = [*first, *(end for end in ends if end not in first)]
        return found | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})

    def tensors(self, names: Iterable[str]) -> GgufTensors:
        """The file's tensors under these Hugging Face names, and others under their own."""
        name_map = gguf.get_tensor_name_map(self._table.names, self.num_layers)
        names = list(names)
        found: dict[str, _Part | _Number] = self._numbers(names)
        used = set(ROPE_TENSORS) | ({"output.weight"} if self.is_tied else set())
        for name in names:
            stacked = re.fullmatch(r"(.*)\.norms\.(\d+)\.weight", name)  # StableLM: one norm a head
            own = file_name(name_map, name)
            if own in self.container.tensors:
                found[name] = _Part(self.container.tensors[own], int(stacked[2]) if stacked else None)
                used.add(own)
        left: dict[str, _Part | _Number] = {
            name: _Part(t, None) for name, t in self.container.tensors.items() if name not in used
        }
        return GgufTensors(self, found | left)

    def _numbers(self, names: Sequence[str]) -> dict[str, _Part | _Number]:
        """Tensors that are numbers of the metadata: those with these names are lists of one number."""
        return {
            name.format(layer=layer): _Number(value, (1,) if name.format(layer=layer) in names else ())
            for name, key in self._table.numbers.items()
            for layer, value in enumerate(self.numbers(key))
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer with its chat template; raises as `make_tokenizer` does."""
        return make_tokenizer(
            self.path,
            self.fields,
            architecture=self.architecture,
            max_length=lambda: self.count("context_length"),
        )

    @property
    def licence(self) -> str | None:
        """The SPDX name that the metadata give."""
        found = self.fields.get("general.license")
        return found if isinstance(found, str) else None

    def read(self, tensor: GgufTensor, rows: slice) -> np.ndarray:
        """Rows of a tensor as Hugging Face has it, float32."""
        kind, change = kind_of(tensor.name), self._table.change
        if change is None or not change.applies(kind):
            return self.container.read(tensor, rows)
        values = self.container.read(tensor)
        try:
            return change.restore(kind, values, self.heads(change.heads))[rows]
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{self.path}: tensor {tensor.name} of shape {list(tensor.shape)} does not fit the number of "
                f"heads in the metadata: {error}"
            ) from error

    def shape(self, tensor: GgufTensor) -> tuple[int, ...]:
        """A tensor's shape as Hugging Face has it."""
        change, kind = self._table.change, kind_of(tensor.name)
        if change is None or not change.applies(kind):
            return tensor.shape
        return change.restore_shape(kind, tensor.shape)


class _Part(NamedTuple):
    """A tensor of the file, or one row of it."""

    tensor: GgufTensor
    row: int | None


class _Number(NamedTuple):
    """A tensor that is a number of the metadata."""

    value: float
    shape: tuple[int, ...]


class GgufTensors:
    """Tensors by Hugging Face name, dequantised to float32 when read."""

    def __init__(self, file: GgufFile, parts: dict[str, _Part | _Number]):
        self._file, self._parts = file, parts
        self.shapes = {name: self._shape(part) for name, part in parts.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor or a run of its rows as float32, in Hugging Face's layout."""
        part = self._parts[name]
        if isinstance(part, _Number):
            values = np.full(part.shape, part.value, np.float32)
            return values[rows] if part.shape else values
        tensor, row = part
        if row is None:
            return self._file.read(tensor, rows)
        return self._file.read(tensor, slice(row, row + 1))[0][rows]

    def _shape(self, part: _Part | _Number) -> tuple[int, ...]:
        if isinstance(part, _Number):
            return part.shape
        return self._file.shape(part.tensor)[0 if part.row is None else 1 :]
