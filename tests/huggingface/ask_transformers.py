"""What a transformers of another environment makes of model directories: ids, logits, greedy tokens.

    python -m venv tf4 && tf4/bin/pip install 'transformers<5' torch
    DPO_TRANSFORMERS4_PYTHON=tf4/bin/python pytest -m slow tests/huggingface

Run as a program there, it reads {"directories", "tokens", "prompt", "new_tokens", "texts"} from standard
input and prints {"version", "found": [{"logits", "greedy", "ids", "chat", "tokenizer", "model"}]}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask_transformers(python: str, directories: list[Path], **question: Any) -> dict[str, Any]:
    """The answer of the transformers that this Python imports."""
    given = json.dumps({"directories": [str(path) for path in directories], **question})
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [python, __file__]
    result = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def other_transformers() -> str:
    """The Python that has transformers 4; skips the test where none is named."""
    import pytest

    python = os.environ.get("DPO_TRANSFORMERS4_PYTHON")
    if python is None:
        pytest.skip("DPO_TRANSFORMERS4_PYTHON is not set: a Python with transformers 4 and torch")
    return python


def _answer() -> None:
    import torch
    import transformers

    given = json.load(sys.stdin)
    found = []
    for directory in given["directories"]:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        model = model.to(dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        with torch.no_grad():
            logits = model(torch.tensor(given["tokens"])).logits
            ids = torch.tensor([given["tokens"][0][: given["prompt"]]])
            for _ in range(given["new_tokens"]):
                following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, following], dim=1)
        message = [{"role": "user", "content": given["texts"][0]}]
        found.append(
            {
                "logits": logits.numpy().astype(float).tolist(),
                "greedy": ids[0, given["prompt"] :].tolist(),
                "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given["texts"]],
                "chat": tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True),
                "tokenizer": type(tokenizer).__name__,
                "model": type(model).__name__,
            }
        )
    print(json.dumps({"version": transformers.__version__, "found": found}))


if __name__ == "__main__":
    _answer()
