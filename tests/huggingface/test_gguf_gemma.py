"""Gemma 3 270M from a quantised GGUF file: adapters by DPO, held-out figures, and a file for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ask_llama_cpp import ask_llama_cpp, run_llama_cpp
from gguf_vocabularies import GEMMA_FILE
from numpy.testing import assert_allclose
from tiny_models import batch_arrays
from tokenizer_corpus import TEXTS

from dpo.cli import main
from dpo.huggingface.embedded import cache_directory
from dpo.huggingface.pretrained import load_pretrained
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 32
GELU_OF_A_TABLE = 2e-2
"""Largest difference of logits: llama.cpp looks GELU up in a table of float16."""


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    """A few short pairs as plain text: the model is a base model, without a chat template."""
    found = {}
    for name, count in (("train", 8), ("eval", 4)):
        lines = (ROOT / "data" / f"sentiment_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = tmp_path / f"{name}.jsonl"
        with found[name].open("w", encoding="utf-8") as file:
            for line in map(json.loads, lines[:count]):
                line["prompt"] = f"Human: {line['prompt'][-1]['content']}\n\nAssistant:"
                line["responses"] = [f" {text}" for text in line["responses"]]
                file.write(json.dumps({key: line[key] for key in ("prompt", "responses", "scores")}) + "\n")
    return found


@pytest.mark.slow
def test_it_is_trained_measured_and_opened_by_llama_cpp(rows: dict[str, Path], tmp_path: Path) -> None:
    source = cache_directory() / GEMMA_FILE
    if not source.exists():
        pytest.skip(f"{source} is not there (tests/huggingface/make_llama_cpp_ids.py fetches it)")
    run, written = tmp_path / "run", tmp_path / "policy.gguf"
    settings = [
        f"--model.source={source}",
        f"--data.train={rows['train']}",
        f"--data.eval={rows['eval']}",
        "--lora.rank=8",
        "--optimizer.learning_rate=1e-3",
        "--optimizer.warmup_fraction=0",
        "--training.steps=2",
        "--training.batch_size=4",
    ]
    assert main(["train", f"--run_dir={run}", *settings]) == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()[:1]]
    assert_allclose(losses, np.log(2), atol=1e-5)
    assert json.loads((run / "evaluation.json").read_text())["prompts"] == 4
    assert main(["export", str(run), "--format=gguf", "--dtype=f32", f"--output={written}"]) == 0

    trained, base = load_pretrained(run / "export"), load_pretrained(source)
    ids, _ = ask_llama_cpp(written, TEXTS)
    assert ids == trained.tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    prompt = trained.tokenizer("Human: Add 17 and 2,025.\n\nAssistant:")["input_ids"]
    theirs, greedy = run_llama_cpp(written, prompt, NEW_TOKENS)
    layout = batch_arrays(np.asarray([prompt]))
    ours, untrained = (np.asarray(one.model.logits(one.model.hidden(*layout))[0]) for one in (trained, base))
    assert np.abs(ours - untrained).max() > 10 * GELU_OF_A_TABLE, "it is the trained one"
    assert_allclose(ours, theirs, rtol=0, atol=GELU_OF_A_TABLE)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
    assert generate(trained.model, [prompt], sampling=sampling, seeds=[0], stop_tokens=[]) == [greedy]
