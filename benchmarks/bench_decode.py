"""Decoding beside transformers' `generate`, in one process, in turns: greedy, with a cache, no end token.

    python -m benchmarks.bench_decode --rows 1,8,32 --prompt 64 --tokens 128 --rounds 3

Both sides decode the same random prompts in the same dtype. Prefill is timed apart, as the time of a response
of one token; tokens/s are of the others. The figures are medians over rounds with the least and the greatest;
a ratio is of one round. Needs torch. Results go to benchmarks/results/decode.json and decode.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench import ROOT, _cell, _cpu_name, _spread
from dpo.huggingface.pretrained import Pretrained, load_pretrained
from dpo.huggingface.saving import save_pretrained
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate

Decode = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and the number of new tokens → the new tokens."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the table, print it."""
    options = parse(arguments)
    pretrained = load_pretrained(options.source, compute_dtype=jnp.dtype(options.dtype))
    sides = {"dpo": our_side(pretrained), "transformers": their_side(pretrained, options.dtype)}
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {
        "machine": _cpu_name(),
        "jax": jax.__version__,
        "options": {key: str(value) for key, value in vars(options).items()},
        "rows": {},
    }
    for rows in map(int, options.rows.split(",")):
        vocabulary = pretrained.config["vocab_size"]
        prompts = rng.integers(10, vocabulary, size=(rows, options.prompt)).tolist()
        report["rows"][rows] = compare(sides, prompts, options)
    target = ROOT / "benchmarks" / "results"
    target.mkdir(exist_ok=True)
    (target / "decode.json").write_text(json.dumps(report, indent=1) + "\n")
    (target / "decode.md").write_text(table(report))
    print(table(report))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of one comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="embedded:smollm2-135m-instruct", help="model of both sides")
    parser.add_argument("--rows", default="1,8", help="responses at a time, comma-separated")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every response")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args(arguments)


def our_side(pretrained: Pretrained) -> Decode:
    """This project's `generate`."""

    def decode(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = SamplingConfig(max_new_tokens=tokens, temperature=0.0)
        seeds = [0] * len(prompts)
        return generate(pretrained.model, prompts, sampling=sampling, seeds=seeds, stop_tokens=[])

    return decode


def their_side(pretrained: Pretrained, dtype: str) -> Decode:
    """transformers' `generate` on the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        directory = save_pretrained(
            pretrained.model, Path(scratch) / "model", hf_config=pretrained.config, tokenizer=None
        )
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def decode(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()

    return decode


def compare(
    sides: dict[str, Decode], prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the first token and tokens/s of the others, for each side, and the ratio of a round."""
    found = {name: decode(prompts, options.tokens) for name, decode in sides.items()}  # compiles, warms up
    for decode in sides.values():
        decode(prompts, 1)
    first: dict[str, list[float]] = {name: [] for name in sides}
    rate: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            one = _seconds(lambda decode=sides[name]: decode(prompts, 1))
            whole = _seconds(lambda decode=sides[name]: decode(prompts, options.tokens))
            first[name].append(one)
            rate[name].append(len(prompts) * (options.tokens - 1) / (whole - one))
    ours, theirs = found.values()
    equal = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)]
    return {
        "first_token_seconds": {name: _spread(values) for name, values in first.items()},
        "tokens_per_second": {name: _spread(values) for name, values in rate.items()},
        "ours_over_theirs": _spread([a / b for a, b in zip(*rate.values(), strict=True)]),
        "equal_tokens": statistics.mean(equal) / options.tokens,
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    options = report["options"]
    lines = [
        f"{report['machine']}; {options['source']}, {options['dtype']}; prompts of {options['prompt']} "
        f"tokens, {options['tokens']} new ones, greedy; median of {options['rounds']} rounds (least to "
        "greatest).",
        "",
        "| rows | first token, s: dpo | transformers | tokens/s: dpo | transformers | ours over theirs "
        "| equal tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows, entry in report["rows"].items():
        cells = [
            *(_cell(entry["first_token_seconds"][name], 2) for name in ("dpo", "transformers")),
            *(_cell(entry["tokens_per_second"][name], 1) for name in ("dpo", "transformers")),
            _cell(entry["ours_over_theirs"], 2),
            f"{entry['equal_tokens']:.1%}",
        ]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
