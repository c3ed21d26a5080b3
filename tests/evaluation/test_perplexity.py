"""The real model finds human responses as probable as transformers does, in the layout of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpo.data.preferences import read_preferences
from dpo.data.tokenization import tokenize
from dpo.huggingface.embedded import cached_embedded
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.judging.local_judge import sequence_log_probs

SMOLLM2 = "embedded:smollm2-135m-instruct"
NUM_RESPONSES, MAX_LENGTH = 200, 256


@pytest.mark.slow
def test_smollm2_has_transformers_perplexity_on_human_responses(shared_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    data, path = shared_dir / "data" / "pairs_eval.jsonl", cached_embedded(SMOLLM2)
    if path is None or not data.is_file():
        pytest.skip("the embedded model (make train fetches it) or pairs_eval.jsonl is not there")
    preferences = read_preferences(str(data)).preferences
    tokens = tokenize(preferences, load_tokenizer(SMOLLM2), max_length=MAX_LENGTH)
    rows = range(NUM_RESPONSES)
    prompts = [tokens.prompt(row).tolist() for row in rows]
    responses = [tokens.responses(row)[0].tolist() for row in rows]
    ours = sequence_log_probs(SMOLLM2, prompts, responses)

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    theirs = np.zeros(NUM_RESPONSES)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_probs = torch.log_softmax(logits, dim=-1)
        theirs[row] = log_probs[torch.arange(len(response)), torch.tensor(response)].sum().item()

    count = sum(map(len, responses))
    perplexities = [float(np.exp(-logps.sum() / count)) for logps in (ours, theirs)]
    print(f"{count} tokens of {NUM_RESPONSES} responses: perplexity, and torch's: {perplexities}")
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert np.abs(ours - theirs).max() < 0.02, "nats of any single response"
