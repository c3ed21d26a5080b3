"""What of the settings is allowed and seldom meant is said at the start."""

import json
from pathlib import Path

import pytest
import safetensors.numpy

from dpo.config import Config, LoraConfig, ModelConfig, OptimizerConfig
from dpo.huggingface.adapter_files import AdapterDirectory
from dpo.training.announce import _advice


@pytest.mark.parametrize(
    ("lora", "rate", "said"),
    [
        (LoraConfig(rank=4), OptimizerConfig().learning_rate, True),
        (LoraConfig(rank=4), 1e-4, False),
        (LoraConfig(), OptimizerConfig().learning_rate, False),
    ],
)
def test_adapters_at_the_rate_for_all_weights_are_remarked_on(lora, rate, said):
    lines = _advice(Config(lora=lora, optimizer=OptimizerConfig(learning_rate=rate)))
    assert len(lines) == said
    assert all(line.startswith("learning rate: ") and "ten times" in line for line in lines)


@pytest.mark.parametrize(
    ("base", "source", "said"),
    [
        ("owner/one", "owner/one", None),
        ("owner/one", "owner/two", "was trained on owner/one, and model.source is owner/two"),
        (None, "owner/one", "says of no model"),
        ("HERE", "HERE/../model", None),
        ("HERE", "owner/one", "and model.source is owner/one"),
    ],
)
def test_adapters_of_another_base_are_remarked_on(base, source, said, tmp_path: Path, monkeypatch):
    here = tmp_path / "model"
    here.mkdir()
    monkeypatch.setattr(AdapterDirectory, "_find_modules", lambda self: ())
    safetensors.numpy.save_file({}, tmp_path / "adapter_model.safetensors")
    base, source = (text and text.replace("HERE", str(here)) for text in (base, source))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    config = Config(
        model=ModelConfig(source=source),
        lora=LoraConfig(init=str(tmp_path)),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    lines = _advice(config)
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines)
