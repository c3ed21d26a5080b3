"""What the accelerator kit measures on, made on the spot: models of real shapes and pairs of given lengths.

Weights are random: speed and memory do not depend on them. Words are single tokens, so that a pair has the
length that is asked for. Nothing is fetched, and both sides read the same files.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.huggingface.adapters import model_bindings
from dpo.huggingface.shapes import read_shape
from dpo.huggingface.text_models import read_config

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""For rehearsals on a CPU."""

LFM2: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 65536,
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "block_auto_adjust_ff_dim": True,
    "block_multiple_of": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "conv_L_cache": 3,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    "tie_word_embeddings": True,
}
"""The shape of LFM2-350M: convolutions, and attention in six of sixteen layers."""

HALF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
"""The sizes of Qwen2.5-0.5B. A directory of its own type gets Qwen2's splitting of words from transformers,
whatever tokenizer is in it."""

_TINY_SIZES = {name: TINY[name] for name in TINY if name.endswith(("size", "heads"))}
TINY_LFM2 = LFM2 | _TINY_SIZES
TINY_QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    **_TINY_SIZES,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Three layers of the delta rule, and one of attention."""
REHEARSED = ("tiny", "tiny-lfm2", "tiny-qwen3.5")
GIVEN = {
    "tiny": TINY,
    "tiny-lfm2": TINY_LFM2,
    "tiny-qwen3.5": TINY_QWEN35,
    "lfm2-350m": LFM2,
    "llama-0.5b": HALF,
}
SHAPES = ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "lfm2-350m", "qwen3.5-0.8b", "llama-0.5b")
"""Of `dpo.huggingface.shapes`, where they are not in `GIVEN`."""

SPECIAL = ("<pad>", "<bos>", "<end>")
ROLES = ("user", "assistant")
NUM_WORDS = 2000
MOST_DRAWN = 4_194_301
"""Numbers that a tensor's weights are repeated from: to draw a billion takes half a minute of the
accelerator's time. A prime, so that no two rows are the same."""

TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)


COUNTED: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "lengths.json").read_text())
"""Tokens of prompt, chosen and rejected response of 256 pairs each: HH-RLHF (helpful, at most 512 tokens) and
UltraFeedback (at most 1,024), counted with SmolLM2's tokenizer and chat template."""


class Lengths(NamedTuple):
    """Tokens of prompts and responses: a log-normal's median and spread (of the logarithm) each."""

    prompt: float
    prompt_spread: float
    response: float
    response_spread: float
    most: int
    """Of a prompt with one response."""


LENGTHS = {
    # Not counted, the data were not to be had. Reckoned from what is public of HelpSteer3 (preference): its
    # 38,459 training rows are 722 MB where each context stands twice and each response three times
    # (davidanugraha/HelpSteer3), 18.8 kB a row. A context of 2.8 kB and responses of 2.0 kB, at 4.1 to 4.4
    # bytes a token as in the tables above, are 660 and 480 tokens on average. How that divides and spreads
    # is a guess.
    "helpsteer3": Lengths(320, 1.2, 415, 0.55, 1024),
    # A prompt and two responses fill a row: one program, no padding. Then long documents.
    "fixed1024": Lengths(512, 0.0, 256, 0.0, 1024),
    "long4096": Lengths(1800, 0.5, 500, 0.5, 4096),
}


def make_inputs(directory: Path, names: tuple[str, ...], *, rows: int) -> None:
    """Models `names` (`tiny` too), and pairs and rankings of every kind of lengths, in `directory`."""
    for name in names:
        if not (directory / name / "tokenizer.json").exists():
            make_model(name, directory / name)
    for name in (*COUNTED, *LENGTHS):
        make_pairs(name, directory / f"{name}.jsonl", rows=rows)
    rankings = directory / "helpsteer3_k4.jsonl"
    make_pairs("helpsteer3", rankings, rows=rows // 2, responses=4)
    with rankings.open() as lines, (directory / "helpsteer3_k4_pairs.jsonl").open("w") as pairs:
        pairs.writelines(json.dumps(pair) + "\n" for line in lines for pair in as_pairs(json.loads(line)))


def make_model(name: str, directory: Path) -> None:
    """A Hugging Face directory with random weights. The tokenizer is written last."""
    write_weights(configuration(name), directory)
    make_tokenizer().save_pretrained(directory)


def write_weights(config: dict[str, Any], directory: Path) -> None:
    """config.json and random bfloat16 weights of a model that has it; norms are 1."""
    directory.mkdir(parents=True, exist_ok=True)
    family, decoder = read_config(config)
    described = config | {"architectures": [family.architecture]}
    (directory / "config.json").write_text(json.dumps(described, indent=1))
    generator = np.random.default_rng(0)
    tensors = {
        name: _random(generator, name, binding.shape)
        for binding in model_bindings(family, decoder)
        for name in binding.names
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configuration(name: str) -> dict[str, Any]:
    """What config.json says of a model, but for its class."""
    given = GIVEN[name] if name in GIVEN else read_shape(f"shape:{name}")
    return given | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces, each one token."""
    words = [*SPECIAL, *ROLES, *(f"w{i}" for i in range(NUM_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    pad, bos, end = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=pad, bos_token=bos, eos_token=end
    )
    fast.chat_template = TEMPLATE
    return fast


def make_pairs(name: str, path: Path, *, rows: int, responses: int = 2, seed: int = 0) -> None:
    """Pairs, or rankings of more `responses`, of the lengths `name`, as JSONL."""
    generator = random.Random(seed)
    with path.open("w") as lines:
        for number in range(rows):
            if name in COUNTED:
                prompt, *sizes = COUNTED[name][number % len(COUNTED[name])]
            else:
                prompt, *sizes = _drawn(generator, LENGTHS[name], responses)
            lines.write(json.dumps(_row(generator, prompt, sizes)) + "\n")


def _drawn(generator: random.Random, lengths: Lengths, responses: int) -> list[int]:
    """Tokens of a prompt, and of responses that fit behind it."""
    prompt = _draw(generator, lengths.prompt, lengths.prompt_spread, lengths.most // 2)
    most = lengths.most - prompt
    sizes = [_draw(generator, lengths.response, lengths.response_spread, most) for _ in range(responses)]
    return [prompt, *sizes]


def _row(generator: random.Random, prompt: int, sizes: list[int]) -> dict[str, Any]:
    """One preference; of the tokens asked for, the template's own are taken off."""
    around_prompt, around_response = 5, 1  # <bos> user … <end> <bos> assistant, and … <end>
    asked = [{"role": "user", "content": _text(generator, prompt - around_prompt)}]
    texts = [_text(generator, size - around_response) for size in sizes]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    if len(answers) == 2:
        return {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}
    return {"prompt": asked, "responses": answers, "ranks": list(range(1, len(answers) + 1))}


def as_pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every (better, worse) pair of a ranking from the best response to the worst, for a peer."""
    pairs = itertools.combinations(row["responses"], 2)
    return [{"prompt": row["prompt"], "chosen": better, "rejected": worse} for better, worse in pairs]


def _draw(generator: random.Random, median: float, spread: float, most: int) -> int:
    return max(8, min(most, round(median * float(np.exp(generator.gauss(0, spread))))))


def _text(generator: random.Random, words: int) -> str:
    return " ".join(f"w{generator.randrange(NUM_WORDS)}" for _ in range(words))


def _random(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    drawn = min(math.prod(shape), MOST_DRAWN)
    return np.resize((0.02 * generator.standard_normal(drawn, np.float32)).astype(ml_dtypes.bfloat16), shape)
