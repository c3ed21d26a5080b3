"""Token ids, ends of a response, logits and greedy tokens by llama.cpp itself, in an environment of its own.

    python -m venv llama && llama/bin/pip install llama-cpp-python      (builds it: some minutes)
    DPO_LLAMA_CPP_PYTHON=llama/bin/python pytest -m slow tests/huggingface

For token ids and ends of whole models `cyllama` does as well, which brings llama.cpp built.
Run as a program there, it reads {"model", "texts"} or {"model", "prompt", "new_tokens"} from standard input
and prints {"ids", "ends"} or {"logits", "greedy"}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
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
        pytest.skip("DPO_LLAMA_CPP_PYTHON is not set: a Python that has llama-cpp-python")
    result = subprocess.run([python, __file__], input=json.dumps(question), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    answer = json.loads(result.stdout)
    if "skipped" in answer:
        pytest.skip(answer["skipped"])
    return answer


def _tokenize(llama_cpp: Any, question: dict[str, Any]) -> dict[str, Any]:
    llama = llama_cpp.Llama(model_path=question["model"], vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in question["texts"]]
    vocabulary = llama_cpp.llama_model_get_vocab(llama._model.model)
    count = llama_cpp.llama_vocab_n_tokens(vocabulary)
    return {
        "ids": ids,
        "ends": [token for token in range(count) if llama_cpp.llama_vocab_is_eog(vocabulary, token)],
    }


def _tokenize_by_cyllama(llama: Any, question: dict[str, Any]) -> dict[str, Any]:
    params = llama.LlamaModelParams()
    params.n_gpu_layers = 0
    try:  # whole: of the vocabulary alone its llama.cpp aborts where a model has windows
        model = llama.LlamaModel(question["model"], params)
    except ValueError as error:
        if "tensor_count=0" not in str(error):
            raise
        return {"skipped": "cyllama opens no file of a vocabulary alone: llama-cpp-python does"}
    vocabulary = model.get_vocab()  # which does not keep the model
    ids = [list(vocabulary.tokenize(text, False, True)) for text in question["texts"]]
    return {"ids": ids, "ends": [token for token in range(vocabulary.n_vocab) if vocabulary.is_eog(token)]}


def _run(llama_cpp: Any, question: dict[str, Any]) -> dict[str, Any]:
    """With keys and values kept in float32, as they are where they are compared."""
    prompt, new_tokens = question["prompt"], question["new_tokens"]
    float32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        model_path=question["model"],
        n_ctx=len(prompt) + new_tokens,
        n_threads=1,
        logits_all=True,
        type_k=float32,
        type_v=float32,
        flash_attn=False,
        verbose=False,
    )
    llama.eval(prompt)
    logits, greedy = llama.scores[: len(prompt)].tolist(), []
    for step in range(new_tokens):
        greedy.append(int(llama.scores[len(prompt) + step - 1].argmax()))
        llama.eval(greedy[-1:])
    return {"logits": logits, "greedy": greedy}


def _answer() -> None:
    question = json.load(sys.stdin)
    if "texts" in question and importlib.util.find_spec("llama_cpp") is None:
        from cyllama.llama import llama_cpp as llama  # pyright: ignore[reportMissingImports]

        json.dump(_tokenize_by_cyllama(llama, question), sys.stdout)
        return
    import llama_cpp  # pyright: ignore[reportMissingImports]

    json.dump((_tokenize if "texts" in question else _run)(llama_cpp, question), sys.stdout)


if __name__ == "__main__":
    _answer()
