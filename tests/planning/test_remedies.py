"""What is advised was tried, and is the first of its kind that fits."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from dpo.config import Config, LoraConfig, ModelConfig, TrainingConfig
from dpo.huggingface.shapes import read_shape
from dpo.huggingface.text_models import read_config
from dpo.outcomes import UserError
from dpo.planning import remedies
from dpo.planning.chips import CHIPS, Topology, chip_of, memory_fraction, parse_topology
from dpo.planning.plan import Memory
from dpo.planning.targets import Target
from dpo.training.memory_choices import candidates

GIB = 2**30
DECODER = read_config(read_shape("shape:smollm2-135m"))[1]
TARGET = Target(Topology("h100", (1,)), CHIPS["h100"], [], "plain", "compiled")
HELD = {"float32": 12.0, "bfloat16": 3.0, "int8": 2.0}


@pytest.fixture(name="advice")
def made_up_memory(monkeypatch: pytest.MonkeyPatch):
    """Steps whose memory is a formula of what the weights are held in, and of what is traded."""

    def peak(config: Config) -> float:
        held = HELD[config.lora.base_dtype] if config.lora.is_on else 24.0
        held -= 8 if config.lora.is_on and config.lora.base_dtype == "float32" else 0
        activations = (
            8.0 * {"none": 2, "dots": 1, "full": 0.5}[config.model.remat] / config.training.micro_batches
        )
        return (held + activations + config.model.log_prob_chunk / 1024) * GIB

    tried = []

    def make(config, target, **_):
        tried.append(config)
        return SimpleNamespace(memory=SimpleNamespace(total=peak(config)))

    monkeypatch.setattr(remedies, "make_plan", make)
    monkeypatch.setattr(remedies, "choices_of", lambda config, *_: candidates(config, lambda count: 4096))

    def advise(config: Config, limit: float) -> tuple[list[str], list[Config]]:
        tried.clear()
        held = 12 * GIB if config.lora.is_on else 24 * GIB
        memory = Memory(held / 3, 2 * held / 3, 0.0, 0.0, 0.0, 0.0, limit * GIB)
        models = {"decoder": DECODER, "lengths": lambda *_: None}
        found = list(remedies.find_remedies(config, memory, TARGET, **models, log=lambda _: None))
        for line in found:  # every sentence has the figure of a step that was compiled
            assert any(f" {peak(config) / GIB:.2f} of " in line for config in tried)
        return found, list(tried)

    return advise


def settings(**training) -> Config:
    return Config(model=ModelConfig(remat="dots"), training=TrainingConfig(batch_size=8, **training))


def test_what_costs_nothing_but_time_comes_first(advice) -> None:
    found, _ = advice(settings(), limit=28)
    assert found[0].startswith("--training.micro_batches=2") or "--model.remat=full" in found[0]
    assert "27.00 of 28.00 GiB; the same results" in found[0]
    assert found[1].startswith("--lora.rank=16: 13.00 of 28.00")
    assert found[2].startswith("--lora.rank=16 --lora.base_dtype=bfloat16")
    assert found[3].startswith("--lora.rank=16 --lora.base_dtype=int8")


def test_where_the_state_alone_is_too_large_nothing_is_traded_for_activations(advice) -> None:
    found, tried = advice(settings(), limit=4)
    assert all(config.lora.is_on for config in tried)
    assert [line.split(" --model")[0] for line in found] == [
        "--lora.rank=16 --lora.base_dtype=bfloat16",
        "--lora.rank=16 --lora.base_dtype=int8",
    ]


def test_what_a_memory_limit_has_tried_is_not_advised_again(advice) -> None:
    found, tried = advice(settings(memory_limit=24.5), limit=24.5)
    assert found[0].startswith("--lora.rank=16")
    assert all(config.lora.is_on for config in tried)


def test_adapters_that_are_there_are_held_in_less(advice) -> None:
    adapted = dataclasses.replace(settings(), lora=LoraConfig(rank=4, base_dtype="bfloat16"))
    found, tried = advice(adapted, limit=4)
    assert [line.split(":")[0] for line in found][-1].startswith("--lora.base_dtype=int8")
    assert {config.lora.rank for config in tried} == {4}


def test_nothing_is_advised_where_nothing_fits(advice) -> None:
    assert advice(settings(), limit=0.5)[0] == []


def test_a_gpu_gives_what_jax_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert memory_fraction(CHIPS["rtx4090"]) == 0.75
    assert memory_fraction(CHIPS["v5e"]) == 1
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert memory_fraction(CHIPS["h100"]) == 0.9
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="MEM_FRACTION is 'most'; allowed"):
        memory_fraction(CHIPS["h100"])


def test_any_gpu_is_planned_by_its_memory() -> None:
    topology = parse_topology("gpu:2", 24.0)
    assert chip_of(topology, 24.0).memory == 24 * GIB
    assert chip_of(parse_topology("h100:1", 40.0), 40.0).memory == 40 * GIB
    assert chip_of(parse_topology("h100:1"), None) == CHIPS["h100"]
    with pytest.raises(UserError, match="memory is not given; allowed: both"):
        parse_topology("gpu:1")
    with pytest.raises(UserError, match=r"training\.memory_limit for this machine"):
        parse_topology("cpu:1", 8.0)
