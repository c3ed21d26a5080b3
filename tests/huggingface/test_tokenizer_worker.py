"""Tokenizers of strangers: what would end the process, fill it or never end is refused by file."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dpo.data.tokenizer_calls import decode_ids, encode_texts
from dpo.huggingface import tokenizer_worker
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.outcomes import UserError

PACKAGE = Path(tokenizer_worker.__file__).parents[1]


@pytest.fixture
def directory(tiny_model_dir, tmp_path):
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (copy / "SHA256SUMS").unlink(missing_ok=True)
    return copy


def change(directory: Path, **parts) -> Path:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return directory


def sequence(*rules) -> dict:
    return {"type": "Sequence", "normalizers": list(rules)}


DOUBLE = {"type": "Replace", "pattern": {"String": "\u16a0"}, "content": "\u16a0\u16a0"}
BAD = {
    "doubled forty times": {"normalizer": sequence(*[DOUBLE] * 40)},
    "a long replacement": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "\u16a0"}, "content": "x" * 100_000}
    },
    "nothing replaced by much": {
        "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}
    },
    "an empty map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a map that is cut off": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "repeated repetitions": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False,
        }
    },
    "a nested expression": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(" * 3000 + ")" * 3000}, "behavior": "Isolated",
            "invert": False,
        }
    },
    "padding to four billion": {
        "padding": {
            "strategy": {"Fixed": 4_000_000_000}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
        }
    },
    "thousands of tokens around each text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "z", "type_id": 0}}] * 2000,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"z": {"id": "z", "ids": [1] * 2000, "tokens": ["z"] * 2000}},
        }
    },
    "much put before": {"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_tokenizer_that_would_end_the_process_is_refused_by_file(directory, what):
    with pytest.raises(UserError, match=r"tokenizer\.json: its tokenizer cannot be opened: "):
        load_tokenizer(change(directory, **BAD[what]))


@pytest.mark.parametrize(("dropout", "is_refused"), [(0.5, True), (0.0, False), (None, False)])
def test_a_tokenizer_that_draws_its_tokens_is_refused(directory, dropout, is_refused):
    model = {"type": "BPE", "dropout": dropout, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    change(directory, model=model | {"vocab": {"a": 3, "b": 4, "ab": 5}, "merges": [["a", "b"]]})
    if is_refused:
        with pytest.raises(UserError, match=r"leaves out merges at random \(dropout is 0\.5\)"):
            load_tokenizer(directory)
    else:
        assert load_tokenizer(directory).encode("ab", add_special_tokens=False) == [5]


def without_file(directory: Path, tokenizer_class: str, **files: str) -> Path:
    (directory / "tokenizer.json").unlink()
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": tokenizer_class}))
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_a_tokenizer_of_other_files_is_tried_and_read(directory, monkeypatch):
    from dpo.huggingface import tokenizer_files

    tried = []
    whole = tokenizer_files.look
    monkeypatch.setattr(tokenizer_files, "look", lambda *a, **k: tried.append(a[1]) or whole(*a, **k))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hi", "you"]
    path = without_file(directory, "BertTokenizer", vocab__txt="\n".join(words))
    assert encode_texts(load_tokenizer(path), ["hi you"]) == [[5, 6]]
    assert tried == [{"path": str(path.resolve())}]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("tokenizer_class", "files", "problem"),
    [
        ("GPT2Tokenizer", {}, "its vocabulary is not there; allowed is one of"),
        (
            "GPT2Tokenizer",
            {"vocab__json": '{"a": "x"}', "merges__txt": "a b"},
            "its tokenizer cannot be opened",
        ),
        ("LlamaTokenizer", {"tokenizer__model": "junk"}, "its tokenizer cannot be opened"),
    ],
)
def test_a_tokenizer_of_other_files_is_refused_by_name(directory, tokenizer_class, files, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        load_tokenizer(without_file(directory, tokenizer_class, **files))


@pytest.mark.ci
def test_a_missing_tokenizer_is_one_line(directory):
    """Before a process is started to find it; transformers' own word for it has five lines."""
    for path in directory.glob("*token*"):
        path.unlink()
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=f"^{re.escape(str(directory))} has no tokenizer; allowed: .*weights$"
    ):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="its tokenizer cannot be opened: ") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


def test_no_file_beside_it_is_a_pipe(directory):
    path = without_file(directory, "T5Tokenizer")
    os.mkfifo(path / "spiece.model")
    with pytest.raises(UserError, match=r"spiece\.model: must be a regular file"):
        load_tokenizer(path)


@pytest.mark.ci
def test_a_tokenizer_file_for_a_version_is_tried_too(directory):
    """transformers takes the newest of those that its settings list."""
    bad = json.loads((directory / "tokenizer.json").read_text()) | BAD["padding to four billion"]
    (directory / "tokenizer.1.0.json").write_text(json.dumps(bad))
    settings = directory / "tokenizer_config.json"
    files = {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.1.0.json"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | files))
    with pytest.raises(UserError, match="its tokenizer cannot be opened"):
        load_tokenizer(directory)


def test_a_good_tokenizer_is_tried_once(directory, monkeypatch):
    from dpo.huggingface import tokenizer_files

    tried = []
    whole = tokenizer_files.look
    monkeypatch.setattr(tokenizer_files, "look", lambda *a, **k: tried.append(a) or whole(*a, **k))
    for _ in range(2):
        load_tokenizer(directory)
    assert len(tried) == 1


GOOD = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t|'re)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
]  # of GPT-2, Llama 3, GPT-4o, BLOOM, DeepSeek, and one that groups digits
LOOPS = [r"(a+)+", r"(a*b?)*c", r"((a|b+)c)+", r"(?:x+x+)+y", r"(\s+\w){2,}", r"([^x]*)*"]


@pytest.mark.parametrize("expression", GOOD)
def test_expressions_that_tokenizers_have_are_allowed(expression):
    assert not tokenizer_worker._repeats_repetitions(expression)


@pytest.mark.parametrize("expression", LOOPS)
def test_repetitions_of_repetitions_are_found(expression):
    assert tokenizer_worker._repeats_repetitions(expression)


def test_a_text_without_tokens_is_said_with_the_tokenizers_place(directory):
    """A vocabulary of words that has neither the word nor one for what it does not know."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[nowhere]"}
    tokenizer = load_tokenizer(change(directory, model=model, added_tokens=[], post_processor=None))
    with pytest.raises(UserError, match="model: its tokenizer makes no tokens of a text: "):
        encode_texts(tokenizer, ["never seen"])


class _Panics(PreTrainedTokenizerBase):
    name_or_path = "theirs"

    def __init__(self):
        """Nothing of a tokenizer is needed but its calls."""

    def _raise(self, *_, **__):
        raise type("PanicException", (BaseException,), {})("called `Option::unwrap()` on a `None` value")

    __call__ = decode = _raise


def test_a_panic_is_a_refusal():
    with pytest.raises(UserError, match="theirs: its tokenizer makes no tokens of a text: PanicException"):
        encode_texts(_Panics(), ["a"])
    with pytest.raises(UserError, match="theirs: its tokenizer makes no text of 2 tokens: PanicException"):
        decode_ids(_Panics(), [1, 2])


def test_many_texts_in_several_calls_are_as_in_one(tiny_model_dir, monkeypatch):
    from dpo.data import tokenizer_calls

    tokenizer = load_tokenizer(tiny_model_dir)
    texts = ["one", "", "two words", "x" * 50, "three"]
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(tokenizer_calls, "CHARACTERS", 10)
    assert encode_texts(tokenizer, texts) == whole
    assert encode_texts(tokenizer, []) == []


def test_tokenizers_are_called_in_one_place():
    """By name: a tokenizer that is called as it is, or asked for ids or a text."""
    calls = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call)
        if (ast.unparse(call.func).rpartition(".")[2] == "tokenizer" and call.args)
        or (
            isinstance(call.func, ast.Attribute)
            and call.func.attr in ("encode", "decode", "batch_decode", "encode_batch")
            and "tokenizer" in ast.unparse(call.func.value)
        )
    }
    assert calls == {
        "data/tokenizer_calls.py",
        "huggingface/gguf_vocabulary.py",  # one letter, when a model is written
        "huggingface/tokenizer_worker.py",
    }
