"""How the cost of a real token grows with the length of pairs, and with the number of responses.

    python -m benchmarks.growth --steps 2
    python -m benchmarks.growth --steps 1 --tokens 2048 --only length      # the quicker half

Rows are random words; a step has as many rows as fit into so many words (`--tokens`), and one at least. A
real token counts once, however many pairs its row makes. Results go to benchmarks/results/growth.json and
growth.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench import ROOT, Contestant, Files, _cpu_name, run


class Case(NamedTuple):
    """Rows of one size."""

    prompt: int
    response: int
    responses: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.response * self.responses


LENGTHS = [Case(n // 4, n // 4, 2) for n in (64, 128, 256, 512, 1024, 2048)]
"""Pairs as peers lay them out have 2 (prompt + response) tokens: 64 to 2,048."""

RESPONSES = [Case(128, 64, k) for k in (2, 4, 8, 16)]

CASES = {"length": LENGTHS, "responses": RESPONSES}


def main(arguments: list[str] | None = None) -> None:
    """Measure every case in a process of its own, write the table, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="embedded:smollm2-135m-instruct", help="model")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a case")
    parser.add_argument("--tokens", type=int, default=4096, help="words that a step has at most")
    parser.add_argument("--only", choices=CASES, nargs="+", default=[*CASES], help="what grows")
    parser.add_argument("--dpo-options", default="", help="further options of benchmarks/bench_dpo.py")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    options = parser.parse_args(arguments)
    options.warmup = 1
    with tempfile.TemporaryDirectory(prefix="growth_") as scratch:
        lines = {
            title: [measure(case, options, Path(scratch)) for case in CASES[title]] for title in options.only
        }
    report = {"machine": _cpu_name(), "options": {k: str(v) for k, v in vars(options).items()}, **lines}
    target = ROOT / "benchmarks" / "results"
    target.mkdir(exist_ok=True)
    (target / "growth.json").write_text(json.dumps(report, indent=1) + "\n")
    (target / "growth.md").write_text(table(report))
    print(table(report))


def measure(case: Case, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures of one case."""
    options.batch = max(1, options.tokens // case.tokens)
    rows = (options.steps + options.warmup) * options.batch
    path = directory / f"{case.prompt}_{case.response}_{case.responses}.jsonl"
    path.write_text("".join(json.dumps(_row(case, seed)) + "\n" for seed in range(rows)))
    contestant = Contestant("dpo", ("--max-length", "4096", *options.dpo_options.split()))
    files = Files(path, path, case.responses * (case.responses - 1) // 2)
    own = argparse.Namespace(**{**vars(options), "dpo_options": ""})
    found = run(contestant, files, own)
    real = found["fill"] * sum(r * t for r, t, *_ in found["shapes"]) / len(found["shapes"])
    return {
        "prompt": case.prompt,
        "response": case.response,
        "responses": case.responses,
        "prompts_a_step": options.batch,
        "real_tokens_a_step": real,
        "seconds_per_thousand_tokens": 1000 * found["seconds_per_step"] / real,
        "peak_rss_gib": found["peak_rss_gib"],
        "program_gib": found["program_gib"],
        "fill": found["fill"],
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, each line beside the first of its kind."""
    head = "| prompt + responses | prompts a step | s per 1,000 tokens | to the first | program GiB | fill |"
    lines = [f"{report['machine']}; median of {report['options']['steps']} steps.", "", head]
    lines.append("|" + "---|" * (head.count("|") - 1))
    for title in [title for title in CASES if title in report]:
        first = report[title][0]["seconds_per_thousand_tokens"]
        for one in report[title]:
            seconds = one["seconds_per_thousand_tokens"]
            lines.append(
                f"| {one['prompt']} + {one['responses']} x {one['response']} | {one['prompts_a_step']} "
                f"| {seconds:.2f} | {seconds / first:.2f} | {one['program_gib']:.2f} | {one['fill']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _row(case: Case, seed: int) -> dict[str, Any]:
    """A ranking whose texts have about so many tokens."""
    rng = random.Random(seed)
    words = ["time", "house", "water", "light", "music", "river", "story", "green", "table", "world"]

    def text(tokens: int) -> str:
        return " ".join(rng.choice(words) for _ in range(tokens))

    responses = [text(case.response) for _ in range(case.responses)]
    return {"prompt": text(case.prompt), "responses": responses, "ranks": list(range(case.responses))}


if __name__ == "__main__":
    main()
