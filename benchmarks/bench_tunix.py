"""Another peer's side: tunix's DPOTrainer on the same pairs, timed; prints one JSON line.

    .venv-tunix/bin/python benchmarks/bench_tunix.py --model DIR --data pairs.jsonl --micro-batches 8

Runs in an environment of its own (requirements-tunix.txt) and imports nothing of this project. Model, loader,
trainer, reference and gradient accumulation are tunix's. Data order is the file's. What is done for it, each
in its favour:

- tunix 0.1.7 never gives its Llama the configuration's rope theta, but always 1,000,000. Here it gets the
  right one.
- It would put BOS before each response and mask by the padding's id, which is also the end token's. Here it
  gets token ids and masks by length, which its trainer takes as well, made before the clock starts.
- Prompts are padded on the left and responses on the right, as it wants, to the longest prompt and
  the longest response of the steps taken.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


def main() -> None:
    options = parse()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["JAX_PLATFORMS"] = "cuda" if options.device == "gpu" else str(options.device)
    # Whatever else is printed on standard output, which is ours, goes to standard error.
    ours = os.dup(1)
    os.dup2(2, 1)
    result = measure(options)
    sys.stdout.flush()
    os.write(ours, (json.dumps(result) + "\n").encode())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory of a Llama")
    parser.add_argument("--data", type=Path, required=True, help="pairs, JSONL")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument(
        "--micro-batches", type=int, default=1, help="parts that a step's pairs are split into"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    options = parser.parse_args(arguments)
    if options.warmup < 1:
        parser.error("--warmup must be at least 1: the first step compiles")
    if options.batch % options.micro_batches:
        parser.error(f"--micro-batches {options.micro_batches} does not divide --batch {options.batch}")
    return options


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def num_tokens(self) -> int:
        """Of both sequences, the prompt in both."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def read_pairs(path: Path, num_pairs: int, tokenizer: Any, max_length: int) -> list[Pair]:
    """The first pairs of a file through the tokenizer's chat template, their end cut at `max_length`."""
    with path.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(num_pairs), strict=False)]
    if len(rows) < num_pairs:
        raise ValueError(f"{path} has {len(rows)} pairs; {num_pairs} are needed for these steps")
    return [_tokenize(row, tokenizer, max_length) for row in rows]


def _tokenize(row: dict[str, Any], tokenizer: Any, max_length: int) -> Pair:
    prompt, *answers = (
        [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
        for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    )
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)]
    texts += [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
    start, *wholes = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if any(whole[: len(start)] != start for whole in wholes):
        raise ValueError("a prompt's tokens do not begin those of the prompt with its response")
    chosen, rejected = (whole[len(start) : max_length] for whole in wholes)
    return Pair(start[:max_length], chosen, rejected)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train, and say what the steps took. The reference is part of every step."""
    import jax
    import jax.numpy as jnp
    import optax
    import transformers
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
    from tunix.sft.dpo import dpo_trainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    num_steps = options.steps + options.warmup
    pairs = read_pairs(options.data, num_steps * options.batch, tokenizer, options.max_length)
    longest = max(len(pair.prompt) for pair in pairs), max(len(ids) for pair in pairs for ids in pair[1:])
    at_once = options.batch // options.micro_batches
    parts = [
        dpo_trainer.TrainingInput(**pad(pairs[i : i + at_once], *longest, tokenizer.pad_token_id))
        for i in range(0, len(pairs), at_once)
    ]

    settings, theta = read_config(json.loads((Path(options.model) / "config.json").read_text()))
    config = llama.ModelConfig(**settings)
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    # Two models, as in its own examples: the policy's arrays and the reference's are not the same ones.
    policy, reference = (
        llama_params.create_model_from_safe_tensors(options.model, config, dtype=jnp.dtype(options.dtype))
        for _ in range(2)
    )
    trainer = _probe(dpo_trainer.DPOTrainer)(
        model=policy,
        ref_model=reference,
        optimizer=optax.adamw(5e-7, weight_decay=0.0),
        training_config=dpo_trainer.DPOTrainingConfig(
            beta=0.1,
            eval_every_n_steps=num_steps + 1,
            max_steps=num_steps,
            gradient_accumulation_steps=options.micro_batches,
        ),
    )
    trainer.marks.append((time.perf_counter(), time.process_time()))
    trainer.train(parts)

    steps = list(zip(trainer.marks, trainer.marks[1:], strict=False))[options.warmup :]
    times, cpu_times = ([end[clock] - began[clock] for began, end in steps] for clock in (0, 1))
    seconds, timed = sum(times), pairs[options.warmup * options.batch :]
    tokens = sum(pair.num_tokens for pair in timed)
    memory = jax.devices()[0].memory_stats()
    return {
        "tool": "tunix",
        "tunix": importlib.metadata.version("google-tunix"),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "device": options.device,
        "dtype": options.dtype,
        "micro_batches": options.micro_batches,
        "batch": options.batch,
        "pairs_per_step": options.batch,
        "max_prompt_length": longest[0],
        "max_response_length": longest[1],
        "step_seconds": times,
        "seconds_per_step": statistics.median(times),
        "cpu_seconds_per_step": sum(cpu_times) / options.steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_with_reference": tokens / seconds,
        "tokens_per_cpu_second_with_reference": tokens / sum(cpu_times),
        "reference_seconds_per_step": 0.0,
        "pair_tokens": tokens,
        "fill": tokens / (2 * len(timed) * sum(longest)),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "device_peak_gib": None if memory is None else memory["peak_bytes_in_use"] / 2**30,
        "first_log_probs": trainer.first_log_probs,
        "first_loss": trainer.losses[0],
        "last_loss": trainer.losses[-1],
        "loadavg": os.getloadavg()[0],
    }


def pad(pairs: list[Pair], prompt_length: int, response_length: int, pad_id: int) -> dict[str, Any]:
    """The arrays of tunix's `TrainingInput`: ids and masks of prompts (right-aligned) and responses."""
    import numpy as np

    arrays = {}
    for name, width in (
        ("prompt", prompt_length),
        ("chosen", response_length),
        ("rejected", response_length),
    ):
        ids = np.full((len(pairs), width), pad_id, np.int32)
        mask = np.zeros((len(pairs), width), np.int32)
        for i, pair in enumerate(pairs):
            one = getattr(pair, name)
            place = slice(width - len(one), None) if name == "prompt" else slice(len(one))
            ids[i, place], mask[i, place] = one, 1
        arrays |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return arrays


def read_config(config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """What tunix's `ModelConfig` is made of, and the rope theta; refuses what its Llama does not compute."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
    needs = {
        "model_type": (config["model_type"], "llama"),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_scaling": (config.get("rope_scaling"), None),
        "hidden_act": (config["hidden_act"], "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
    }
    wrong = [f"{name} {has!r} (not {need!r})" for name, (has, need) in needs.items() if has != need]
    if wrong:
        raise ValueError(f"tunix's Llama does not compute this model: {', '.join(wrong)}")
    heads = config["num_attention_heads"]
    settings = {
        "num_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "num_kv_heads": config["num_key_value_heads"],
        "rope_theta": int(rope["rope_theta"]),
        "norm_eps": config["rms_norm_eps"],
        "weight_tying": config["tie_word_embeddings"],
    }
    return settings, rope["rope_theta"]


def _probe(trainer: type) -> type:
    """A trainer that notes its losses, and the clocks when a step's last micro-batch and update are done."""

    class Probe(trainer):
        def __init__(self, *arguments: Any, **options: Any):
            self.marks: list[tuple[float, float]] = []
            self.losses: list[float] = []
            self.first_log_probs: list[float] = []
            super().__init__(*arguments, **options)

        def _post_process_train_step(self, aux: Any) -> None:
            import jax
            from flax import nnx

            super()._post_process_train_step(aux)
            if not self.first_log_probs:
                self.first_log_probs = [float(aux[f"log_probs/{name}"]) for name in ("chosen", "rejected")]
            if (self.iter_steps + 1) % self.config.gradient_accumulation_steps == 0:
                jax.block_until_ready(nnx.state(self.model))
                self.marks.append((time.perf_counter(), time.process_time()))
                self.losses.append(float(self._buffered_train_metrics.loss))
                took = self.marks[-1][0] - self.marks[-2][0]
                print(f"step {len(self.losses)} {took:.2f} s, loss {self.losses[-1]:.4f}", file=sys.stderr)

    return Probe


if __name__ == "__main__":
    main()
