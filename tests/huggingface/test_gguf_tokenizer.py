"""The tokenizer of a GGUF file makes llama.cpp's tokens: live in slow tests, by stored ids in quick ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ask_llama_cpp import ask_llama_cpp
from gguf_vocabularies import (
    GEMMA_FILE,
    LINES,
    lines_fields,
    sentencepiece_fields,
    tokenizer_fields,
    write_vocabulary,
)
from tokenizer_corpus import TEXTS, digest, real_rows, shipped_rows
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dpo.huggingface.embedded import cache_directory, cached_embedded
from dpo.huggingface.gguf_files import GgufFile
from dpo.huggingface.gguf_tokenizer import make_tokenizer
from dpo.huggingface.gguf_vocabulary import vocabulary_fields
from dpo.huggingface.pre_tokenizers import PRE_TOKENIZERS, make_pre_tokenizer

STORED = Path(__file__).with_name("llama_cpp_ids.json")
SMOLLM2 = "embedded:smollm2-135m-instruct"
PHI3_SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
PHI3_TEXTS = ["<|user|>\n  How many?<|end|>\n<|assistant|>\n", "<s> <|user|> x <|endoftext|> y"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = cached_embedded(SMOLLM2)
    if path is None:
        pytest.skip(f"{SMOLLM2} was not fetched (make train does)")
    return path


@pytest.fixture(scope="module")
def default_fields(smollm2: Path) -> dict:
    return tokenizer_fields(smollm2)


@pytest.fixture(scope="module")
def default_file(smollm2: Path) -> GgufFile:
    return GgufFile(smollm2)


@pytest.fixture(scope="module")
def default_tokenizer(default_file: GgufFile):
    return default_file.tokenizer()


@pytest.fixture(scope="module")
def gemma() -> Path:
    path = cache_directory() / GEMMA_FILE
    if not path.is_file():
        pytest.skip(f"{path} is not there (make_llama_cpp_ids --fetch-gemma)")
    return path


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _prefixed(fields: dict) -> dict:
    return {f"tokenizer.{key}": value for key, value in fields.items()}


def differing(found, expected, texts: list[str]) -> list[str]:
    return [text for text, a, b in zip(texts, found, expected, strict=True) if a != b]


def test_the_default_models_tokens_are_those_it_was_trained_with(default_file, default_tokenizer) -> None:
    stored = json.loads(STORED.read_text())["smollm2"]
    assert differing(ids_of(default_tokenizer, TEXTS), stored["ids"], TEXTS) == []
    assert digest(ids_of(default_tokenizer, shipped_rows(300))) == stored["shipped"]
    assert sorted(default_file.generation_config()["eos_token_id"]) == stored["ends"]


def test_a_digit_is_split_off_with_what_stands_before_it(default_tokenizer) -> None:
    """llama.cpp's ids; with GPT-2's cut the two line ends would be two tokens."""
    assert ids_of(default_tokenizer, ["three:\n\n1. Apples"]) == [[16347, 42, 1116, 33, 30, 43448]]


@pytest.mark.parametrize("kind", sorted({kind: name for name, kind in PRE_TOKENIZERS.items()}.values()))
def test_every_cut_is_as_stored(kind: str, default_tokenizer) -> None:
    """With the default model's vocabulary: any byte-level one can be cut by any kind."""
    stored = json.loads(STORED.read_text())["kinds"][kind]
    backend = Tokenizer.from_str(default_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = make_pre_tokenizer(PRE_TOKENIZERS[kind])
    backend.model.ignore_merges = PRE_TOKENIZERS[kind].ignores_merges
    found = [encoding.ids for encoding in backend.encode_batch(TEXTS, add_special_tokens=False)]
    assert differing(found, stored, TEXTS) == []


def test_the_tokenizer_is_the_same_once_saved(default_tokenizer, tmp_path: Path) -> None:
    default_tokenizer.save_pretrained(tmp_path)
    assert ids_of(AutoTokenizer.from_pretrained(tmp_path), TEXTS) == ids_of(default_tokenizer, TEXTS)


def test_a_control_token_beyond_the_byte_alphabet_is_one_token(tmp_path: Path) -> None:
    """DeepSeek's are: otherwise spelled, they would be cut to pieces, and BOS numbered beyond the model."""
    fields = {
        "ggml.model": "gpt2",
        "ggml.pre": "deepseek-r1-qwen",
        "ggml.tokens": ["<｜begin▁of▁sentence｜>", "a", "b"],
        "ggml.token_type": [3, 1, 1],
        "ggml.merges": ["a b"][:0],
        "ggml.bos_token_id": 0,
    }
    tokenizer = make_tokenizer(tmp_path, _prefixed(fields), architecture="qwen2", max_length=lambda: 8)
    assert tokenizer.bos_token_id == 0
    assert len(tokenizer) == 3
    assert ids_of(tokenizer, ["<｜begin▁of▁sentence｜>ab"]) == [[0, 1, 2]]


def test_what_ends_a_turn_ends_a_response(tmp_path: Path) -> None:
    """Gemma's and Phi-3's chat files give another EOS than what ends a turn."""
    fields = sentencepiece_fields("<end_of_turn>", "<|end|>", "<other>")
    ids = {token: index for index, token in enumerate(fields["ggml.tokens"])}
    file = GgufFile(write_vocabulary(tmp_path / "x.gguf", "llama", fields))
    found = file.generation_config()["eos_token_id"]
    assert found[0] == fields["ggml.eos_token_id"]
    assert {ids["<end_of_turn>"], ids["<|end|>"]} < set(found)
    assert ids["<other>"] not in found
    fields["ggml.eot_token_id"] = ids["<other>"]
    file = GgufFile(write_vocabulary(tmp_path / "x.gguf", "llama", fields))
    assert set(file.generation_config()["eos_token_id"]) == {*found, ids["<other>"]}


def test_gemma_4s_kind_is_written_as_it_was_read(tmp_path: Path) -> None:
    """With merges of its own order, and no merge across the border of line ends."""
    fields = lines_fields()
    first = GgufFile(write_vocabulary(tmp_path / "x.gguf", "gemma4", fields)).tokenizer()
    found = vocabulary_fields(first, "gemma4", {}, vocab_size=len(fields["ggml.tokens"]))
    for key in ("model", "tokens", "merges"):
        assert found[f"tokenizer.ggml.{key}"] == fields[f"ggml.{key}"], key
    again = make_tokenizer(tmp_path, found, architecture="gemma4", max_length=lambda: 8)
    assert ids_of(again, LINES) == ids_of(first, LINES)
    assert again("a")["input_ids"][0] == fields["ggml.bos_token_id"]
    assert again.decode(ids_of(again, LINES)[0]) == LINES[0]


@pytest.mark.slow
def test_gemmas_tokens_are_as_stored(gemma: Path) -> None:
    stored = json.loads(STORED.read_text())["gemma"]
    file = GgufFile(gemma)
    assert differing(ids_of(file.tokenizer(), TEXTS), stored["ids"], TEXTS) == []
    assert sorted(file.generation_config()["eos_token_id"]) == stored["ends"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_llama_cpp_makes_the_same_tokens(model: str, request, shared_dir: Path) -> None:
    path = request.getfixturevalue(model)
    texts = TEXTS + real_rows(shared_dir, 300)
    expected, ends = ask_llama_cpp(path, texts)
    file = GgufFile(path)
    assert differing(ids_of(file.tokenizer(), texts), expected, texts) == []
    assert sorted(file.generation_config()["eos_token_id"]) == ends


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZERS))
def test_llama_cpp_cuts_alike(kind: str, default_fields, shared_dir: Path, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "x.gguf", "llama", default_fields | {"ggml.pre": kind})
    texts = TEXTS + real_rows(shared_dir, 30)
    expected, _ = ask_llama_cpp(path, texts)
    assert differing(ids_of(GgufFile(path).tokenizer(), texts), expected, texts) == []


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_llama_cpp_reads_spaces_alike(architecture: str, prefix: bool | None, tmp_path: Path) -> None:
    fields = sentencepiece_fields(*PHI3_SPECIALS)
    if prefix is not None:
        fields["ggml.add_space_prefix"] = prefix
    path = write_vocabulary(tmp_path / "x.gguf", architecture, fields)
    texts = TEXTS + PHI3_TEXTS
    expected, ends = ask_llama_cpp(path, texts)
    assert differing(ids_of(GgufFile(path).tokenizer(), texts), expected, texts) == []
    assert sorted(GgufFile(path).generation_config()["eos_token_id"]) == ends
