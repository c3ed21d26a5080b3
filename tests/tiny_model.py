"""A random small Llama on disk, for tests that run whole commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.huggingface.saving import save_pretrained
from dpo.huggingface.text_models import read_config
from dpo.models.classifier import SequenceClassifier
from dpo.models.decoder import Decoder

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_tiny_model(directory: Path, *, seed: int = 0) -> Path:
    """Weights, config and tokenizer; every byte is a token, <s> begins and </s> ends a message (and pads)."""
    tokenizer = byte_tokenizer()
    hf_config = tiny_config(tokenizer)
    _, config = read_config(json.loads(json.dumps(hf_config)))
    model = Decoder(config, rngs=nnx.Rngs(seed), compute_dtype=jnp.dtype("float32"))
    return save_pretrained(model, directory / "model", hf_config=hf_config, tokenizer=tokenizer)


def write_tiny_reward_model(directory: Path, *, seed: int = 0, num_labels: int = 1) -> Path:
    """The same sizes with a head for sequence classification."""
    tokenizer = byte_tokenizer()
    labels = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    hf_config = tiny_config(tokenizer) | {"id2label": labels}
    _, config = read_config(json.loads(json.dumps(hf_config)))
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    model = SequenceClassifier(config, num_labels=num_labels, pad_token_id=pad, rngs=nnx.Rngs(seed))
    return save_pretrained(model, directory / "reward", hf_config=hf_config, tokenizer=tokenizer)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A Llama that is quick to compile."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text has ids and nothing merges over a border."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, "<s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
