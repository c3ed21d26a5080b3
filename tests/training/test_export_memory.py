"""An export takes the memory of the model that it writes: no optimiser, no base weights, no second copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16384}
"""About 120 million parameters."""

PREPARE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp
from flax import nnx
from tiny_model import byte_tokenizer, tiny_config
from dpo.config import Config, DataConfig, ModelConfig
from dpo.huggingface.saving import save_pretrained
from dpo.huggingface.text_models import read_config
from dpo.models.decoder import Decoder
from dpo.training.checkpoint import Checkpoints
from dpo.training.optimizer import make_optimizer, make_schedule
from dpo.training.step import init_state

run, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
tokenizer = byte_tokenizer()
hf_config = tiny_config(tokenizer) | sizes
model = Decoder(read_config(hf_config)[1], rngs=nnx.Rngs(0), compute_dtype=jnp.dtype("float32"))
save_pretrained(model, run / "source", hf_config=hf_config, tokenizer=tokenizer)
params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
config = Config()
optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1))
with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(3, init_state(params, optimizer, moving=False), {})
print(sum(leaf.size for leaf in jax.tree.leaves(params)))
"""

MEASURE = """
import sys
from pathlib import Path
from dpo.config import Config, DataConfig, ExportConfig, ModelConfig
from dpo.training.export import export_checkpoint

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

def export(run):
    config = Config(model=ModelConfig(source=f"{run}/source"), data=DataConfig(train="x.jsonl"))
    export_checkpoint(ExportConfig(run=run, output=f"{run}/export"), config)

run, small = sys.argv[1:]
export(small)  # what is loaded and compiled for any export
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
export(run)
print(memory("VmHWM") - before)
"""


@pytest.mark.ci
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_an_export_takes_at_most_1_3_times_the_model(tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def run(program: str, *given: str | Path) -> int:
        command = [sys.executable, "-c", program, *map(str, given)]
        root = Path(__file__).parents[2]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
        assert result.returncode == 0, result.stderr[-3000:]
        return int(result.stdout.splitlines()[-1])

    run(PREPARE, tmp_path / "small", json.dumps({}))
    size = 4 * run(PREPARE, tmp_path / "large", json.dumps(SIZES))
    ratio = run(MEASURE, tmp_path / "large", tmp_path / "small") / size
    print(f"the peak grows by {ratio:.2f} of {size / 1e6:.0f} MB")
    assert 0.9 < ratio <= 1.3
