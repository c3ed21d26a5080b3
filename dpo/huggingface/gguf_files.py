"""GGUF files of llama.cpp as Hugging Face configuration, tokenizer and tensors.

An architecture is one row of `ARCHITECTURES`: what its metadata mean as a configuration, and what llama.cpp's
conversion did to its tensors. What a file cannot say (llama.cpp has it in its code) is said here, with a
comment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.huggingface.gguf_reader import GgufContainer, GgufTensor
from dpo.huggingface.gguf_tokenizer import end_tokens, make_tokenizer
from dpo.outcomes import UserError

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold divisors of rotary frequencies; they become configuration."""


class Architecture(NamedTuple):
    """One row of the table."""

    names: gguf.MODEL_ARCH
    """llama.cpp's names of the tensors."""
    configure: Callable[[GgufFile], dict[str, Any]]
    """The configuration, but for what all have in common."""
    restore: Callable[[GgufFile, str, np.ndarray], np.ndarray] | None = None
    """Hugging Face's values from the file's, by the tensor's name in its layer; None where they are equal."""
    is_restored: Callable[[str], bool] = lambda _: False
    """The tensors that `restore` changes."""


class GgufFile:
    """One GGUF file, opened; nothing of its tensors is read before `tensors(...).read`."""

    def __init__(self, path: Path):
        self.path = path
        self.container = GgufContainer(path)
        self._fields = self.container.fields
        self.architecture = str(self._fields.get("general.architecture", ""))
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; supported: "
                + ", ".join(ARCHITECTURES)
            )
        self._table = ARCHITECTURES[self.architecture]

    def config(self) -> dict[str, Any]:
        """The configuration as `config.json` would say it."""
        return {
            "vocab_size": self.tensor("token_embd.weight").shape[0],
            "tie_word_embeddings": self.is_tied,
            **self._table.configure(self),
            **self.token_ids(),
        }

    def token_ids(self) -> dict[str, int | None]:
        """Ids of the special tokens, as a generation configuration names them."""
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {name: self._fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        return {name: value if type(value) is int else None for name, value in found.items()}

    def generation_config(self) -> dict[str, Any]:
        """What ends a response, and the other special tokens; the vocabulary says more than its one EOS."""
        found = {name: value for name, value in self.token_ids().items() if value is not None}
        if "tokenizer.ggml.tokens" not in self._fields:
            return found
        ends = end_tokens(self.path, self._fields)
        first = [found["eos_token_id"]] if "eos_token_id" in found else []
        ends = [*first, *(end for end in ends if end not in first)]
        return found | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})

    def tensors(self, names: Iterable[str]) -> GgufTensors:
        """The file's tensors under these Hugging Face names, and others under their own."""
        name_map = gguf.get_tensor_name_map(self._table.names, self.num_layers)
        found: dict[str, _Part] = {}
        used = set(ROPE_TENSORS) | ({"output.weight"} if self.is_tied else set())
        for name in names:
            stacked = re.fullmatch(r"(.*)\.norms\.(\d+)\.weight", name)  # StableLM: one norm a head
            whole = f"{stacked[1]}.weight" if stacked else name
            own = name_map.get_name(whole, try_suffixes=(".weight", ".bias"))
            if own in self.container.tensors:
                found[name] = _Part(self.container.tensors[own], int(stacked[2]) if stacked else None)
                used.add(own)
        left = {name: _Part(t, None) for name, t in self.container.tensors.items() if name not in used}
        return GgufTensors(self, found | left)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer with its chat template; raises as `make_tokenizer` does."""
        return make_tokenizer(
            self.path,
            self._fields,
            architecture=self.architecture,
            max_length=lambda: self.count("context_length"),
        )

    @property
    def licence(self) -> str | None:
        """The SPDX name that the metadata give."""
        found = self._fields.get("general.license")
        return found if isinstance(found, str) else None

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

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the architecture's metadata; `ValueError` where it is none."""
        value = self.find(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r}; allowed is a number")
        return float(value)

    def find(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's metadata, or the default; a list of equal values is one value."""
        value = self._fields.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return _published(value) if isinstance(value, float) else value

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

    def read(self, tensor: GgufTensor, rows: slice) -> np.ndarray:
        """Rows of a tensor as Hugging Face has it, float32."""
        kind = _kind(tensor.name)
        if self._table.restore is None or not self._table.is_restored(kind):
            return self.container.read(tensor, rows)
        values = self.container.read(tensor)
        try:
            return self._table.restore(self, kind, values)[rows]
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{self.path}: tensor {tensor.name} of shape {list(tensor.shape)} does not fit the number of "
                f"heads in the metadata: {error}"
            ) from error

    def shape(self, tensor: GgufTensor) -> tuple[int, ...]:
        """A tensor's shape as Hugging Face has it."""
        is_turned = self.architecture == "gpt2" and self._table.is_restored(_kind(tensor.name))
        return tensor.shape[::-1] if is_turned else tensor.shape

    @property
    def num_layers(self) -> int:
        """Layers; every one has tensors."""
        layers, tensors = self.count("block_count"), len(self.container.tensors)
        if layers > tensors:
            raise UserError(
                f"{self.path}: {self.architecture}.block_count is {layers}; it has {tensors} tensors"
            )
        return layers

    @property
    def num_heads(self) -> tuple[int, int]:
        """Query heads, and key/value heads."""
        heads = self.count("attention.head_count")
        return heads, self.count("attention.head_count_kv", heads)


class _Part(NamedTuple):
    """A tensor of the file, or one row of it."""

    tensor: GgufTensor
    row: int | None


class GgufTensors:
    """Tensors by Hugging Face name, dequantised to float32 when read."""

    def __init__(self, file: GgufFile, parts: dict[str, _Part]):
        self._file, self._parts = file, parts
        self.shapes = {
            name: file.shape(tensor)[0 if row is None else 1 :] for name, (tensor, row) in parts.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor or a run of its rows as float32, in Hugging Face's layout."""
        tensor, row = self._parts[name]
        if row is None:
            return self._file.read(tensor, rows)
        return self._file.read(tensor, slice(row, row + 1))[0][rows]


# ---- configurations ----


def _common(file: GgufFile, model_type: str) -> dict[str, Any]:
    heads, kv_heads = file.num_heads
    return {
        "model_type": model_type,
        "hidden_size": file.count("embedding_length"),
        "intermediate_size": file.count("feed_forward_length"),
        "num_hidden_layers": file.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": file.count("attention.key_length", file.count("embedding_length") // heads),
        "max_position_embeddings": file.count("context_length"),
    }


def _rms(file: GgufFile, model_type: str, **choices: Any) -> dict[str, Any]:
    return {
        **_common(file, model_type),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file),
        **choices,
    }


def _llama(file: GgufFile) -> dict[str, Any]:
    """Llama, and Mistral, which llama.cpp calls by the same name."""
    window = file.find("attention.sliding_window", None)
    config = _rms(file, "llama" if window is None else "mistral", hidden_act="silu")
    if window is not None:
        return {**config, "sliding_window": window}
    return {
        **config,
        "head_dim": file.count(
            "attention.key_length", file.count("rope.dimension_count", config["head_dim"])
        ),
        "attention_bias": file.has("blk.0.attn_q.bias"),
        "mlp_bias": file.has("blk.0.ffn_up.bias"),
    }


def _qwen2(file: GgufFile) -> dict[str, Any]:
    return _rms(file, "qwen2", hidden_act="silu", use_sliding_window=False)


def _qwen3(file: GgufFile) -> dict[str, Any]:
    has_bias = file.has("blk.0.attn_q.bias")
    return _rms(file, "qwen3", hidden_act="silu", use_sliding_window=False, attention_bias=has_bias)


def _gemma2(file: GgufFile, model_type: str = "gemma2", largest: int = 46) -> dict[str, Any]:
    config = _rms(file, model_type, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    # llama.cpp: the largest model (27B, known by its layers) scales by its width a head, others by the head's
    width = config["hidden_size"] // config["num_attention_heads"]
    is_largest = config["num_hidden_layers"] == largest
    return {
        **config,
        "query_pre_attn_scalar": width if is_largest else config["head_dim"],
        "attn_logit_softcapping": file.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0),
        "sliding_window": file.count("attention.sliding_window", 4096),
    }


def _gemma3(file: GgufFile) -> dict[str, Any]:
    config = _gemma2(file, "gemma3_text", largest=62)
    # llama.cpp: every sixth layer sees everything, the others have a base of 10,000 unless the file says more
    every = file.count("attention.sliding_window_pattern", 6)
    local = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", 10000.0)}
    return {
        **config,
        "attn_logit_softcapping": file.find("attn_logit_softcapping", None),
        "final_logit_softcapping": file.find("final_logit_softcapping", None),
        "layer_types": [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _phi3(file: GgufFile) -> dict[str, Any]:
    config = _rms(file, "phi3", hidden_act="silu", sliding_window=file.find("attention.sliding_window", None))
    if not config["sliding_window"]:
        config["sliding_window"] = None
    return config | {"original_max_position_embeddings": _original_length(file)}


def _stablelm(file: GgufFile) -> dict[str, Any]:
    has_second_norm = file.has("blk.0.ffn_norm.weight")
    return {
        **_common(file, "stablelm"),
        "hidden_act": "silu",
        "layer_norm_eps": file.number("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(file),
        "use_qkv_bias": file.has("blk.0.attn_q.bias"),
        "qk_layernorm": file.has("blk.0.attn_q_norm.weight"),
        "use_parallel_residual": file.find("use_parallel_residual", not has_second_norm),
    }


def _gpt2(file: GgufFile) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": file.count("embedding_length"),
        "n_layer": file.num_layers,
        "n_head": file.count("attention.head_count"),
        "n_positions": file.count("context_length"),
        "n_inner": file.count("feed_forward_length"),
        "layer_norm_epsilon": file.number("attention.layer_norm_epsilon"),
    }


def _falcon(file: GgufFile) -> dict[str, Any]:
    """Falcon 7B's layout, or 40B's with two norms; without biases, in parallel, with rotary positions."""
    heads, kv_heads = file.num_heads
    return {
        "model_type": "falcon",
        "activation": "gelu",
        "hidden_size": file.count("embedding_length"),
        "ffn_hidden_size": file.count("feed_forward_length"),
        "num_hidden_layers": file.num_layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": file.has("blk.0.attn_norm_2.weight"),
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "layer_norm_epsilon": file.number("attention.layer_norm_epsilon"),
        "max_position_embeddings": file.count("context_length"),
        "rope_parameters": _rope(file),
    }


def _rope(file: GgufFile) -> dict[str, Any]:
    """Rotary parameters as Hugging Face writes them."""
    head_dim = file.count("attention.key_length", file.count("embedding_length") // file.num_heads[0])
    turned = file.count("rope.dimension_count", head_dim)
    common: dict[str, Any] = {"rope_theta": file.number("rope.freq_base", 10000.0)}
    if file.architecture in ("phi3", "stablelm"):
        common["partial_rotary_factor"] = turned / head_dim
    if file.has("rope_factors_long.weight"):
        factors = {
            f"{kind}_factor": file.values(f"rope_factors_{kind}.weight").tolist()
            for kind in ("short", "long")
        }
        attention = file.find("rope.scaling.attn_factor", None)
        if attention is not None:
            common["attention_factor"] = attention
        length = {"original_max_position_embeddings": _original_length(file)}
        return {**common, "rope_type": "longrope", **length, **factors}
    if file.has("rope_freqs.weight"):
        return _llama3_rope(file, common, turned)
    scaling = file.find("rope.scaling.type", "none")
    if scaling == "none":
        return {**common, "rope_type": "default"}
    common["factor"] = file.number("rope.scaling.factor")
    if scaling == "linear":
        return {**common, "rope_type": "linear"}
    if scaling == "yarn":
        return {
            **common,
            "rope_type": "yarn",
            "original_max_position_embeddings": file.count("rope.scaling.original_context_length"),
        }
    raise UserError(f"{file.path}: rope.scaling.type is {scaling!r}; supported: none, linear, yarn, longrope")


def _llama3_rope(file: GgufFile, common: dict[str, Any], dim: int) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling from the divisors that it came to.

    The file holds one divisor a frequency only; all released models share the parameters tried here.
    """
    divisors = file.values("rope_freqs.weight")
    low, high, length = 1.0, 4.0, file.count("rope.scaling.original_context_length", 8192)
    factor = _published(divisors.max().item())
    inv_freq = 1 / common["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    kept = np.clip((length * inv_freq / (2 * np.pi) - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if expected.shape != divisors.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{file.path}: rope_freqs.weight holds divisors that are not Llama 3's")
    return {
        **common,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _original_length(file: GgufFile) -> int:
    return file.count("rope.scaling.original_context_length", file.count("context_length"))


# ---- tensors ----


def _kind(file_name: str) -> str:
    """The name without its layer: blk.3.attn_q.weight → attn_q.weight."""
    return re.sub(r"^blk\.\d+\.", "", file_name)


def _is_query_or_key(kind: str) -> bool:
    return re.fullmatch(r"attn_[qk]\.(weight|bias)", kind) is not None


def _undo_interleaving(file: GgufFile, kind: str, tensor: np.ndarray) -> np.ndarray:
    """llama.cpp interleaves the two halves of every query and key head of the llama architecture."""
    heads = file.num_heads[0 if kind.startswith("attn_q") else 1]
    rest = tensor.shape[1:]
    return tensor.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(tensor.shape)


def _is_norm(kind: str) -> bool:
    return kind.endswith("norm.weight")


def _subtract_one(file: GgufFile, kind: str, tensor: np.ndarray) -> np.ndarray:
    """Gemma multiplies by 1 + scale; llama.cpp stores the sum."""
    return tensor - 1


def _is_conv1d(kind: str) -> bool:
    return kind in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def _transpose(file: GgufFile, kind: str, tensor: np.ndarray) -> np.ndarray:
    """GPT-2's Conv1D is [in, out]."""
    return tensor.T


def _is_falcon_qkv(kind: str) -> bool:
    return kind == "attn_qkv.weight"


def _regroup(file: GgufFile, kind: str, tensor: np.ndarray) -> np.ndarray:
    """Falcon keeps a key/value head with its queries; llama.cpp puts all queries first, keys, values."""
    heads, groups = file.num_heads
    rows = tensor.reshape(heads + 2 * groups, -1, tensor.shape[-1])
    parts = np.split(rows, [heads, heads + groups])
    grouped = [part.reshape(groups, -1, *rows.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(tensor.shape)


def _published(value: float) -> float:
    """A float that was published in decimal and stored in float32: 9.99999975e-06 is 1e-05."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


_ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "llama": Architecture(_ARCH.LLAMA, _llama, _undo_interleaving, _is_query_or_key),
    "qwen2": Architecture(_ARCH.QWEN2, _qwen2),
    "qwen3": Architecture(_ARCH.QWEN3, _qwen3),
    "gemma2": Architecture(_ARCH.GEMMA2, _gemma2, _subtract_one, _is_norm),
    "gemma3": Architecture(_ARCH.GEMMA3, _gemma3, _subtract_one, _is_norm),
    "phi3": Architecture(_ARCH.PHI3, _phi3),
    "stablelm": Architecture(_ARCH.STABLELM, _stablelm),
    "gpt2": Architecture(_ARCH.GPT2, _gpt2, _transpose, _is_conv1d),
    "falcon": Architecture(_ARCH.FALCON, _falcon, _regroup, _is_falcon_qkv),
}
"""llama.cpp's architectures that are read: those that transformers converts and this project has."""
