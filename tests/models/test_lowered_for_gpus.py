"""Whole training steps of tiny models, lowered for CUDA: what `model.attention: auto` becomes there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import case_config

from dpo.data.loader import evaluation_loader
from dpo.data.tokenized import make_dataset
from dpo.huggingface.text_models import read_config
from dpo.losses import make_objective
from dpo.models.decoder import Decoder
from dpo.parallel.partition import Partition
from dpo.training.step import init_state, make_train_step

PROMPT, RESPONSE = 70, 41
KERNELS = ("attend_ranges_fwd", "attend_ranges_dq", "attend_ranges_dkv")


def lowered(case: str) -> tuple[str, int]:
    """The text of a case's step in bfloat16, and the length of its row of two prompts."""
    config = read_config(case_config(case))[1]
    model = nnx.eval_shape(
        lambda: Decoder(
            config, rngs=nnx.Rngs(0), compute_dtype=jnp.dtype("bfloat16"), attention="auto", remat="dots"
        )
    )
    graphdef, params = nnx.split(model)
    responses = [[5] * RESPONSE, [6] * (RESPONSE - 3)]
    tokens = make_dataset([[3] * PROMPT, [4] * PROMPT], [responses, responses])
    batch = evaluation_loader(tokens, batch_size=2, layout="shared", long_rows=True).batch(0)
    optimizer = optax.sgd(1.0)
    step = make_train_step(
        graphdef, make_objective({"name": "dpo"}), optimizer=optimizer, beta=0.1, micro_batches=1, chunk=16
    )
    state = jax.eval_shape(lambda params: init_state(params, optimizer), nnx.to_pure_dict(params))
    traced = step.trace(state, {}, batch, {"logps": np.zeros((2, 2), np.float32)})  # type: ignore[attr-defined]
    return traced.lower(lowering_platforms=("cuda",)).as_text(), batch.tokens.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "qwen3_next", "lfm2"])
def test_a_step_calls_the_fused_kernels_and_has_no_array_over_pairs_of_tokens(case, monkeypatch):
    """Plain causal, with windows, with soft-caps too, and beside delta rules and convolutions."""
    monkeypatch.setattr(Partition, "platform", property(lambda _: "gpu"))
    text, length = lowered(case)
    assert [kernel in text for kernel in KERNELS] == [True] * 3
    assert pairs(text, length) == []


@pytest.mark.slow
def test_plain_attention_would_be_seen(monkeypatch):
    monkeypatch.setattr(Partition, "platform", property(lambda _: "unknown"))
    text, length = lowered("llama")
    assert [kernel in text for kernel in KERNELS] == [False] * 3
    assert pairs(text, length) != []


def pairs(text: str, length: int) -> list[str]:
    """Types of arrays that have two dimensions of a row's length, or of what it is padded to, in blocks."""
    assert length > 2 * 64, "the row is longer than a block, and its length no other size of the model"
    padded = range(length, length + 65)
    shapes = set(re.findall(r"tensor<((?:\d+x)+)\w+>", text))
    return [shape for shape in shapes if sum(int(n) in padded for n in shape.split("x")[:-1]) >= 2]
