"""The peer's side of bench_preparing: TRL's own preparation of a file of pairs; prints one JSON line.

Runs in an environment of its own (requirements-trl.txt) and imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from types import SimpleNamespace


def main() -> None:
    """Read the file and prepare it as DPOTrainer does, with two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True, help="pairs of messages, JSONL")
    parser.add_argument("--model", required=True, help="Hugging Face directory of the tokenizer")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = DPOConfig(output_dir="unused", dataset_num_proc=2, max_length=512, bf16=False, use_cpu=True)
    started, before = time.perf_counter(), os.times()
    rows = datasets.load_dataset("json", data_files=options.rows, split="train")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, settings, "train")
    busy = sum(os.times()[:4]) - sum(before[:4])
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    figures = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu seconds": round(busy, 1),
        "rows": len(prepared),
        "peak MB": round(sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
