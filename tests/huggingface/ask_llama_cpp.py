"""Token ids, ends of a response, logits and greedy tokens by llama.cpp itself, in an environment of its own.

    python -m venv llama && llama/bin/pip install llama-cpp-python      (builds it: some minutes)
    python -m venv llama && llama/bin/pip install --no-deps cyllama     (has it built; whole models alone)
    DPO_LLAMA_CPP_PYTHON=llama/bin/python pytest -m slow tests/huggingface

Run as a program there, it reads {"model", "texts"} or {"model", "prompt", "new_tokens"} from standard input
and prints {"ids", "ends"} or {"logits", "greedy"}.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def ask_llama_cpp(model: Path, texts: list[str]) -> tuple[list[list[int]], list[int]]:
    """llama.cpp's ids of the texts, and the tokens at which it stops; skips the test where there is none."""
    answer = _ask({"model": str(model), "texts": texts})
    return answer["ids"], answer["ends"]


def run_llama_cpp(model: Path, prompt: list[int], new_tokens: int) -> tuple[list[list[float]], list[int]]:
    """llama.cpp's logits after each token of a prompt, and so many greedy tokens after it; skips alike."""
    answer = _ask({"model": str(model), "prompt": prompt, "new_tokens": new_tokens})
    return answer["logits"], answer["greedy"]


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    import pytest

    python = os.environ.get("DPO_LLAMA_CPP_PYTHON")
    if python is None:
        pytest.skip("DPO_LLAMA_CPP_PYTHON is not set: a Python that has llama-cpp-python or cyllama")
    result = subprocess.run([python, __file__], input=json.dumps(question), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    answer = json.loads(result.stdout)
    if "skipped" in answer:
        pytest.skip(answer["skipped"])
    return answer


def _by_llama_cpp_python(llama_cpp: Any, question: dict[str, Any]) -> dict[str, Any]:
    """With keys and values kept in float32, as they are where they are compared."""
    if "texts" in question:
        llama = llama_cpp.Llama(model_path=question["model"], vocab_only=True, verbose=False)
        vocabulary = llama_cpp.llama_model_get_vocab(llama._model.model)
        return {
            "ids": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in question["texts"]],
            "ends": [
                token
                for token in range(llama_cpp.llama_vocab_n_tokens(vocabulary))
                if llama_cpp.llama_vocab_is_eog(vocabulary, token)
            ],
        }
    llama = llama_cpp.Llama(
        model_path=question["model"],
        n_ctx=len(question["prompt"]) + question["new_tokens"],
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )

    def step(ids: list[int]) -> list[list[float]]:
        before = llama.n_tokens
        llama.eval(ids)
        return llama.scores[before : llama.n_tokens].tolist()

    return _run(step, question)


def _by_cyllama(llama_cpp: Any, question: dict[str, Any]) -> dict[str, Any]:
    """The same of whole models: of the vocabulary alone its llama.cpp aborts where a model has windows."""
    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelParams()
    params.n_gpu_layers = 0

    class Model(llama_cpp.LlamaModel):
        n_vocab = property(
            lambda self: self.get_vocab().n_vocab
        )  # logits are read by it, and 0.2.18 has none

    try:
        model = Model(question["model"], params)
    except ValueError as error:
        if "tensor_count=0" not in str(error):
            raise
        return {"skipped": "cyllama opens no file of a vocabulary alone: llama-cpp-python does"}
    vocabulary = model.get_vocab()  # which does not keep the model
    if "texts" in question:
        return {
            "ids": [list(vocabulary.tokenize(text, False, True)) for text in question["texts"]],
            "ends": [token for token in range(vocabulary.n_vocab) if vocabulary.is_eog(token)],
        }
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = len(question["prompt"]) + question["new_tokens"]
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = _FLOAT32
    settings.flash_attn_type = 0
    context = llama_cpp.LlamaContext(model, settings)
    places = itertools.count()

    def one(token: int) -> list[float]:
        batch = llama_cpp.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
        batch.add(token, next(places), [0], True)
        context.decode(batch)
        return list(context.get_logits())

    def step(ids: list[int]) -> list[list[float]]:
        return [one(token) for token in ids]

    return _run(step, question)


_FLOAT32 = 0
"""GGML_TYPE_F32."""


def _run(step: Callable[[list[int]], list[list[float]]], question: dict[str, Any]) -> dict[str, Any]:
    logits, greedy = step(question["prompt"]), []
    last = logits[-1]
    for _ in range(question["new_tokens"]):
        greedy.append(max(range(len(last)), key=last.__getitem__))
        last = step(greedy[-1:])[-1]
    return {"logits": logits, "greedy": greedy}


def _answer() -> None:
    question = json.load(sys.stdin)
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        answer = _by_llama_cpp_python(llama_cpp, question)
    except ModuleNotFoundError:
        from cyllama.llama import llama_cpp  # pyright: ignore[reportMissingImports]

        answer = _by_cyllama(llama_cpp, question)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _answer()
