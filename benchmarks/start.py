"""Seconds from command to first step of a model of 3 million parameters, on a machine that others may share.

    python -m benchmarks.start                          # this tree: without and with what earlier starts keep
    python -m benchmarks.start --against ../before      # the same in turns with another tree
    python -m benchmarks.start --stages                 # one warm start, stage by stage

A start is `dpo train` in a process of its own until it says its first step, and is then killed. CPU seconds
are those of the process and of the children that it waited for. What starts keep (compiled programs, tokens,
the reference's log-probs) is in a folder of each tree's own: the first start finds it empty, others do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo.huggingface.saving import save_pretrained
from dpo.huggingface.text_models import read_config
from dpo.models.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"train": 200, "eval": 40}
VOCABULARY = 8192
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FIRST_STEP = "step 1/"
STAGES = {
    "dpo.commands.train": ("check_settings",),
    "dpo.training.preparation": ("make_mesh", "open_policy", "read_dataset", "make_loader", "run_identity"),
    "dpo.training.loop": (
        *("checkpoints_of", "resume_of", "_introduce", "program_of", "require_what_comes_later"),
        *("score_datasets", "validation_of", "_first_state", "begin", "_first_hooks", "_optimise"),
    ),
}
"""Functions whose seconds are said, where they are looked up."""


class Seconds(NamedTuple):
    """Of one start, to its first step."""

    wall: float
    cpu: float


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against", type=Path, action="append", default=[], help="another tree of the project"
    )
    parser.add_argument("--starts", type=int, default=3, help="warm starts of each tree")
    parser.add_argument("--stages", action="store_true", help="one warm start of this tree, stage by stage")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="start_") as scratch:
        directory = Path(scratch)
        write_inputs(directory)
        if options.stages:
            start(ROOT, directory)
            print_stages(directory)
        else:
            print_turns([ROOT, *options.against], directory, starts=options.starts)


def print_turns(trees: list[Path], directory: Path, *, starts: int) -> None:
    """Trees in turns, so that what else the machine does meets them alike."""
    found: dict[Path, list[Seconds]] = {tree: [] for tree in trees}
    for _ in range(starts + 1):
        for tree, seconds in found.items():
            seconds.append(start(tree, directory))
    print(f"{'tree':<40}{'first start':>22}{f'median of {starts} warm':>22}{'least':>18}")
    for tree, (first, *warm) in found.items():
        middle = Seconds(*(statistics.median(part) for part in zip(*warm, strict=True)))
        least = Seconds(*(min(part) for part in zip(*warm, strict=True)))
        print(f"{tree.resolve().name:<40}{_said(first):>22}{_said(middle):>22}{_said(least):>18}")


def _said(seconds: Seconds) -> str:
    return f"{seconds.wall:.1f} s, CPU {seconds.cpu:.1f}"


def start(tree: Path, directory: Path) -> Seconds:
    """One start of a tree's command until it says its first step."""
    begun = time.monotonic()
    with _started(tree, directory) as process:
        said = []
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith(FIRST_STEP):
                return Seconds(time.monotonic() - begun, _cpu_seconds(process.pid))
    raise RuntimeError(f"{tree} came to no step:\n{''.join(said)}")


@contextmanager
def _started(tree: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    run_dir = directory / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo", *command(directory)],
        env=environment(tree, directory),
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def command(directory: Path) -> list[str]:
    """The run, as arguments of `dpo`."""
    return [
        "train",
        f"--model.source={directory / 'model'}",
        f"--data.train={directory / 'train.jsonl'}",
        f"--data.eval={directory / 'eval.jsonl'}",
        f"--run_dir={directory / 'run'}",
        "--training.steps=100",
    ]


def environment(tree: Path, directory: Path) -> dict[str, str]:
    """A tree's code, and a home of its own, where starts keep what the next ones find."""
    home = directory / "homes" / tree.resolve().name
    home.mkdir(parents=True, exist_ok=True)
    return os.environ | {"PYTHONPATH": str(tree.resolve()), "HOME": str(home), "XDG_CACHE_HOME": str(home)}


def _cpu_seconds(pid: int) -> float:
    """Of a process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def print_stages(directory: Path) -> None:
    """One start with clocks around STAGES; a stage's seconds have those of the stages within it."""
    shutil.rmtree(directory / "run", ignore_errors=True)
    arguments = [sys.executable, "-c", _CLOCKED, json.dumps(STAGES), *command(directory)]
    subprocess.run(arguments, env=environment(ROOT, directory), cwd=directory, check=True)


_CLOCKED = """
import importlib, json, os, sys, time
def now():
    t = os.times()
    return time.monotonic(), t.user + t.system + t.children_user + t.children_system
def say(name, begun):
    wall, cpu = (b - a for a, b in zip(begun, now()))
    print(f"{name:<28}{wall:7.2f} s{cpu:8.2f} CPU", flush=True)
stages = json.loads(sys.argv.pop(1))
first = begun = now()
from dpo import __main__ as program
program.command = lambda: 0
os.environ["GLIBC_TUNABLES"] = program.HUGE_PAGES
program.run()
import dpo.cli
say("import dpo.cli", begun)
for module, names in stages.items():
    begun, home = now(), importlib.import_module(module)
    say("import " + module, begun)
    for name in names:
        def clocked(*given, name=name, inner=getattr(home, name), **named):
            before = now()
            try:
                return inner(*given, **named)
            finally:
                say(name, before)
        setattr(home, name, clocked)
from dpo.training.record import Record
class Reached(BaseException): pass
inner = Record.flush
def flush(self):
    inner(self)
    raise Reached
Record.flush = flush
try:
    dpo.cli.main(sys.argv[1:])
except Reached:
    say("all", first)
    os._exit(0)
"""


def write_inputs(directory: Path) -> None:
    """A Llama of 3 million random parameters, 8,192 tokens in its vocabulary, and shipped preferences."""
    kept = {name: _shipped(f"sentiment_{name}.jsonl", rows) for name, rows in ROWS.items()}
    for name, lines in kept.items():
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = _tokenizer(kept["train"])
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    _, config = read_config(hf_config)
    model = Decoder(config, rngs=nnx.Rngs(0), compute_dtype=jnp.dtype("float32"))
    save_pretrained(model, directory / "model", hf_config=hf_config, tokenizer=tokenizer)


def _shipped(name: str, rows: int) -> list[str]:
    return (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()[:rows]


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts, under names enough that there are 8,192 tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["</s>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([f"<unused{i}>" for i in range(VOCABULARY - backend.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


if __name__ == "__main__":
    main()
