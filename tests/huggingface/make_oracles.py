"""Compare every family with transformers' torch models; write oracles.json beside this and docs/models.md.

    python -m tests.huggingface.make_oracles            the families
    python -m tests.huggingface.make_oracles olmo3 …    these cases alone, the others stay as they are
    python -m tests.huggingface.make_oracles --smollm2  the embedded model

Needs torch. The numbers kept are what transformers computes in float32, so that tests without torch hold the
decoder to them. `--smollm2` makes those of the embedded model, as transformers itself reads its file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers
from parity import NEW_TOKENS, PROMPT, SEEDS, Parity, measure
from tiny_models import (
    CASES,
    CLASSIFIERS,
    ORACLES,
    SEQUENCES,
    TOKENS,
    write_checkpoint,
    write_classifier,
)
from torch_models import torch_greedy, torch_log_probs, torch_logits, torch_model, torch_scores

from dpo.huggingface.embedded import fetch_embedded
from dpo.huggingface.families import FAMILIES, classifier_architecture, find_family
from dpo.huggingface.gguf_architectures import ARCHITECTURES
from dpo.models.rotary import ROPE_TYPES

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
SMOLLM2 = ORACLES.with_name("smollm2_oracle.json")


def main() -> None:
    transformers.logging.set_verbosity_error()
    if "--smollm2" in sys.argv:
        SMOLLM2.write_text(json.dumps(smollm2_oracle()) + "\n")
        return
    cases = sys.argv[1:] or list(CASES)
    known = json.loads(ORACLES.read_text()) if sys.argv[1:] else {}
    rows = _known_rows() if sys.argv[1:] else {}
    for case in cases:
        known[case] = torch_oracle(case)
        rows[case] = _row(case, [measure(case, seed) for seed in SEEDS])
        ORACLES.write_text(_lines({name: known[name] for name in CASES if name in known}))
        DOCS.write_text(document({name: rows[name] for name in CASES if name in rows}))


def _known_rows() -> dict[str, str]:
    """The lines of the page's table, by case."""
    lines = DOCS.read_text().partition("## Against transformers")[2].splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    return {case: found[case] for case in CASES if case in found}


def _lines(oracles: dict[str, Any]) -> str:
    """One line a case, so that a change of one is a change of one line."""
    lines = [f"{json.dumps(case)}: {json.dumps(oracle)}" for case, oracle in oracles.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def torch_oracle(case: str) -> dict[str, Any]:
    """Logits at three positions, log-probs of each row's tokens, greedy tokens, and a classifier's scores."""
    with tempfile.TemporaryDirectory() as scratch:
        model = torch_model(write_checkpoint(Path(scratch) / "causal", case))
        oracle = {
            "logits": _rounded(torch_logits(model, TOKENS)[1, [0, 11, 23], :8]),
            "log_probs": _rounded(torch_log_probs(model, TOKENS)),
            "greedy": torch_greedy(model, TOKENS[0, :PROMPT].tolist(), NEW_TOKENS),
        }
        if case in CLASSIFIERS:
            directory = write_classifier(Path(scratch) / "classifier", case)
            oracle["scores"] = _rounded(torch_scores(directory, SEQUENCES))
        return oracle


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values.astype(float), 6).tolist()


def document(rows: dict[str, str]) -> str:
    """The page: what is supported, and one line a case."""
    text = (Path(__file__).with_name("models_page.md")).read_text()
    values = {
        "version": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "seeds": len(SEEDS),
        "new_tokens": NEW_TOKENS,
        "model_types": ", ".join(f"`{name}`" for name in FAMILIES),
        "classifiers": ", ".join(f"`{classifier_architecture(name)}`" for name in CLASSIFIERS),
        "rope_types": ", ".join(ROPE_TYPES),
        "gguf": ", ".join(f"`{name}`" for name in ARCHITECTURES),
        "table": "\n".join(rows.values()),
    }
    for name, value in values.items():
        text = text.replace("{{ " + name + " }}", str(value))
    return text


def _row(case: str, several: list[Parity]) -> str:
    """The worst of all seeds."""
    worst = [max(getattr(parity, name) for parity in several) for name in ("logits", "log_probs", "export")]
    greedy = f"{sum(p.agreed for p in several)} of {sum(p.compared for p in several)}"
    cells = [case, find_family(case.split("-")[0]).architecture, *(f"{value:.1e}" for value in worst), greedy]
    return f"| {' | '.join(cells)} |"


def smollm2_oracle() -> dict[str, Any]:
    """Logits and a greedy response of the embedded model, as transformers reads its GGUF file."""
    path = fetch_embedded("embedded:smollm2-135m-instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write one sentence about the hotel."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    tokens = tokenizer(text)["input_ids"]
    logits = torch_logits(model, np.asarray([tokens]))[0]
    return {
        "text": text,
        "tokens": tokens,
        "columns": list(range(0, 49152, 6007)),
        "logits": np.round(logits[:, ::6007].astype(float), 5).tolist(),
        "greedy": torch_greedy(model, tokens, NEW_TOKENS),
    }


if __name__ == "__main__":
    main()
