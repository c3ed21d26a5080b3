"""Shapes that plans are made of have the sizes that their publishers state."""

import pytest
from flax import nnx

from dpo.huggingface.shapes import read_shape
from dpo.huggingface.text_models import read_config
from dpo.models.decoder import Decoder

PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    "smollm3-3b": 3_075_098_624,
    "phi-4-mini": 3_836_021_760,
    "ernie-4.5-0.3b": 360_748_032,
    "granite-4.0-micro": 3_402_836_480,
    "olmo-3-7b": 7_298_011_136,
    "nanochat-d20": 560_988_160,
    "seed-oss-36b": 36_151_104_512,
    "apertus-8b": 8_053_338_176,
    "qwen3.5-0.8b": 752_393_024,
    "lfm3-1.7b": 1_728_801_536,
    "gemma-4-31b": 30_697_345_280,
    "gemma-4-e2b": 4_628_569_344,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_its_models_parameters(name):
    _, config = read_config(read_shape(f"shape:{name}"))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))) == PARAMETERS[name]
