"""The files of docs/results.md from small checkouts in the form of the public sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.public_sets import HH_SETS, is_held_out, main
from dpo.data.preferences import read_preferences


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_checkouts(root: Path) -> None:
    for name in HH_SETS:
        (root / "hh" / name).mkdir(parents=True)
        rows = [
            {
                side: f"\n\nHuman: Question {i}?\n\nAssistant: Well.\n\nHuman: So?\n\nAssistant: {answer}"
                for side, answer in (("chosen", f"Good {name}."), ("rejected", "Bad."))
            }
            for i in range(40)
        ]
        text = "".join(
            json.dumps(row) + "\n" for row in [*rows, {"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: x"}]
        )
        (root / "hh" / name / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    bar = root / "llmbar" / "Dataset" / "LLMBar"
    one = {"input": "Say one.", "output_1": "One.", "output_2": "Two.", "label": 1}
    write_json(bar / "Natural" / "dataset.json", [one])
    write_json(bar / "Adversarial" / "Manual" / "dataset.json", [{**one, "label": 2}])
    for number in range(12):
        folder = root / "alpaca" / "results" / f"model{number}" / "weighted_alpaca_eval_gpt4_turbo"
        rows = [
            {
                "instruction": f"Task {i}.",
                "dataset": "koala",
                "output_2": f"An answer of model {number} to task {i}.",
                "preference": 1 + (number + 0.5) / 12,
            }
            for i in range(30)
        ]
        write_json(folder / "annotations.json", rows)
    write_json(
        root / "alpaca" / "results" / "NullModel" / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json",
        [
            {
                "instruction": "Task 0.",
                "dataset": "koala",
                "output_2": "An attack on the judge.",
                "preference": 1.99,
            }
        ],
    )


def test_the_files_are_made_and_read(tmp_path: Path) -> None:
    make_checkouts(tmp_path)
    out = tmp_path / "public"
    checkouts = [
        f"--hh={tmp_path / 'hh'}",
        f"--llmbar={tmp_path / 'llmbar'}",
        f"--alpaca-eval={tmp_path / 'alpaca'}",
    ]
    main([*checkouts, f"--out={out}"])

    train, held = (read_preferences(out / f"pairs_{part}.jsonl").preferences for part in ("train", "eval"))
    assert len(train) + len(held) == 3 * 40, "the row of equal responses is left out"
    assert held
    assert not {str(row.prompt) for row in train} & {str(row.prompt) for row in held}
    assert {row.source for row in train} == {f"hh-rlhf/{name}/test" for name in HH_SETS}

    natural, manual = sorted(
        read_preferences(out / "llmbar.jsonl").preferences, key=lambda row: str(row.source)
    )[::-1]
    assert (natural.source, natural.responses[0]) == ("LLMBar/Natural", "One.")
    assert (manual.source, manual.responses[0]) == ("LLMBar/Adversarial/Manual", "Two.")

    rankings = [json.loads(line) for line in (out / "rankings_train.jsonl").read_text().splitlines()]
    assert all(not is_held_out(row["prompt"]) for row in rankings)
    assert "attack" not in json.dumps(rankings)
    for row in rankings:
        best_first = [text for _, text in sorted(zip(row["ranks"], row["responses"], strict=True))]
        models = [int(text.split()[4]) for text in best_first]
        assert sorted(row["ranks"]) == [1, 2, 3, 4]
        assert models == sorted(models, reverse=True), "the judge's order"
    first = [row["responses"] for row in rankings if row["prompt"] == rankings[0]["prompt"]]
    assert len({text for responses in first for text in responses}) == 4 * len(first), "no model comes twice"
