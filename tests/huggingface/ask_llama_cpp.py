"""Token ids and end-of-generation tokens by llama.cpp itself, which an environment of its own has.

    python -m venv llama && llama/bin/pip install llama-cpp-python      (builds it: some minutes)
    DPO_LLAMA_CPP_PYTHON=llama/bin/python pytest -m slow tests/huggingface

Run as a program there, it reads {"model", "texts"} from standard input and prints {"ids", "ends"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def ask_llama_cpp(model: Path, texts: list[str]) -> tuple[list[list[int]], list[int]]:
    """llama.cpp's ids of the texts, and the tokens at which it stops; skips the test where there is none."""
    import pytest

    python = os.environ.get("DPO_LLAMA_CPP_PYTHON")
    if python is None:
        pytest.skip("DPO_LLAMA_CPP_PYTHON is not set: a Python that has llama-cpp-python")
    question = json.dumps({"model": str(model), "texts": texts})
    result = subprocess.run([python, __file__], input=question, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    answer = json.loads(result.stdout)
    return answer["ids"], answer["ends"]


def _answer() -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    question = json.load(sys.stdin)
    llama = llama_cpp.Llama(model_path=question["model"], vocab_only=True, verbose=False)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in question["texts"]]
    vocabulary = llama_cpp.llama_model_get_vocab(llama._model.model)
    count = llama_cpp.llama_vocab_n_tokens(vocabulary)
    ends = [token for token in range(count) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
    json.dump({"ids": ids, "ends": ends}, sys.stdout)


if __name__ == "__main__":
    _answer()
