"""Writes a hybrid of SmolLM2-135M's size with random weights and SmolLM2's tokenizer: hybrid_model DIRECTORY.

    python -m benchmarks.hybrid_model .cache/hybrid
    python -m benchmarks --source .cache/hybrid --only dpo_float32,dpo_packed,dpo_padded,trl_float32
    python -m benchmarks.growth --source .cache/hybrid

Three layers of Qwen3.5's delta rule stand to one of attention, with SmolLM2's widths, depth and heads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.accelerator_inputs import write_weights
from dpo.huggingface.pretrained import load_pretrained
from dpo.huggingface.shapes import read_shape

ATTENTION_EVERY = 4
"""Layers: the last of so many is attention."""

CONVOLUTION_WIDTH = 4
"""Tokens that a convolution sees, as in Qwen3.5."""


def configuration() -> dict[str, Any]:
    """What config.json says: SmolLM2's sizes under Qwen3.5's type."""
    smollm2 = read_shape("shape:smollm2-135m")
    heads, width = smollm2["num_attention_heads"], smollm2["head_dim"]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps")
    return {name: smollm2[name] for name in kept} | {
        "model_type": "qwen3_5_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "full_attention_interval": ATTENTION_EVERY,
        "linear_conv_kernel_dim": CONVOLUTION_WIDTH,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "tie_word_embeddings": True,
    }


def main() -> None:
    (target,) = sys.argv[1:]
    directory = Path(target)
    tokenizer = load_pretrained("embedded:smollm2-135m-instruct").tokenizer
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_weights(configuration() | ends, directory)
    tokenizer.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    # transformers takes Qwen2's tokenizer for this type of model where the file names no class of its own.
    settings.write_text(
        json.dumps(
            json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1
        )
    )


if __name__ == "__main__":
    main()
