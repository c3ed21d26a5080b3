"""Adapters as peft stores them: a directory with adapter_config.json and adapter_model.safetensors.

Read strictly: what this project does not compute (adapters on embeddings, trained biases, initialisations
that change the base) is an error that lists all of it. peft has an A and a B a layer, of ranks that may
differ; stacked, the smaller ones are padded with zeros, which training does not move, and α is scaled so that
s stays.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo.files import CHECKSUMS_FILE, damaged_files
from dpo.huggingface.adapter_settings import (
    PATTERN_SECONDS,
    REMEDY,
    base_of,
    compiled,
    read_adapter_config,
    require_layers,
    require_matches,
    require_time,
)
from dpo.huggingface.adapters import Adapter, linear_bindings, module_names
from dpo.huggingface.binding import Binding
from dpo.huggingface.model_names import CONFIG_FILE
from dpo.huggingface.weights import SafetensorsDirectory, Tensors
from dpo.models.lora import Method
from dpo.outcomes import UserError

WEIGHTS_FILE = "adapter_model.safetensors"


class AdapterWeights(NamedTuple):
    """The adapter of one of Hugging Face's linears in one layer, as peft shapes it."""

    a: np.ndarray
    """[r, in]."""
    b: np.ndarray
    """[out, r]."""
    magnitude: np.ndarray | None
    """[out]."""
    alpha: float


class AdapterDirectory:
    """An opened adapter, of which no tensor was read yet."""

    def __init__(self, directory: str | Path):
        """Raises `ValueError` when there is no adapter, or for all in it that is not supported."""
        self.directory = Path(directory).expanduser()
        if not (self.directory / CONFIG_FILE).is_file():
            raise UserError(f"{directory} is no adapter: it has no {CONFIG_FILE}")
        if os.path.lexists(self.directory / CHECKSUMS_FILE) and (problems := damaged_files(self.directory)):
            raise UserError(
                f"{directory} is damaged ({'; '.join(problems)}); delete its {CHECKSUMS_FILE} if that was "
                "meant, or export it again"
            )
        self._config = read_adapter_config(self.directory / CONFIG_FILE)
        self._tensors = SafetensorsDirectory(self.directory)
        self.method = Method(bool(self._config.get("use_rslora")), bool(self._config.get("use_dora")))
        self._patience = time.monotonic() + PATTERN_SECONDS
        self.modules = self._find_modules()
        """Names of the adapted linears, such as model.layers.0.self_attn.q_proj."""
        require_matches(self.directory / CONFIG_FILE, self._config, self.modules, until=self._patience)

    @property
    def base(self) -> str:
        """Source of the model that the adapter was trained on, on the hub with the revision that it names.

        Raises:
          ValueError: when the adapter does not say.
        """
        return base_of(self._config, self.directory / CONFIG_FILE)

    @property
    def named_base(self) -> str | None:
        """`base`, or None when the adapter does not say."""
        return self.base if self._config.get("base_model_name_or_path") else None

    def read(self, module: str) -> AdapterWeights:
        """The adapter of one module in float32."""
        a, b = (self._read(f"{module}.lora_{letter}.weight") for letter in "AB")
        magnitude = self._read(self._magnitude_name(module)) if self.method.use_dora else None
        alpha = self._find_alpha(module)
        sizes = [list(array.shape) for array in (a, b, magnitude) if array is not None]
        if (
            a.ndim != 2
            or b.ndim != 2
            or not 0 < a.shape[0] == b.shape[1]
            or sizes[2:] not in ([], [[len(b)]])
        ):
            raise UserError(
                f"{self.directory}: the tensors of {module} are {sizes}; allowed are A [r, in], B [out, r] "
                "with r above 0, and with use_dora a magnitude [out]"
            )
        return AdapterWeights(a, b, magnitude, alpha)

    def _find_alpha(self, module: str) -> float:
        """The module's own alpha, by the first pattern that is its name or an end of it."""
        pattern = self._config.get("alpha_pattern") or {}
        for key, alpha in pattern.items():
            require_time(self.directory / CONFIG_FILE, "alpha_pattern", self._patience)
            if compiled(key).match(module):
                return float(alpha)
        return float(self._config["lora_alpha"])

    def merge(self, module: str, weight: np.ndarray) -> np.ndarray:
        """One linear's weight as Hugging Face stores it, with its adapter merged, in float32."""
        a, b, magnitude, alpha = self.read(module)
        transposed = bool(self._config.get("fan_in_fan_out"))
        kernel = np.asarray(weight.T if transposed else weight, np.float32)
        if kernel.shape != (b.shape[0], a.shape[1]):
            raise UserError(
                f"{self.directory}: {module} is [{b.shape[0]}, {a.shape[1]}] there (fan_in_fan_out "
                f"{transposed}) and {list(kernel.shape)} in the base model"
            )
        kernel = kernel + np.float32(alpha / self.method.divisor(a.shape[0])) * (b @ a)
        if magnitude is not None:
            norms = np.linalg.norm(kernel, axis=1)
            kernel = kernel * (magnitude / np.where(norms > 0, norms, 1))[:, None]
        return kernel.T if transposed else kernel

    def _find_modules(self) -> tuple[str, ...]:
        """The modules, each with exactly the tensors that it needs."""
        modules = dict.fromkeys(
            found[1] for name in self._tensors.shapes if (found := _TENSOR_NAME.fullmatch(name))
        )
        expected = {
            PREFIX + name
            for module in modules
            for name in (
                f"{module}.lora_A.weight",
                f"{module}.lora_B.weight",
                *([self._magnitude_name(module)] if self.method.use_dora else []),
            )
        }
        there = set(self._tensors.shapes)
        if not modules or there != expected:
            raise UserError(
                f"{self.directory / WEIGHTS_FILE}: missing {sorted(expected - there)}, left over "
                f"{sorted(there - expected)}; allowed are lora_A and lora_B (and lora_magnitude_vector with "
                f"use_dora) of linears. {REMEDY}"
            )
        return tuple(modules)

    def require_layers(self, modules: Iterable[str]) -> None:
        """The base, of whose linears these are the names, has the layers that are to have adapters.

        Raises:
          UserError: otherwise.
        """
        require_layers(self.directory / CONFIG_FILE, self._config, modules)

    def _magnitude_name(self, module: str) -> str:
        """Some versions of peft end the name with .weight."""
        name = f"{module}.lora_magnitude_vector"
        return f"{name}.weight" if f"{PREFIX}{name}.weight" in self._tensors.shapes else name

    def _read(self, name: str) -> np.ndarray:
        return self._tensors.read(PREFIX + name).astype(np.float32)


class MergedTensors:
    """A model's tensors with an adapter merged into them as they are read; `modules` are theirs by name."""

    def __init__(self, base: Tensors, adapter: AdapterDirectory, modules: Mapping[str, str]):
        unknown = sorted(set(adapter.modules) - set(modules.values()))
        if unknown:
            raise UserError(f"{adapter.directory} adapts what the base model does not have: {unknown}")
        adapter.require_layers(modules.values())
        self.shapes = base.shapes
        self._base, self._adapter = base, adapter
        self._adapted = {name: module for name, module in modules.items() if module in adapter.modules}
        self._merged: tuple[str, np.ndarray] = "", np.zeros(0)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor or a run of its rows; float32 where it has an adapter."""
        module = self._adapted.get(name)
        if module is None:
            return self._base.read(name, rows)
        if self._merged[0] != name:  # a large tensor is asked for run by run
            self._merged = name, self._adapter.merge(module, self._base.read(name))
        return self._merged[1][rows]


def read_base(directory: Path) -> str:
    """The same as `AdapterDirectory.base`, of a directory whose weights need not be there."""
    return base_of(read_adapter_config(directory / CONFIG_FILE), directory / CONFIG_FILE)


def load_adapters(directory: AdapterDirectory, bindings: Iterable[Binding]) -> list[Adapter]:
    """A stored adapter, stacked over layers, for a decoder with these parameters.

    Raises:
      ValueError: when it adapts modules that are no linears of the decoder, or of other sizes, listing them.
    """
    linears = linear_bindings(bindings)
    places = {
        name: (binding, layer) for binding in linears for layer, name in enumerate(module_names(binding))
    }
    unknown = [name for name in directory.modules if name not in places]
    if unknown:
        raise UserError(
            f"{directory.directory} adapts what is no linear of this model: {_ends(unknown)} (such as "
            f"{unknown[0]}); allowed are {_ends(places)}"
        )
    directory.require_layers(places)
    found: dict[str, dict[int, AdapterWeights]] = {}
    for name in directory.modules:
        binding, layer = places[name]
        weights = directory.read(name)
        sizes = (weights.b.shape[0], weights.a.shape[1])
        expected = binding.shape if binding.rule.transposed else binding.shape[::-1]
        if sizes != expected:
            raise UserError(
                f"{directory.directory}: {name} is {list(sizes)} there and {list(expected)} in this model"
            )
        found.setdefault(binding.key, {})[layer] = weights
    return [
        _stack(binding, found[binding.key], directory.method) for binding in linears if binding.key in found
    ]


def _ends(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _stack(binding: Binding, layers: dict[int, AdapterWeights], method: Method) -> Adapter:
    """One layer after another, with zeros where a layer has no adapter or one of smaller rank."""
    rank = max(weights.a.shape[0] for weights in layers.values())
    some = next(iter(layers.values()))
    num_layers, size_in, size_out = len(binding.names), some.a.shape[1], some.b.shape[0]
    a = np.zeros((num_layers, size_in, rank), np.float32)
    b = np.zeros((num_layers, rank, size_out), np.float32)
    magnitude = np.ones((num_layers, size_out), np.float32)
    alpha = np.zeros(num_layers, np.float32)
    for layer, weights in layers.items():
        own = weights.a.shape[0]
        a[layer, :, :own], b[layer, :own] = weights.a.T, weights.b.T
        alpha[layer] = weights.alpha * (method.divisor(rank) / method.divisor(own))
        if weights.magnitude is not None:
            magnitude[layer] = weights.magnitude
    return Adapter(binding, a, b, magnitude if method.use_dora else None, alpha)


PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    re.escape(PREFIX) + r"(.+)\.lora_(?:A\.weight|B\.weight|magnitude_vector(?:\.weight)?)"
)
