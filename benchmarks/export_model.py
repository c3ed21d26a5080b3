"""Writes a model as a float32 Hugging Face directory, for the peer: export_model SOURCE DIRECTORY."""

from __future__ import annotations

import sys
from pathlib import Path

from dpo.huggingface.pretrained import load_pretrained
from dpo.huggingface.saving import save_pretrained


def main() -> None:
    source, directory = sys.argv[1:]
    pretrained = load_pretrained(source)
    Path(directory).parent.mkdir(parents=True, exist_ok=True)
    save_pretrained(
        pretrained.model,
        directory,
        hf_config=pretrained.config,
        tokenizer=pretrained.tokenizer,
        generation_config=pretrained.generation_config,
    )


if __name__ == "__main__":
    main()
