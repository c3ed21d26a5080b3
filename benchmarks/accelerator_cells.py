"""What the accelerator kit measures: cells in order of worth, each a program, its arguments and a limit."""

from __future__ import annotations

from typing import NamedTuple

LLAMA, QWEN, SMOLLM2, LFM2 = "llama-3.2-1b", "qwen3-0.6b", "smollm2-135m", "lfm2-350m"
QWEN35, HALF_A_BILLION = "qwen3.5-0.8b", "llama-0.5b"
TINY = {LFM2: "tiny-lfm2", QWEN35: "tiny-qwen3.5"}
"""What stands for a model in a rehearsal, where it is not `tiny`."""


class Cell(NamedTuple):
    """One measurement."""

    name: str
    arguments: tuple[str, ...]
    """Of python."""
    seconds: float
    """At most."""


def ours(model: str, data: str, batch: int, *more: str) -> tuple[str, ...]:
    """Arguments of our side's program."""
    common = (
        "-m",
        "benchmarks.bench_dpo",
        "--source",
        f"{{inputs}}/{model}",
        "--data",
        f"{{inputs}}/{data}.jsonl",
    )
    return (*common, "--batch", str(batch), "--dtype", "bfloat16", "--profile", *more)


def trl(model: str, data: str, batch: int, micro_batches: int, *more: str) -> tuple[str, ...]:
    """Arguments of TRL's program, in parts that fit the memory."""
    common = (
        "benchmarks/bench_trl.py",
        "--model",
        f"{{inputs}}/{model}",
        "--data",
        f"{{inputs}}/{data}.jsonl",
    )
    parts = ("--batch", str(batch), "--micro-batches", str(micro_batches))
    return (*common, *parts, "--dtype", "bfloat16", "--precompute", *more)


SHORT, LONG = ("--max-length", "1024"), ("--max-length", "4096")
BIG_CHUNK = ("--chunk", "8192")
FULL = ("--remat", "full")
SHORT_ROWS = ("--row-length", "1024")
"""For attention that visits all pairs of a row: else a row holds a whole batch."""
CUDNN = ("--attention", "cudnn", *SHORT_ROWS)
PLAIN = ("--attention", "plain", *SHORT_ROWS)
LORA = ("--lora-rank", "16")
HALF = ("--first-moment", "bfloat16")
UNROLL = ("--scan-unroll", "4")
LOOP = (
    *("-m", "benchmarks.profile_loop", "--source", f"{{inputs}}/{HALF_A_BILLION}"),
    *("--data", "{inputs}/ultrafeedback.jsonl", "--batch", "16", "--steps", "10", "--warmup", "10"),
    *("--dtype", "bfloat16", *SHORT, *BIG_CHUNK, "--device", "gpu"),
)
"""`dpo train` as it is, for the part of its time in which the device works."""

CELLS = (
    Cell("attention: ranges, cudnn and plain", ("-m", "benchmarks.check_attention"), 90),
    Cell("ours llama 1b helpsteer3", ours(LLAMA, "helpsteer3", 16, *SHORT, *BIG_CHUNK), 150),
    Cell("trl llama 1b helpsteer3", trl(LLAMA, "helpsteer3", 16, 4, *SHORT), 100),
    Cell("ours llama 1b fixed1024", ours(LLAMA, "fixed1024", 16, *SHORT, *BIG_CHUNK), 150),
    Cell("loop llama 0.5b ultrafeedback", LOOP, 120),
    Cell("ours llama 1b fixed1024 cudnn", ours(LLAMA, "fixed1024", 16, *SHORT, *BIG_CHUNK, *CUDNN), 150),
    Cell("trl llama 1b fixed1024", trl(LLAMA, "fixed1024", 16, 4, *SHORT), 100),
    Cell("ours llama 1b helpsteer3 K=4", ours(LLAMA, "helpsteer3_k4", 8, *SHORT, *BIG_CHUNK), 150),
    Cell("trl llama 1b helpsteer3 K=4", trl(LLAMA, "helpsteer3_k4_pairs", 48, 12, *SHORT), 150),
    Cell("ours llama 1b long4096", ours(LLAMA, "long4096", 8, *LONG, *FULL, "--micro-batches", "2"), 150),
    Cell("trl llama 1b long4096", trl(LLAMA, "long4096", 8, 8, *LONG), 100),
    Cell("ours smollm2 135m hh", ours(SMOLLM2, "hh", 16), 100),
    Cell("trl smollm2 135m hh", trl(SMOLLM2, "hh", 16, 1), 80),
    Cell("ours llama 1b helpsteer3 LoRA", ours(LLAMA, "helpsteer3", 16, *SHORT, *BIG_CHUNK, *LORA), 120),
    Cell("trl llama 1b helpsteer3 LoRA", trl(LLAMA, "helpsteer3", 16, 4, *SHORT, *LORA), 100),
    Cell("ours qwen3 0.6b ultrafeedback", ours(QWEN, "ultrafeedback", 16, *SHORT, *BIG_CHUNK), 120),
    Cell("trl qwen3 0.6b ultrafeedback", trl(QWEN, "ultrafeedback", 16, 4, *SHORT), 100),
    Cell("ours llama 1b fixed1024 remat full", ours(LLAMA, "fixed1024", 16, *SHORT, *BIG_CHUNK, *FULL), 120),
    Cell("ours llama 1b fixed1024 half moment", ours(LLAMA, "fixed1024", 16, *SHORT, *BIG_CHUNK, *HALF), 120),
    Cell("ours llama 1b fixed1024 unroll", ours(LLAMA, "fixed1024", 16, *SHORT, *BIG_CHUNK, *UNROLL), 150),
    Cell("ours lfm2 350m ultrafeedback", ours(LFM2, "ultrafeedback", 16, *SHORT, *BIG_CHUNK), 120),
    Cell("trl lfm2 350m ultrafeedback", trl(LFM2, "ultrafeedback", 16, 4, *SHORT), 100),
    Cell("ours qwen3.5 0.8b ultrafeedback", ours(QWEN35, "ultrafeedback", 16, *SHORT, *BIG_CHUNK), 150),
    Cell("trl qwen3.5 0.8b ultrafeedback", trl(QWEN35, "ultrafeedback", 16, 4, *SHORT), 100),
    Cell("ours llama 1b fixed1024 plain", ours(LLAMA, "fixed1024", 16, *SHORT, *BIG_CHUNK, *PLAIN), 150),
)  # fmt: skip
