"""Rows to tokens: time, memory and the next start, beside TRL's preparation of the same rows.

    python -m benchmarks.bench_preparing --data DIR --rows 60000 --peer PYTHON

Rows are made of real pairs in DIR (pairs_train.jsonl): those of about 300 tokens, over and over, each with a
number of its own in its last question. Every measurement is a process of its own; its peak memory is that of
its process and of the largest of its children. PYTHON is one that has TRL (requirements-trl.txt); without it
only this project is measured. `--kill SECONDS` ends a first preparation after so long, and shows how the
second goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

CHARACTERS = range(900, 1500)
"""Of prompt and both responses together: about 300 tokens."""
MODEL = "embedded:smollm2-135m-instruct"


def main() -> None:
    """Make rows, measure, print one JSON line a measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory with pairs_train.jsonl")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--peer", help="a python that has TRL")
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of that python")
    parser.add_argument("--kill", type=float, help="seconds after which a first preparation is killed")
    parser.add_argument("--scratch", type=Path, help="directory for rows and tokens; a temporary one if none")
    parser.add_argument("--prepare", type=Path, help="(of a child) rows to prepare")
    parser.add_argument("--store", type=Path, help="(of a child) where to")
    options = parser.parse_args()
    if options.prepare:
        print(json.dumps(prepare(options.prepare, options.store)))
        return
    with tempfile.TemporaryDirectory(prefix="preparing_", dir=options.scratch) as scratch:
        compare(options, Path(scratch))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Every measurement, one after the other."""
    rows = scratch / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in make_rows(options.data, options.rows))
    own = [sys.executable, "-m", "benchmarks.bench_preparing", "--prepare", str(rows)]
    own += ["--store", str(scratch / "tokens")]
    if options.kill:
        child = subprocess.Popen(own, stdout=subprocess.DEVNULL)
        time.sleep(options.kill)
        child.kill()
        child.wait()
        chunks = sum(1 for _ in (scratch / "tokens").rglob("*.safetensors"))
        print(json.dumps({"killed after": options.kill, "chunks": chunks}))
    say("first start", own)
    say("next start", own)
    if options.peer:
        peer = Path(__file__).with_name("bench_preparing_trl.py")
        command = [options.peer, str(peer), "--rows", str(rows), "--model", str(scratch / "tokenizer")]
        say("TRL", command, PYTHONPATH=options.peer_path, HF_DATASETS_CACHE=str(scratch / "peer"))


def say(name: str, command: Sequence[str], **environment: str) -> None:
    """Run a measurement and print what it found."""
    started = time.perf_counter()
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    print(
        json.dumps({"what": name, **figures, "process": round(time.perf_counter() - started, 1)}), flush=True
    )


def make_rows(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """So many pairs of messages."""
    with (data / "pairs_train.jsonl").open(encoding="utf-8") as file:
        pairs = [pair for pair in map(json.loads, file) if len(json.dumps(pair)) - 150 in CHARACTERS]
    for number, pair in enumerate(islice(cycle(pairs), count)):
        *before, last = messages(pair["prompt"], "user")
        yield {
            "prompt": [*before, {"role": "user", "content": f"{last['content']} ({number})"}],
            "chosen": messages(pair["chosen"], "assistant"),
            "rejected": messages(pair["rejected"], "assistant"),
        }


def messages(given: Any, role: str) -> list[dict[str, str]]:
    """Text as one message."""
    return [{"role": role, "content": given}] if isinstance(given, str) else given


def prepare(rows: Path, store: Path) -> dict[str, Any]:
    """What `dpo train` does with its data before it loads a model."""
    from dpo.config import DataConfig
    from dpo.huggingface.tokenizer_files import load_tokenizer
    from dpo.training.reading import read_dataset

    tokenizer = load_tokenizer(MODEL)
    started, busy = time.perf_counter(), _busy()
    dataset = read_dataset(DataConfig(train=str(rows), token_store=str(store)), tokenizer)
    tokens = dataset.tokens
    tokenizer.save_pretrained(store.with_name("tokenizer"))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu seconds": round(_busy() - busy, 1),
        "rows": len(tokens),
        "tokens": int(tokens.prompt_offsets[-1] + tokens.response_offsets[-1]),
        "peak MB": peak_mb(),
    }


def peak_mb() -> int:
    """Of this process and of the largest of its children."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return round(sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024)


def _busy() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
