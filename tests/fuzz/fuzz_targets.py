"""The readers of what comes from outside, each with small valid inputs and the words of its format."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fuzz_models as models
import numpy as np
from fuzz_look import look
from fuzz_replies import SEEDS as REPLY_SEEDS
from fuzz_replies import WORDS as REPLY_WORDS
from fuzz_replies import is_malformed, reply
from fuzz_run import Target, is_own_value_error

MESSAGES = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]


@cache
def folder(name: str) -> Path:
    """A scratch folder, in memory where there is such a place; a forked child leaves it to its maker."""
    owner = os.getpid()
    memory = Path("/dev/shm")
    root = tempfile.mkdtemp(prefix="dpo-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(root, ignore_errors=True))
    path = Path(root) / name
    path.mkdir()
    return path


# ---- rows of data ----

ROWS = [
    {
        "prompt": "Say hello.",
        "chosen": "Hello!",
        "rejected": "No.",
        "score_chosen": 2,
        "score_rejected": -1.5,
    },
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": [{"role": "assistant", "content": "é"}]},
    {"chosen": MESSAGES, "rejected": [*MESSAGES[:1], {"role": "assistant", "content": "?"}]},
    {"chosen": "The film is good.", "rejected": "The film is bad.", "source": "films"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2], "scores": [0.5, 0, -1]},
    {"prompt": "p", "responses": ["a", "b"], "scores": [1e3, 2]},
    {"prompt": "p", "completion": "c", "label": True},
]
FIELDS = ["prompt", "chosen", "rejected", "responses", "ranks", "scores", "completion", "label", "source"]
FIELDS += ["role", "content", "user", "assistant", "system", "score_chosen", "score_rejected"]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
TURNS = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]
TURNS += [{"from": "observation", "value": "7"}]
LAYOUT_ROWS = [
    {"system": "S", "question": "q", "chosen": "a", "rejected": "b", "source_url": "u"},
    {"instruction": "i", "input": "j", "history": [["h", "g"]], "chosen": "a", "rejected": "b"},
    {"instruction": "i", "output": ["a", "b"]},
    {"instruction": "i", "output": "a", "kto_tag": True},
    {"conversations": TURNS, "chosen": {"from": "gpt", "value": "a"},
     "rejected": {"from": "gpt", "value": "b"}},
    {"conversations": [TURNS[0], {"from": "gpt", "value": "a"}], "kto_tag": False},
    {"input": {"messages": MESSAGES[:1], "tools": [CALL]}, "preferred_output": MESSAGES[1:],
     "non_preferred_output": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {"instruction": "i", "chosen_response": "a", "rejected_response": "b"},
    {"instruction": "i", "generations": ["a", "b"], "ratings": [1, 2.5]},
    {"instruction": "i", "completions": [{"response": "a", "overall_score": 7.5},
     {"response": "b", "overall_score": 4, "fine-grained_score": 2}]},
    {"instruction": "i", "completions": [{"response": "a", "annotations": {"honesty": {"Rating": 5}}},
     {"response": "b", "overall_score": 4, "annotations": {"honesty": {"Rating": "4"}}}]},
    {"question": {"text": "q", "id": 3}, "chosen": "a", "rejected": "b"},
    {"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "chosen": "a", "rejected": "b"},
    {"prompt": "\n\nHuman: a\n\nAssistant: ", "answers": [{"answer": "a", "rank": 2.0},
     {"answer": "b", "rank": 1}]},
    {"messages": MESSAGES, "label": 1},
    {"prompt": "p", "response": "a", "helpfulness": 3},
    {"prompt": "p", "response": "b", "helpfulness": "4"},
    {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -2},
    {"context": MESSAGES[:1], "response1": "a", "response2": "b", "overall_preference": 3},
    {"conversation_a": MESSAGES, "conversation_b": MESSAGES * 2, "winner": "tie"},
    {"prompt": '["q", "r"]', "response_a": '["a", "b"]', "response_b": '["c", "d"]', "winner_model_a": 1,
     "winner_model_b": 0, "winner_tie": 0},
    {"prompt": "p", "response_a": "a", "response_b": "b", "preference": "A"},
    {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3, "score_B": 2},
    {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0},
    {"prompt": json.dumps(MESSAGES[:1]), "chosen": MESSAGES[1:] + MESSAGES, "rejected": "b", "tools": [CALL],
     "chat_template_kwargs": '{"x": 1}', "documents": [{"text": "d"}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}],
     "chosen": "a", "rejected": "b"},
]  # fmt: skip
JSON_WORDS = [f'"{field}"'.encode() for field in FIELDS]
JSON_WORDS += [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b'""',
    b"null",
    b"true",
    b"false",
    b"[]",
    b"{}",
    b'" "',
]
JSON_WORDS += [b"\\n\\nHuman:", b"\\n\\nAssistant:", b'{"role":"user","content":"x"}', b"\\ud83d\\ude00"]


LAYOUT_WORDS = [f'"{name}"'.encode() for name in sorted({name for row in LAYOUT_ROWS for name in row})]
LAYOUT_WORDS += [b'"question": {"text": ', b"\\n<extra_id_1>User\\n"]
CSV_SEEDS = [
    b'prompt,chosen,rejected\n2+2?,4,"5, or ""6"""\nAny?,None,NA\n',
    b'prompt,responses,ranks\np,"[""a"",""b""]","[1, 2]"\n',
]


def read_rows(data: bytes, name: str) -> object:
    """As `dpo train` reads its data, with either of the ways to treat malformed rows."""
    from dpo.data.preferences import read_preferences

    path = folder("rows") / name
    path.write_bytes(data)
    skip = len(data) % 2 == 0
    read = read_preferences(
        path, on_error="skip" if skip else "stop", expand="all_pairs" if skip else "ranking"
    )
    for preference in read.preferences:
        assert len(preference.responses) == len(preference.ranks) >= 1
        json.dumps(preference).encode("utf-8")
    return sorted(read.skipped), len(read.preferences) > 1


def json_lines(data: bytes) -> object:
    """JSON lines."""
    return read_rows(data, "rows.jsonl")


SHOWS_ALL = (
    "{{ tools }}{{ documents }}{{ x }}{% for m in messages %}<s>{{ m | tojson }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def layouts(data: bytes) -> object:
    """JSON lines in the layouts of well-known data sets, up to their token ids."""
    sys.path.append(str(Path(__file__).parents[1] / "data"))
    from toy_tokenizer import make_tokenizer

    from dpo.data.columns import BY_COLUMNS, RowReading
    from dpo.data.preferences import read_preferences
    from dpo.data.tokenization import tokenize

    path = folder("rows") / "layouts.jsonl"
    path.write_bytes(data)
    reading = RowReading(columns=(("prompt", "question.text"),)) if b'"question": {' in data else BY_COLUMNS
    read = read_preferences(path, on_error="skip", reading=reading)
    for preference in read.preferences:
        json.dumps(preference, ensure_ascii=False).encode("utf-8")
    tokens = tokenize(read.preferences[:4], make_tokenizer(), max_length=2000, chat_template=SHOWS_ALL)
    assert tokens.scored_lengths.max() > 0
    return sorted(read.layouts), sorted(read.skipped), sorted(tokens.dropped)


def csv_rows(data: bytes) -> object:
    """A table of text."""
    return read_rows(data, "rows.csv")


def json_list(data: bytes) -> object:
    """One JSON list."""
    return read_rows(data, "rows.json")


def compressed_lines(data: bytes) -> object:
    """JSON lines, compressed."""
    return read_rows(data, "rows.jsonl.gz")


def parquet_rows(data: bytes) -> object:
    """A Parquet file, looked at in a limited process before it is read."""
    from dpo.data import table_checks

    table_checks._SEEN.clear()
    with patch.object(table_checks, "look", look):
        return read_rows(data, "rows.parquet")


def parquet_seeds() -> list[bytes]:
    """Pairs of strings, rankings and conversations as Parquet files."""
    import pyarrow
    import pyarrow.parquet

    seeds = []
    for rows in (ROWS[:1] * 2, ROWS[5:7], ROWS[1:2]):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="NONE")
        seeds.append(file.getvalue())
    return seeds


# ---- settings ----

YAML_SEEDS = [
    b"run_dir: runs/x\ntraining: {steps: 3, seed: 1, trackers: [tensorboard]}\n",
    b"model:\n  source: m\n  remat: dots\ndata:\n  train: a.jsonl\n  max_length: 128\n",
    b"objective: {name: dpo, beta: 0.1}\noptimizer: {learning_rate: 1e-6, schedule: linear}\n",
    b"objectives:\n- {name: dpo, weight: 0.8}\n- {name: sft}\nmesh: {data: -1, fsdp: 2}\n",
    b"data:\n  train:\n  - {source: a.jsonl, weight: 3, columns: {prompt: q}, ignore_columns: [x]}\n"
    b"  - b.csv\n"
    b"  eval: [{source: o/n, subset: s, revision: v, split: t, layout: pair, rows: 2, seed: 1}]\n",
    b"a: &a [x, x]\nb: &b [*a, *a]\nobjective: {name: *b, <<: {c: 1}}\n",
]


def setting_words() -> list[bytes]:
    """Names and values of settings."""
    from dpo.command_line import settings_parser
    from dpo.config import Config
    from dpo.config.sources import SourceConfig

    names = settings_parser(Config).setting_names()
    names += [item.name for item in fields(SourceConfig)]
    parts = {part for name in names for part in (name, *name.split("."))}
    values = [
        "null",
        "true",
        "1e-6",
        ".inf",
        ".nan",
        "0x10",
        "1_000",
        "2001-01-01",
        "1:30",
        "~",
        "'x'",
        "dots",
    ]
    values += [
        "!!python/object/apply:os.system [x]",
        "!!binary aGk=",
        "!!set {a}",
        "&x",
        "*x",
        "<<: *x",
        "|",
        "? ",
    ]
    values += [
        "{class_path: os.system, init_args: {command: x}}",
        "- ",
        ": ",
        "\n  ",
        "[",
        "]",
        "{",
        "}",
        "#",
        "...",
    ]
    return [word.encode() for word in (*sorted(parts), *values)]


def yaml_file(data: bytes) -> object:
    """A run's config.yaml."""
    from dpo.command_line import load_config

    path = folder("settings") / "config.yaml"
    path.write_bytes(data)
    return type(load_config(path)).__name__


OVERRIDE_SEEDS = [
    b"--training.steps=3\n--objective.beta=0.2\n--model.remat\ndots",
    b"--run_dir\nruns/x\n--data.max_train=5\n--data.shuffle=false\n--optimizer.max_grad_norm=null",
    b'--objective={"name": "dpo"}\n--training.trackers=["tensorboard"]\n--mesh.fsdp=2',
    b"--data.train=[{source: a.jsonl, weight: 3}, b.csv]\n--data.eval+={source: c.csv, rows: 2}",
    b"--objectives=[{name: dpo}]\n--data.eval=null\n--objective.name=dpo",
    b"--objectives+={name: sft}\n--training.trackers+=wandb\n--model.source=x",
]


@cache
def train_parser() -> Any:
    """Made once: it keeps nothing of what it parsed."""
    from dpo.cli import command_parser
    from dpo.config import Config

    return command_parser("train", Config)


def overrides(data: bytes) -> object:
    """Options of `dpo train`, one a line."""
    from dpo.command_line import build
    from dpo.config import Config

    arguments = [part.decode("utf-8", "surrogateescape") for part in data.split(b"\n")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return type(build(Config, train_parser().parse_args(arguments), train_parser())).__name__
    except SystemExit as error:
        if error.code in (0, 2):  # 0 after --help
            raise UsageError(said.getvalue()) from error
        raise


class UsageError(Exception):
    """What a command says before it ends with exit code 2."""


def is_usage_error(error: BaseException) -> bool:
    """What ends a command on purpose."""
    return isinstance(error, UsageError) or is_own_value_error(error)


# ---- templates ----

TEMPLATE_SEEDS = [
    b"{% for m in messages %}<s>{{ m.role }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    b"{% if add_generation_prompt %}<s>assistant\n{% endif %}",
    b"{%- set ns = namespace(x='') -%}{%- for m in messages -%}{%- set ns.x = ns.x ~ m.content -%}"
    b"{%- if loop.index > 3 %}{% break %}{% endif %}{%- endfor -%}{{ ns.x[:9] + bos_token }}",
    b"{% macro show(m, n=2) %}{{ m.content * n }}{% endmacro %}{{ show(messages[0]) | upper | tojson }}",
    b"{% generation %}{{ messages | map(attribute='role') | join(', ') }}{% endgeneration %}",
    b"{{ first }} {{ second }} {% for i in range(3) %}{{ '%s' % i }}{{ '{:>3}'.format(i) }}{% endfor %}",
    b"{% if messages|length == 2 and not tools %}{{ raise_exception('no') }}{% else %}x{% endif %}",
]
TEMPLATE_TEXT = """
{{ }} {% %} {%- -%} {# #} {%for%20x%20in%20range(100000)%} {%endfor%} {%if%} {%endif%} {%set%20x=x~x%}
{%raw%} {%include%20'/etc/passwd'%} {%import%20'os'%20as%20os%} {%macro%20f()%} {%endmacro%}
{%call%20f()%} {%endcall%} {%filter%20upper%} {%endfilter%} {%block%20b%} {%endblock%} {%extends%20x%}
{%break%} {%continue%} {%do%20x%} messages add_generation_prompt bos_token tools namespace() dict()
range(99999) lipsum(9999) cycler() joiner() self loop caller super() varargs kwargs .__class__ .__mro__
.__subclasses__() .__globals__ .__init__ ['__class__'] |attr('x') |tojson |tojson(indent=99999999)
|center(99999999) |join |map |select |sort |batch(2) |slice(3) |round(9999,'ceil') |format(1)
|replace('','xxxxxxxx') |list |sum |reverse |string |int |random |groupby |indent(99999999) |wordwrap(1) +
- * ** // % ~ == < and or not in is defined none true false 9999999 10**9 'x'*9999999 [x]*999999 [[]] () ,
. : | ' " raise_exception('x') strftime_now('%Y') .format(x) .join(x) .ljust(99999999) .append(x) .pop()
.items() [::-1] [0]
"""
VARIABLES = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True}
VARIABLES |= {"bos_token": "<s>", "eos_token": "</s>", "first": "one", "second": "two"}


def template(data: bytes) -> object:
    """A chat template or a judge's, made and rendered as the program does, with tight limits."""
    from dpo.data.templates import Limits, SandboxedTemplate

    text = data.decode("utf-8", "replace")
    limits = Limits(seconds=0.25, characters=100_000)
    made = SandboxedTemplate(
        text, name="template", dialect="judge" if len(data) % 4 == 0 else "chat", limits=limits
    )
    rendered = made.render(VARIABLES)
    assert "root:" not in rendered
    return rendered[:20]


# ---- weights ----


def safetensors_seeds() -> list[bytes]:
    """Two tensors, none, and one of a dtype that is no weight's."""
    import safetensors.numpy

    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    return [
        safetensors.numpy.save(tensors, metadata={"format": "pt"}),
        safetensors.numpy.save({}),
        safetensors.numpy.save({"i": np.arange(3)}),
    ]


SAFETENSORS_WORDS = [*JSON_WORDS[len(FIELDS) :], b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"']
SAFETENSORS_WORDS += [
    b'"F32"',
    b'"BF16"',
    b'"I64"',
    b'"F4"',
    b'"a"',
    b"[2,3]",
    b"[0,24]",
    struct.pack("<Q", 80),
]


def safetensors_file(data: bytes) -> object:
    """A directory with one safetensors file; every tensor of a floating dtype is read."""
    path = folder("weights")
    (path / "model.safetensors").write_bytes(data)
    return _read_all(path)


INDEX_SEEDS = [
    json.dumps(
        {"metadata": {"total_size": 32}, "weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}
    ).encode()
]


def safetensors_index(data: bytes) -> object:
    """The index of a directory with one file more than it may name."""
    path = folder("sharded")
    if not (path / "m.safetensors").exists():
        (path / "m.safetensors").write_bytes(safetensors_seeds()[0])
        (path.parent / "outside.safetensors").write_bytes(safetensors_seeds()[0])
    (path / "model.safetensors.index.json").write_bytes(data)
    return _read_all(path)


def _read_all(path: Path) -> object:
    from dpo.huggingface.weights import SafetensorsDirectory

    directory = SafetensorsDirectory(path)
    for name, shape in directory.shapes.items():
        assert directory.read(name).shape == shape
    return sorted(map(len, directory.shapes.values()))[:3]


def gguf_seeds() -> list[bytes]:
    """A llama of one layer, with tokenizer metadata, in float32 and quantised."""
    import gguf

    seeds = []
    for quantised in (False, True):
        path = folder("gguf") / "seed.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["<s>", "a", "b", "ab", "</s>"])
        writer.add_token_types([3, 1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(4)
        writer.add_chat_template("{{ messages[0].content }}")
        embedding = np.ones((5, 32), np.float32)
        if quantised:
            blocks = gguf.quants.quantize(embedding, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor("token_embd.weight", embedding)
        writer.add_tensor("blk.0.attn_q.weight", np.ones((32, 32), np.float16))
        writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seeds.append(path.read_bytes())
    return seeds


GGUF_WORDS = [b"GGUF", b"general.architecture", b"general.alignment", b"llama", b"qwen2", b"gemma2", b"gpt2"]
GGUF_WORDS += [
    b"llama.block_count",
    b"tokenizer.ggml.tokens",
    b"token_embd.weight",
    b"output.weight",
    b"blk.0.",
]
GGUF_WORDS += [struct.pack("<I", kind) for kind in range(14)] + [
    struct.pack("<Q", n) for n in (1, 8, 1 << 40)
]
TENSOR_NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]


def gguf_file(data: bytes) -> object:
    """A GGUF file: metadata, configuration, special tokens, tensors."""
    from dpo.huggingface.gguf_files import GgufFile

    path = folder("gguf") / "model.gguf"
    path.write_bytes(data)
    file = GgufFile(path)
    config, tensors = file.config(), file.tensors(TENSOR_NAMES)
    for name, shape in tensors.shapes.items():
        assert tensors.read(name).shape == shape
    return sorted(config)[:3], len(tensors.shapes), file.token_ids()


def gguf_tokenizer(data: bytes) -> object:
    """The tokenizer that the metadata of a GGUF file describe."""
    from dpo.huggingface.gguf_files import GgufFile

    path = folder("gguf") / "model.gguf"
    path.write_bytes(data)
    return len(GgufFile(path).tokenizer()) > 3


def model_targets() -> list[Target]:
    """Readers of what comes beside weights and rows."""
    own, of = is_own_value_error, models.json_of
    generation, adapter = [models.GENERATION], [models.ADAPTER]
    return [
        Target("model config", of(models.CONFIGS), models.words(*models.CONFIGS), models.config, own, 200),
        Target(
            "generation config", of(generation), models.words(*generation), models.generation_config, own, 200
        ),
        Target("adapter", of(adapter), models.words(*adapter), models.adapter, own, 150),
        Target("tokenizer", models.tokenizer_seeds(), models.TOKENIZER_WORDS, models.tokenizer, own, 20),
        Target(
            "checksums",
            models.checksum_seeds(),
            models.CHECKSUM_WORDS,
            models.checksums,
            models.is_damaged,
            300,
        ),
        Target("card", models.CARDS, models.CARD_WORDS, models.card, own, 150),
        Target("rows.arrow", models.arrow_seeds(), models.ARROW_WORDS, models.arrow, own, 20),
        Target("saved state", of([models.STATE]), models.words(models.STATE), models.saved_state, own, 60),
    ]


@cache
def targets() -> dict[str, Target]:
    """Every reader by name."""
    rows = [json.dumps(row).encode() for row in ROWS]
    lines = [b"\n".join(rows), *rows]
    layout_rows = [json.dumps(row).encode() for row in LAYOUT_ROWS]
    layout_lines = [b"\n".join(layout_rows), *layout_rows]
    own, usage = is_own_value_error, is_usage_error
    found = [
        Target("rows.jsonl", lines, JSON_WORDS, json_lines, own, 400),
        Target("rows.csv", CSV_SEEDS, JSON_WORDS, csv_rows, own, 300),
        Target("layouts", layout_lines, JSON_WORDS + LAYOUT_WORDS, layouts, own, 60),
        Target("rows.json", [b"[" + b",".join(rows) + b"]"], JSON_WORDS, json_list, own, 200),
        Target("rows.jsonl.gz", [gzip.compress(lines[0])], JSON_WORDS, compressed_lines, own, 200),
        Target("rows.parquet", parquet_seeds(), JSON_WORDS, parquet_rows, own, 20),
        Target("config.yaml", YAML_SEEDS, setting_words(), yaml_file, own, 60),
        Target("overrides", OVERRIDE_SEEDS, setting_words(), overrides, usage, 60),
        Target(
            "template",
            TEMPLATE_SEEDS,
            [word.replace("%20", " ").encode() for word in TEMPLATE_TEXT.split()],
            template,
            own,
            120,
        ),
        Target("safetensors", safetensors_seeds(), SAFETENSORS_WORDS, safetensors_file, own, 400),
        Target("safetensors index", INDEX_SEEDS, SAFETENSORS_WORDS, safetensors_index, own, 200),
        Target("gguf", gguf_seeds(), GGUF_WORDS, gguf_file, own, 200),
        Target("reply", REPLY_SEEDS, REPLY_WORDS, reply, is_malformed, 400),
        Target("gguf tokenizer", gguf_seeds(), GGUF_WORDS, gguf_tokenizer, own, 30),
        *model_targets(),
    ]
    return {target.name: target for target in found}
