"""Our directories in the last transformers 4 and in this one: the same ids, logits and greedy tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ask_transformers import ask_transformers, other_transformers
from tiny_model import byte_tokenizer
from tiny_models import write_checkpoint
from tokenizer_corpus import TEXTS

from dpo.huggingface.pretrained import load_pretrained
from dpo.huggingface.saving import save_pretrained

FAMILIES = ("llama-llama3", "qwen3", "gemma3_text", "phi3-longrope", "gpt_neox")
"""A scaled, a plain, a double, a long and a partial rotation."""
PROMPT, NEW_TOKENS = 8, 12


@pytest.mark.slow
def test_exports_of_five_families_open_alike(tmp_path: Path) -> None:
    python = other_transformers()
    pytest.importorskip("torch")
    tokenizer = byte_tokenizer()
    tokens = (np.arange(40).reshape(2, 20) * 31 % 89).tolist()
    directories = []
    for case in FAMILIES:
        source = write_checkpoint(tmp_path / "in" / case, case)
        tokenizer.save_pretrained(source)
        given = load_pretrained(source)
        directories.append(
            save_pretrained(given.model, tmp_path / case, hf_config=given.config, tokenizer=given.tokenizer)
        )
    question = {"tokens": tokens, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "texts": TEXTS}
    older = ask_transformers(python, directories, **question)
    newer = ask_transformers(sys.executable, directories, **question)
    assert (older["version"][0], newer["version"][0]) == ("4", "5")
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for case, then, now in zip(FAMILIES, older["found"], newer["found"], strict=True):
        difference = np.abs(np.asarray(then["logits"]) - np.asarray(now["logits"])).max()
        print(f"{case}: logits differ by {difference:.1e}")
        assert difference < 2e-5, case
        assert then["greedy"] == now["greedy"], case
        assert then["ids"] == now["ids"] == own, case
        assert then["chat"] == now["chat"], case
