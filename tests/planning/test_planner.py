"""Plans: what a step needs on devices that need not be there."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpo.cli import main
from dpo.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, TrainingConfig
from dpo.huggingface.shapes import read_shape
from dpo.huggingface.text_models import read_config
from dpo.losses import make_objective
from dpo.parallel.sharding import make_mesh
from dpo.planning import planner, search, targets, tracing
from dpo.planning.advice import advise
from dpo.planning.chips import CHIPS, Topology, parse_topology
from dpo.planning.plan import Memory
from dpo.planning.plan_text import plan_as_numbers, plan_as_text
from dpo.planning.planner import make_plan
from dpo.planning.roofline import Times, Work, count_flops, forward_flops
from dpo.planning.search import candidate_meshes, make_plan_within_limit
from dpo.planning.targets import Target, attention_on, open_target
from dpo.planning.tracing import trace_step
from dpo.planning.workloads import assumed_lengths, choose_lengths, read_decoder

SMALL_CONFIG = (
    read_shape("shape:smollm2-135m")
    | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
)
SMALL = read_config(SMALL_CONFIG)[1]
LENGTHS = assumed_lengths(prompt=20, response=10, responses=2)


def settings(**mesh):
    return Config(
        model=ModelConfig(log_prob_chunk=32, remat="full"),
        training=TrainingConfig(batch_size=16),
        mesh=MeshConfig(**mesh),
    )


def target(kind="h100", num_devices=8, memory=None):
    chip = CHIPS[kind] if memory is None else CHIPS[kind]._replace(memory=memory)
    return Target(Topology(kind, (num_devices,)), chip, jax.devices()[:num_devices], "plain", "compiled")


@pytest.fixture(scope="module")
def plan():
    return make_plan(settings(data=1, fsdp=8), target(), decoder=SMALL, lengths=LENGTHS)


def test_parameters_and_optimizer_are_split_over_fsdp(plan):
    """AdamW keeps two numbers a parameter; norms and counters are not split."""
    config, D = SMALL, SMALL.hidden_size
    kernels = 2 * D * 64 + 2 * D * 32 + 3 * D * 96
    split = (config.num_layers * kernels + config.vocab_size * D) / 8
    whole = (2 * config.num_layers + 1) * D
    assert plan.memory.parameters == 4 * (split + whole)
    assert plan.memory.optimizer == pytest.approx(2 * plan.memory.parameters, rel=1e-2)


def test_the_arithmetic_is_that_of_forward_backward_and_rematerialisation(plan):
    """Four forward passes over all positions, of attention too, which `plain` computes for all pairs."""
    R, T, N = plan.workload.shape
    everything = Work(tokens=R * T, sequence_tokens=0, visible=R * T * T, scored=R * N)
    expected = 4 * sum(forward_flops(SMALL, everything))
    assert plan.flops == pytest.approx(expected, rel=0.1)
    assert plan.useful_flops < plan.flops


def test_a_layer_is_gathered_forward_and_backward(plan):
    """Every kernel's all-gather happens a layer at a time, at least once in each pass."""
    assert plan.program is not None
    gathered = sum(c.count for c in plan.program.collectives if c.kind == "all-gather" and c.group == 8)
    assert gathered >= 2 * SMALL.num_layers * 7
    largest = max(c.size for c in plan.program.collectives if c.kind == "all-gather")
    assert largest < 4 * SMALL.vocab_size * SMALL.hidden_size


@pytest.mark.as_users
def test_one_device_communicates_nothing():
    plan = make_plan(settings(), target(num_devices=1), decoder=SMALL, lengths=LENGTHS)
    assert plan.program is not None
    assert plan.program.collectives == []
    assert plan.times is not None
    assert plan.times.hidden == plan.times.exposed


def test_attention_of_a_gpu_that_is_stood_in_for_is_one_that_it_has():
    """With ALiBi the settings' own: the loop over tiles that stands for `ranges` has no bias of keys."""
    here = open_target(parse_topology("h100:1"))
    assert attention_on(here, "auto", has_key_bias=False) == "blocked"
    assert attention_on(here, "auto", has_key_bias=True) == "auto"
    with pytest.raises(ValueError, match="attention splash needs a tpu and h100:1 is a gpu"):
        attention_on(here, "splash", has_key_bias=False)


def test_what_does_not_fit_says_by_how_much_and_what_to_change(plan):
    memory = plan.memory._replace(limit=plan.memory.total / 2, parameters=plan.memory.total)
    result = plan._replace(memory=memory, fits=False, mesh={"data": 4, "fsdp": 2, "tensor": 1})
    result = result._replace(advice=list(advise(settings(), result, SMALL)))
    text = plan_as_text(result, target(), compute_dtype="float32")
    assert "does not fit" in text
    assert "GiB too much" in text
    for what in ("mesh.fsdp 8 instead of 2", "model.compute_dtype bfloat16", "a larger topology: 4 times"):
        assert what in text


def test_where_communication_takes_longest_smaller_groups_are_named(plan):
    """256 devices instead of 8: in groups of 16 each holds 16 times as much of the state."""
    waits = plan._replace(mesh={"data": 1, "fsdp": 256, "tensor": 1}, times=Times(1.0, 2.0, 3.0))
    more = 15 * (plan.memory.parameters + plan.memory.optimizer)
    [advice] = advise(settings(), waits, SMALL)
    assert advice.startswith("mesh.data 16, mesh.fsdp 16: communication takes longest")
    assert advice.endswith(f"{more / 2**30:.2f} GiB more")
    for other in (
        {"times": Times(1.0, 3.0, 2.0)},
        {"mesh": {"data": 16, "fsdp": 16, "tensor": 1}},
        {"memory": plan.memory._replace(limit=plan.memory.total + more / 2)},
    ):
        assert list(advise(settings(), waits._replace(**other), SMALL)) == []


def test_of_a_gpu_without_figures_what_travels_is_said_and_no_time(plan):
    text = plan_as_text(plan._replace(times=None), target(), compute_dtype="float32")
    assert "how long a step takes is not known" in text
    assert "largest all-gather " in text
    assert " ms" not in text


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded by", 22.0),
        ("the total memory required for HLO temporaries (23.39G) exceeds available HBM (15.75G).", 23.39),
    ],
)
def test_the_compiler_s_refusal_says_what_temporaries_need(message, gib):
    found = planner._refused_temporaries(message, arguments=1.5 * 2**30)
    assert found == pytest.approx(gib * 2**30)
    assert planner._refused_temporaries("INTERNAL: something else", arguments=1.0) is None


def test_text_and_numbers_name_everything(plan):
    text = plan_as_text(plan, target(), compute_dtype="float32")
    for word in (
        "parameters",
        "optimizer",
        "temporaries",
        "expected peak",
        "limit",
        "TFLOP",
        "largest all-gather",
        "parameters made whole none",
        "logits travel         not told by shapes",  # 512 tokens in 8 parts are 64, the hidden states' length
        "tokens/s",
        "MFU",
    ):
        assert word in text
    numbers: Any = plan_as_numbers(plan, target())
    assert numbers["seconds"]["hidden"] <= numbers["seconds"]["exposed"]
    assert numbers["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert numbers["travel"]["parameters"] == []


def test_candidates_fill_the_devices_and_divide_the_heads():
    meshes = list(candidate_meshes(16, SMALL))
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 16 for mesh in meshes)
    assert {mesh.tensor for mesh in meshes} == {1, 2}
    assert MeshConfig(1, 16, 1) in meshes
    assert MeshConfig(16, 1, 1) in meshes
    assert list(candidate_meshes(1, SMALL)) == [MeshConfig(1, 1, 1)]


def test_rows_are_a_multiple_of_the_devices_that_they_are_split_over():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
    workload = LENGTHS(settings(), mesh, "cpu")
    assert workload.shape.rows % 8 == 0
    assert workload.work.tokens == 16 * 40
    assert workload.work.sequence_tokens == 16 * 60
    assert workload.work.visible == 16 * (20 * 21 / 2 + 2 * (10 * 20 + 10 * 11 / 2))


def test_a_loop_s_products_count_every_time():
    def program(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    jaxpr = jax.make_jaxpr(program)(np.zeros((4, 4), np.float32))
    assert count_flops(jaxpr) == 5 * 2 * 4**3


def test_lengths_are_both_given_or_neither():
    with pytest.raises(ValueError, match="prompt_tokens is 5 and response_tokens is None"):
        choose_lengths(Config(), prompt=5, response=None, responses=2)
    shape = dataclasses.replace(Config(), model=ModelConfig(source="shape:qwen3-0.6b"))
    with pytest.raises(ValueError, match="both are needed for a model that is a shape"):
        choose_lengths(shape, prompt=None, response=None, responses=2)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smollm2-135m", 134.5), ("smollm2-360m", 361.8), ("smollm2-1.7b", 1711.4), ("qwen3-0.6b", 596.0),
        ("qwen3-1.7b", 1720.6), ("qwen3-8b", 8190.7), ("llama-3.2-1b", 1235.8), ("llama-3.1-8b", 8030.3),
    ],
)  # fmt: skip
def test_known_shapes_have_the_published_number_of_parameters(name, millions):
    from flax import nnx

    from dpo.models.decoder import Decoder

    decoder = read_decoder(f"shape:{name}")
    abstract = nnx.eval_shape(lambda: Decoder(decoder, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_an_unknown_shape_names_the_known():
    with pytest.raises(ValueError, match=r"'shape:my-own' is no known shape; allowed are shape:smollm2-135m"):
        read_shape("shape:my-own")
    with pytest.raises(ValueError, match=r"no known shape; did you mean shape:qwen3-0.6b\? allowed are"):
        read_shape("shape:qwen3-0.6")


def test_a_misspelt_shape_is_said_before_other_settings_are_asked_for(monkeypatch, capsys):
    """Not that lengths are not given, nor that the default data are not there."""
    monkeypatch.setattr("dpo.commands.plan.prepare_compiler", lambda _: None)
    assert main(["plan", "--model.source=shape:qwen3-0.6", "--memory=24", "--data.train=none.jsonl"]) == 2
    assert "error: 'shape:qwen3-0.6' is no known shape" in capsys.readouterr().err


def test_what_an_objective_adds_to_the_data_is_planned(tmp_path, tiny_model_dir):
    """KTO scores another prompt's response beside each prompt's own."""
    rows = [{"prompt": f"p{i}", "completion": "yes", "label": bool(i % 2)} for i in range(8)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(source=str(tiny_model_dir)),
        data=DataConfig(train=str(path)),
        objective={"name": "kto"},
        training=TrainingConfig(batch_size=4),
    )
    lengths = choose_lengths(config, prompt=None, response=None, responses=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert lengths(config, mesh, "cpu").responses == 2


def test_a_tpu_without_its_compiler_says_how_to_install_it(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", missing)
    with pytest.raises(
        ValueError, match=r"needs the TPU's compiler.*pip install --no-deps --target .*libtpu"
    ):
        open_target(parse_topology("v5e:4x4"))


def test_too_few_devices_to_stand_for_others_is_said():
    with pytest.raises(
        ValueError, match=r"h100:9999 needs 9999 CPU devices and there are \d+; set XLA_FLAGS"
    ):
        open_target(parse_topology("h100:9999"))


def test_more_gpus_than_a_host_has_are_said_to_be_counted_as_in_one(monkeypatch):
    monkeypatch.setattr(targets.jax, "devices", lambda _: list(range(16)))
    assert "between hosts of 8 is not counted" in open_target(parse_topology("h100:16")).compiler
    assert "hosts" not in open_target(parse_topology("h100:8")).compiler


def test_a_checkpoint_s_copy_counts_beside_the_step_only_where_steps_go_on():
    memory = Memory(
        parameters=4.0, optimizer=8.0, batch=0.5, temporaries=5.5, process=1.0, checkpoint=12.0, limit=30.0
    )
    assert memory.total == 4 + 8 + 1 + 12
    assert memory._replace(saves_between_steps=True).total == 4 + 8 + 1 + 12 + 6
    assert memory._replace(checkpoint=3.0).total == 4 + 8 + 1 + 6


def test_a_plan_within_a_limit_is_of_the_first_choice_that_fits(plan, monkeypatch):
    """The plan's temporaries here are a gigabyte and a half, halved with each micro-batch."""
    asked = []

    def make(config, target, **_):
        choice = config.model.remat, config.training.micro_batches
        asked.append(choice)
        memory = plan.memory._replace(temporaries=1.5 * 2**30 / choice[1], limit=0.5 * 2**30)
        return plan._replace(memory=memory, fits=memory.free >= 0)

    monkeypatch.setattr(search, "make_plan", make)
    limited = dataclasses.replace(settings(), training=TrainingConfig(batch_size=16, memory_limit=0.5))
    said = []
    found = make_plan_within_limit(limited, target(), decoder=SMALL, lengths=LENGTHS, log=said.append)
    assert asked == [("full", 1), ("full", 2), ("full", 4)]
    assert found.fits
    assert said[0].startswith(
        "training.memory_limit: remat full, 1 micro-batch, 32 scored tokens at a time: 1.5"
    )


def test_adapters_are_planned_as_adapters(monkeypatch):
    """The model is there without moments, and three numbers are kept for each of the adapters'."""
    monkeypatch.setattr(tracing, "read_hf_config", lambda source: SMALL_CONFIG)
    adapted = dataclasses.replace(settings(), lora=LoraConfig(rank=2, base_dtype="bfloat16"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    parts = [
        trace_step(
            config,
            make_objective({"name": "dpo"}),
            SMALL,
            beta=0.1,
            mesh=mesh,
            workload=LENGTHS(config, mesh, "cpu"),
            target=target(num_devices=1),
        )[1]
        for config in (settings(), adapted)
    ]
    assert parts[1].parameters == pytest.approx(parts[0].parameters / 2, rel=0.2)
    assert parts[1].optimizer < 0.2 * parts[0].optimizer


@pytest.mark.slow
def test_a_tpu_slice_is_compiled_for(tmp_path):
    """Qwen3-0.6B on 16 chips: it fits, no parameter is gathered whole, no logits travel."""
    import subprocess
    import sys

    from dpo.huggingface.embedded import cache_directory

    library = Path(os.environ.get("TPU_LIBRARY_PATH", cache_directory() / "libtpu" / "libtpu" / "libtpu.so"))
    if not library.is_file():
        pytest.skip(f"{library} is not there (see dpo plan --topology v5e:4x4)")
    config = Path(__file__).parents[2] / "configs" / "scaling.yaml"
    command = [sys.executable, "-m", "dpo", "plan", str(config), "--topology", "v5e:4x4"]
    options = ["--model.source=shape:qwen3-0.6b", "--prompt_tokens=130", "--response_tokens=44"]
    output = tmp_path / "plan.json"
    subprocess.run(
        [*command, *options, "--training.batch_size=256", "--output", str(output)],
        env={**os.environ, "TPU_LIBRARY_PATH": str(library)},
        check=True,
    )
    plan = json.loads(output.read_text())
    assert plan["fits"]
    assert plan["travel"]["largest_gather"]["size"] < 151936 * 1024 * 2 / 2
    assert plan["travel"]["parameters"] == []
    assert plan["travel"]["logits"] == []
