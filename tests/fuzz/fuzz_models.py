"""What comes beside weights and rows: configurations, adapters, tokenizers, checksums, cards, saved data."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from fuzz_look import look

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO = {"model_type": "gpt_neo", "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
       "attention_types": [[["global", "local"], 1]], "window_size": 16}  # fmt: skip
MPT = {"model_type": "mpt", "vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
       "attn_config": {"alibi": True, "attn_type": "multihead_attention"}}  # fmt: skip
CONFIGS = [LLAMA, GEMMA, GPT2, NEO, MPT]
VALUES = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1",
    b"1e999",
    b"NaN",
    b"1e308",
    b"1180591620717411303424",
    b"[]",
    b"{}",
]
VALUES += [b'""', b'"x"', b"[[[]]]", b"4000000000", b"1000000", b'"\\ud800"', b'"\\u001b[2J"', b"[" * 900]
VALUES += [
    b"1" * 400,
    b'"~root"',
    b'"../x"',
    b'"hf://x/y"',
    b'"yarn"',
    b'"dynamic"',
    b'"linear"',
    b'"longrope"',
]


def words(*objects: Any) -> list[bytes]:
    """The names in some objects, and values that none should have."""
    names: set[str] = set()

    def collect(value: Any) -> None:
        for name, inner in value.items() if isinstance(value, dict) else ():
            names.add(name)
            collect(inner)
        for inner in value if isinstance(value, list) else ():
            collect(inner)

    for one in objects:
        collect(one)
    return [
        *(f'"{name}":'.encode() for name in sorted(names)),
        *VALUES,
        b",",
        b":",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
    ]


@cache
def place(name: str) -> Path:
    """A scratch folder of this name."""
    from fuzz_targets import folder

    return folder(name)


# ---- configurations ----


def config(data: bytes) -> object:
    """A `config.json`, up to the decoder that it describes."""
    from dpo.huggingface.opening import read_model_config
    from dpo.huggingface.text_models import read_config

    path = place("config") / "config.json"
    path.write_bytes(data)
    family, decoder = read_config(read_model_config(path))
    assert decoder.num_layers <= 1000
    return type(family).__name__, decoder.num_layers > 1, len(decoder.ropes)


GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9,
              "max_length": 2048, "transformers_version": "5.0"}  # fmt: skip


def generation_config(data: bytes) -> object:
    """A `generation_config.json`."""
    from dpo.huggingface.opening import _read_generation_config

    path = place("config") / "generation_config.json"
    path.write_bytes(data)
    return sorted(_read_generation_config(path))[:3]


ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/base", "r": 2,
           "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"], "bias": "none",
           "alpha_pattern": {"layers.0.self_attn.q_proj": 8}, "rank_pattern": {}, "use_rslora": False,
           "use_dora": False, "modules_to_save": None, "revision": None}  # fmt: skip


def adapter(data: bytes) -> object:
    """An adapter's configuration beside its weights; every module is read."""
    import safetensors.numpy

    from dpo.huggingface.adapter_files import AdapterDirectory

    path = place("adapter")
    if not (path / "adapter_model.safetensors").exists():
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        shapes = {name.format("A"): (2, 8), name.format("B"): (8, 2)}
        arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        safetensors.numpy.save_file(arrays, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_bytes(data)
    directory = AdapterDirectory(path)
    assert directory.base.isprintable()
    for module in directory.modules:
        assert np.isfinite(directory.merge(module, np.ones((8, 8), np.float32))).all()
    return len(directory.modules), directory.method


# ---- tokenizers ----


def _tokenizer(**parts: Any) -> bytes:
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "▁": 5, "<unk>": 6}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocab, "merges": [["a", "b"]]},
    }  # fmt: skip
    return json.dumps(whole | parts, ensure_ascii=False).encode()


def tokenizer_seeds() -> list[bytes]:
    """A tokenizer of each kind of model and of rule."""
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\s+"}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    several = {"type": "Sequence", "normalizers": [replace, {"type": "NFKC"}]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return [
        _tokenizer(),
        _tokenizer(pre_tokenizer=split, normalizer=several),
        _tokenizer(normalizer={"type": "Prepend", "prepend": "▁"}, decoder={"type": "Fuse"}),
        _tokenizer(pre_tokenizer=metaspace),
        _tokenizer(model={"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}),
        _tokenizer(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]],
                          "byte_fallback": False}),
    ]  # fmt: skip


TOKENIZER_WORDS = [
    b'"FixedLength","length":0',
    b'"Regex":"(a+)+"',
    b'"Regex":"\\\\w*"',
    b'"String":""',
    b'"Fixed":4000000000',
]
TOKENIZER_WORDS += [
    b'{"type":"Replace","pattern":{"String":"a"},"content":"aaaa"},',
    b'"Digits","individual_digits":true',
]
TOKENIZER_WORDS += [
    b'"NFD"',
    b'"Lowercase"',
    b'"ByteLevel"',
    b'"WordPiece"',
    b'"Whitespace"',
    b'"BertNormalizer"',
    *VALUES,
]


CHARSMAP = base64.b64encode(b"\x04\0\0\0\0\0\0\0a\0").decode()
TOKENIZER_WORDS += [f'{{"type":"Precompiled","precompiled_charsmap":"{CHARSMAP}"}},'.encode()]


def tokenizer(data: bytes) -> object:
    """A `tokenizer.json`, tried in a limited process."""
    from dpo.huggingface import tokenizer_files

    path = place("tokenizer") / "tokenizer.json"
    path.write_bytes(data)
    tokenizer_files._TRIED.clear()
    with patch.object(tokenizer_files, "look", look):
        tokenizer_files._try(path)
    return "tried"


# ---- checksums and cards ----


def checksum_seeds() -> list[bytes]:
    """Lists of the files of a folder."""
    digest = hashlib.sha256(b"x").hexdigest()
    return [f"{digest}  a\n".encode(), f"{digest}  a\n{digest}  b/c\n".encode()]


CHECKSUM_WORDS = [
    b"  /dev/zero\n",
    b"  ../a\n",
    b"  pipe\n",
    b"  b/c\n",
    b"  a\n",
    b"  \n",
    b"\0",
    b"\\",
    b"0" * 64,
]


def checksums(data: bytes) -> object:
    """A list of checksums beside files, a pipe and a file outside."""
    import os

    from dpo.files import CHECKSUMS_FILE, damaged_files

    path = place("checksums")
    if not (path / "b").exists():
        (path / "b").mkdir()
        (path / "a").write_bytes(b"x")
        (path / "b" / "c").write_bytes(b"x")
        os.mkfifo(path / "pipe")
    (path / CHECKSUMS_FILE).write_bytes(data)
    problems = damaged_files(path)
    if problems:
        raise _Damaged(problems[0])
    return len(data) > 100


class _Damaged(Exception):  # noqa: N818 (it is what the reader answers)
    """What a list of checksums is said to be wrong with."""


def is_damaged(error: BaseException) -> bool:
    """Problems are returned, and are the way to refuse."""
    return isinstance(error, _Damaged)


CARDS = [
    b"---\nlicense: mit\nbase_model: a/b\ntags: [x, y]\n---\n# Model\n",
    b"---\nlicense: apache-2.0\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
    b"    path: data/*.jsonl\n  default: true\n---\n",
    b"---\nconfigs:\n- config_name: a\n  data_files: {train: a.jsonl, test: [b.jsonl, c.jsonl]}\n"
    b"  data_dir: x\n---\n",
]
CARD_WORDS = [
    b"hf://datasets/a/b",
    b"http://x/y",
    b"/etc/passwd",
    b"../x",
    b"data_files:",
    b"data_dir:",
    b"path:",
]
CARD_WORDS += [
    b"split:",
    b"configs:",
    b"license:",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/name:os.system ",
    b"---\n",
    b"- ",
]
CARD_WORDS += [
    b"\n  ",
    b"[",
    b"]",
    b"{",
    b"}",
    b": ",
    b"2001-13-01",
    b'"\\ud800"',
    b'"\\x1b"',
    b"[" * 900,
    b"1" * 5000,
]


def card(data: bytes) -> object:
    """A README of a model, and of a folder of data."""
    from dpo.data.cards import check_card
    from dpo.huggingface.licences import read_licence

    path = place("card")
    (path / "README.md").write_bytes(data)
    check_card(path)
    return read_licence(path) is None


# ---- data sets ----


def _rows() -> Any:
    import pyarrow

    return pyarrow.table(
        {"prompt": ["a", "bc"], "chosen": ["d", "ef"], "rejected": ["", "g"], "scores": [[1.0], []]}
    )


def arrow_seeds() -> list[bytes]:
    """A stream and a file of two rows, and one of a dictionary of texts."""
    import pyarrow

    table, seeds = _rows(), []
    words = pyarrow.table({"prompt": pyarrow.array(["x", "y", "x"]).dictionary_encode()})
    for make, rows in (
        (pyarrow.ipc.new_stream, table),
        (pyarrow.ipc.new_file, table),
        (pyarrow.ipc.new_stream, words),
    ):
        out = io.BytesIO()
        with make(out, rows.schema) as writer:
            writer.write_table(rows)
        seeds.append(out.getvalue())
    return seeds


ARROW_WORDS = [
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\0",
    b"ARROW1",
    b"\x01\0\0\0",
    b"\x10\0\0\0\0\0\0\0",
]


def arrow(data: bytes) -> object:
    """An Arrow file, looked at in a limited process and read as `datasets` does: mapped into memory."""
    import pyarrow

    from dpo.data import table_checks

    path = place("arrow") / "rows.arrow"
    path.write_bytes(data)
    table_checks._SEEN.clear()
    with patch.object(table_checks, "look", look):
        table_checks.check_arrow([path])
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        return len(reader.read_all().to_pylist()) > 1


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0123456789abcdef",
         "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
         "_split": None}  # fmt: skip


def saved_state(data: bytes) -> object:
    """The `state.json` of what `save_to_disk` wrote, up to its rows."""
    from dpo.data import table_checks
    from dpo.data.preferences import read_preferences

    path = place("saved")
    if not (path / "dataset_info.json").exists():
        import datasets

        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(path)
    (path / "state.json").write_bytes(data)
    with patch.object(table_checks, "look", look):
        return len(read_preferences(path).preferences)


def json_of(objects: Sequence[Any]) -> list[bytes]:
    """Seeds of objects."""
    return [json.dumps(one).encode() for one in objects]
