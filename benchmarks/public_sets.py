"""Make the files of docs/results.md from the public data sets, as their owners publish them.

    git clone https://github.com/anthropics/hh-rlhf          (with git-lfs)
    git clone https://github.com/princeton-nlp/LLMBar
    git clone https://github.com/tatsu-lab/alpaca_eval
    python -m benchmarks.public_sets --hh hh-rlhf --llmbar LLMBar --alpaca-eval alpaca_eval --out public

It writes `pairs_{train,eval}.jsonl` (the three helpful test sets of HH), `llmbar.jsonl`, and
`rankings_{train,eval}.jsonl`: four answers to a prompt of AlpacaEval in the order of the log-odds that GPT-4
Turbo prefers each to the same baseline, at least 1 apart, up to four rankings of a training prompt and two of
a held-out one, which share no model. A prompt is held out by the SHA-256 of its first user message without
case and punctuation: one in ten, the same over all sets. The files behind docs/results.md were split by
another hash of the same text, so that figures agree within their intervals, not to the digit.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

HH_SETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled")
MAX_CHARACTERS = 1200
MIN_CHARACTERS = 20
LEAST_GAP = 1.0
"""Log-odds between neighbours of a ranking."""
RESPONSES = 4
NOT_PLAYERS = ("NullModel", "gpt4_gamed", "gpt4_1106_preview")
"""Two attacks on the judge, and the baseline."""


def is_held_out(first_message: str) -> bool:
    """One prompt in ten, whatever its case and punctuation."""
    text = " ".join(re.sub(r"[^\w\s]", "", first_message.lower()).split())
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0


def hh_pairs(checkout: Path) -> Iterator[tuple[str, Row]]:
    """(first user message, pair) of the helpful test sets; chosen and rejected stay whole transcripts."""
    for name in HH_SETS:
        with gzip.open(checkout / name / "test.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["chosen"] != row["rejected"]:
                    first = row["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()
                    source = f"hh-rlhf/{name}/test"
                    yield first, {"chosen": row["chosen"], "rejected": row["rejected"], "source": source}


def llmbar_pairs(checkout: Path) -> Iterator[Row]:
    """LLMBar's pairs, each with its subset as its source."""
    root = checkout / "Dataset" / "LLMBar"
    for path in sorted(root.rglob("dataset.json")):
        source = f"LLMBar/{path.parent.relative_to(root).as_posix()}"
        for row in json.loads(path.read_text(encoding="utf-8")):
            chosen, rejected = (row["output_1"], row["output_2"])[:: 1 if row["label"] == 1 else -1]
            yield {"prompt": row["input"], "chosen": chosen, "rejected": rejected, "source": source}


def alpaca_rankings(checkout: Path, *, seed: int = 0) -> Iterator[tuple[str, Row]]:
    """(prompt, ranking) drawn by a seed from the answers of all models to a prompt."""
    answers: dict[tuple[str, str], dict[str, tuple[float, str]]] = defaultdict(dict)
    for path in sorted(checkout.glob("results/*/weighted_alpaca_eval_gpt4_turbo/annotations.json")):
        if path.parents[1].name in NOT_PLAYERS:
            continue
        for row in json.loads(path.read_text(encoding="utf-8")):
            win, text = float(row["preference"] or 0) - 1, row["output_2"]
            if 0 < win < 1 and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                prompt = row["instruction"], f"alpaca_eval/{row['dataset']}"
                answers[prompt][path.parents[1].name] = (math.log(win / (1 - win)), text)
    for (prompt, source), of_models in sorted(answers.items()):
        generator = random.Random(f"{seed} {prompt}")
        for _ in range(2 if is_held_out(prompt) else 4):
            drawn = _draw(of_models, generator)
            if drawn is None:
                break
            for model in drawn:
                of_models.pop(model[0])
            generator.shuffle(drawn)
            scores = [score for _, score, _ in drawn]
            ranks = [1 + sum(other > score for other in scores) for score in scores]
            responses = [text for *_, text in drawn]
            yield prompt, {"prompt": prompt, "responses": responses, "ranks": ranks, "source": source}


def _draw(
    of_models: Mapping[str, tuple[float, str]], generator: random.Random
) -> list[tuple[str, float, str]] | None:
    """Models in a random order, each taken where it is far enough from those before; None if too few are."""
    drawn: list[tuple[str, float, str]] = []
    for model in generator.sample(sorted(of_models), len(of_models)):
        score, text = of_models[model]
        if all(abs(score - other) >= LEAST_GAP for _, other, _ in drawn):
            drawn.append((model, score, text))
        if len(drawn) == RESPONSES:
            return drawn
    return None


def write(path: Path, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def write_parts(out: Path, name: str, rows: Iterable[tuple[str, Row]]) -> None:
    """`NAME_train.jsonl` and `NAME_eval.jsonl`, which share no prompt."""
    parts: dict[bool, list[Row]] = {False: [], True: []}
    for prompt, row in rows:
        parts[is_held_out(prompt)].append(row)
    write(out / f"{name}_train.jsonl", parts[False])
    write(out / f"{name}_eval.jsonl", parts[True])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hh", type=Path, help="a checkout of anthropics/hh-rlhf, with its large files")
    parser.add_argument("--llmbar", type=Path, help="a checkout of princeton-nlp/LLMBar")
    parser.add_argument("--alpaca-eval", type=Path, help="a checkout of tatsu-lab/alpaca_eval")
    parser.add_argument("--out", type=Path, default=Path("public"), help="(default: %(default)s)")
    given = parser.parse_args(arguments)
    if not (given.hh or given.llmbar or given.alpaca_eval):
        parser.error("name at least one checkout: --hh, --llmbar or --alpaca-eval")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.hh:
        write_parts(given.out, "pairs", hh_pairs(given.hh))
    if given.llmbar:
        write(given.out / "llmbar.jsonl", llmbar_pairs(given.llmbar))
    if given.alpaca_eval:
        write_parts(given.out, "rankings", alpaca_rankings(given.alpaca_eval))


if __name__ == "__main__":
    main()
