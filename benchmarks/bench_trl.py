"""The peer's side: Hugging Face TRL's DPOTrainer on the same pairs, timed; prints one JSON line.

    .venv-trl/bin/python benchmarks/bench_trl.py --model DIR --data pairs.jsonl --batch 8 --micro-batches 8

Runs in an environment of its own (requirements-trl.txt) and imports nothing of this project. Data order is
the file's: step i has lines i * batch to (i + 1) * batch. The pairs are {"prompt", "chosen", "rejected"}.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    options = parse()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    # The trainer prints its logs on standard output, which is ours.
    ours = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="bench_trl_") as directory:
        os.environ["HF_DATASETS_CACHE"] = directory
        result = measure(options, directory)
    sys.stdout.flush()
    os.write(ours, (json.dumps(result) + "\n").encode())


def parse() -> argparse.Namespace:
    """The options of one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory of the policy")
    parser.add_argument("--data", type=Path, required=True, help="pairs, JSONL")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument(
        "--micro-batches", type=int, default=1, help="parts that a step's pairs are split into"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast"
    )
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probs before training")
    parser.add_argument("--lora-rank", type=int, default=None, help="train adapters (peft), not the model")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    return parser.parse_args()


def measure(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Train, and say what the steps took. Without `--precompute` the reference is part of every step."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()

    num_pairs = (options.steps + options.warmup) * options.batch
    with options.data.open() as lines:
        pairs = [json.loads(line) for line, _ in zip(lines, range(num_pairs), strict=False)]
    if len(pairs) < num_pairs:
        raise ValueError(f"{options.data} has {len(pairs)} pairs; {num_pairs} are needed for these steps")

    trainer_class = _probe(trl.DPOTrainer)
    timer = _timer(transformers.TrainerCallback)()
    config = trl.DPOConfig(
        output_dir=directory,
        per_device_train_batch_size=options.batch // options.micro_batches,
        gradient_accumulation_steps=options.micro_batches,
        max_steps=options.steps + options.warmup,
        learning_rate=5e-7,
        lr_scheduler_type="constant",
        warmup_steps=0,
        beta=0.1,
        loss_type="sigmoid",
        max_length=options.max_length,
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=options.precompute,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=options.device == "cpu",
        seed=0,
        dataloader_drop_last=True,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = trainer_class(
        model=options.model,
        args=config,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=transformers.AutoTokenizer.from_pretrained(options.model),
        callbacks=[timer],
        peft_config=_adapters(options.lora_rank),
    )
    trainer.train()

    skipped = options.warmup * options.micro_batches
    times, cpu_times = timer.times[options.warmup :], timer.cpu_times[options.warmup :]
    seconds, tokens = sum(times), sum(trainer.real_tokens[skipped:])
    reference = trainer.precompute_seconds / num_pairs * options.batch * options.steps
    reference_cpu = trainer.precompute_cpu_seconds / num_pairs * options.batch * options.steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    return {
        "tool": "trl",
        "trl": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": options.device,
        "dtype": options.dtype,
        "precompute": options.precompute,
        "micro_batches": options.micro_batches,
        "lora_rank": options.lora_rank,
        "batch": options.batch,
        "pairs_per_step": options.batch,
        "step_seconds": times,
        "seconds_per_step": statistics.median(times),
        "cpu_seconds_per_step": sum(cpu_times) / options.steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_with_reference": tokens / (seconds + reference),
        "tokens_per_cpu_second_with_reference": tokens / (sum(cpu_times) + reference_cpu),
        "reference_seconds_per_step": reference / options.steps,
        "pair_tokens": tokens,
        "fill": tokens / sum(trainer.padded_tokens[skipped:]),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "device_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "gpu" else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "loadavg": os.getloadavg()[0],
    }


def _adapters(rank: int | None) -> Any:
    """peft's settings for what `lora.rank` is here: every linear, alpha twice the rank."""
    if rank is None:
        return None
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _probe(trainer: type) -> type:
    """A trainer that counts tokens and times the reference's pass."""

    class Probe(trainer):
        def __init__(self, *arguments: Any, **options: Any):
            self.real_tokens: list[int] = []
            self.padded_tokens: list[int] = []
            self.precompute_seconds = self.precompute_cpu_seconds = 0.0
            super().__init__(*arguments, **options)

        def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter(), time.process_time()
            result = super()._precompute_ref_logps(*arguments, **options)
            self.precompute_seconds += time.perf_counter() - began[0]
            self.precompute_cpu_seconds += time.process_time() - began[1]
            return result

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            self.real_tokens.append(int(inputs["attention_mask"].sum()))
            self.padded_tokens.append(inputs["attention_mask"].numel())
            return super()._compute_loss(model, inputs, return_outputs)

    return Probe


def _timer(callback: type) -> type:
    """Wall and CPU seconds of every step."""

    class Timer(callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.cpu_times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter() - self.began[0])
            self.cpu_times.append(time.process_time() - self.began[1])
            print(f"step {len(self.times)} {self.times[-1]:.2f} s", file=sys.stderr, flush=True)

    return Timer


if __name__ == "__main__":
    main()
