"""The default model, written as GGUF files, is the same in llama.cpp: tokens, logits, greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ask_llama_cpp import ask_llama_cpp, run_llama_cpp
from numpy.testing import assert_allclose
from tiny_models import batch_arrays
from tokenizer_corpus import TEXTS

from dpo.huggingface.embedded import cached_embedded
from dpo.huggingface.gguf_writing import save_gguf
from dpo.huggingface.pretrained import Pretrained, load_pretrained, stop_tokens
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate

pytestmark = pytest.mark.slow

SMOLLM2 = "embedded:smollm2-135m-instruct"
MESSAGE = "Add 17 and 2,025; then explain `x **= 2` 😀, and 世界."
NEW_TOKENS = 32
DIVERGENCE = {"f32": 1e-6, "f16": 1e-4, "q8_0": 5e-2}
"""Nats by which llama.cpp's next token may differ from ours of the same file, at any position: it rounds
activations as the weights are rounded."""


@pytest.fixture(scope="module")
def smollm2() -> Pretrained:
    if cached_embedded(SMOLLM2) is None:
        pytest.skip(f"{SMOLLM2} was not fetched (make train does)")
    return load_pretrained(SMOLLM2)


def logits(pretrained: Pretrained, prompt: list[int]) -> np.ndarray:
    model = pretrained.model
    return np.asarray(model.logits(model.hidden(*batch_arrays(np.asarray([prompt]))))[0])


@pytest.mark.parametrize("dtype", DIVERGENCE)
def test_llama_cpp_opens_what_is_written(smollm2: Pretrained, dtype: str, tmp_path: Path) -> None:
    path = save_gguf(
        smollm2.model,
        tmp_path / "model.gguf",
        hf_config=smollm2.config,
        tokenizer=smollm2.tokenizer,
        generation_config=smollm2.generation_config,
        dtype=dtype,
    )
    ids, ends = ask_llama_cpp(path, TEXTS)
    assert ids == smollm2.tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert ends == stop_tokens(smollm2)

    again = smollm2 if dtype == "f32" else load_pretrained(path)
    messages = [{"role": "user", "content": MESSAGE}]
    prompt: Any = again.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    theirs, greedy = run_llama_cpp(path, prompt, NEW_TOKENS)
    ours = logits(again, prompt)
    first, second = (np.asarray(jax.nn.log_softmax(each)) for each in (ours, np.asarray(theirs, np.float32)))
    divergence = (np.exp(first) * (first - second)).sum(-1).max()
    largest = np.abs(ours - theirs).max()
    print(f"{dtype}: {path.stat().st_size / 1e6:.0f} MB; logits {largest:.1e}, divergence {divergence:.1e}")
    assert divergence < DIVERGENCE[dtype]
    if dtype == "f32":
        assert_allclose(ours, theirs, rtol=0, atol=1e-3)
        sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
        assert generate(again.model, [prompt], sampling=sampling, seeds=[0], stop_tokens=[]) == [greedy]
