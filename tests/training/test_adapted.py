"""Runs that train adapters: what is trained, what it is measured against, what comes out."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file
from stopping import stop_after
from tiny_model import byte_tokenizer, write_tiny_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dpo.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    heldout_settings,
    starting_source,
)
from dpo.evaluation import heldout
from dpo.evaluation.heldout import load_heldout, score_heldout
from dpo.files import write_checksums
from dpo.huggingface.licences import read_front_matter
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.judging.samples import model_identity
from dpo.parallel.sharding import make_mesh
from dpo.runs import model_of
from dpo.training import export, preparation
from dpo.training.adapted import open_policy, policy_to_write
from dpo.training.checkpoint import Checkpoints
from dpo.training.export import export_checkpoint
from dpo.training.loop import train
from dpo.training.optimizer import make_optimizer
from dpo.training.policy import load_policy
from dpo.training.step import init_state

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KINDS = [
    pytest.param(LoraConfig(rank=4, use_dora=True, base_dtype="int8"), id="dora, int8"),
    pytest.param(
        LoraConfig(rank=4, use_rslora=True, base_dtype="bfloat16"),
        id="rslora, bfloat16",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Runs use one device, although tests see eight."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((preparation, "make_mesh"), (heldout, "own_mesh")):
            patch.setattr(module, name, lambda config: mesh())
        yield


def mesh():
    return make_mesh(Config().mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_dir):
    """Six steps of four pairs; plain attention is the quickest to trace."""
    directory = tmp_path_factory.mktemp("adapted")
    train_file, eval_file = directory / "train.jsonl", directory / "eval.jsonl"
    for path, num_rows in ((train_file, 12), (eval_file, 5)):
        rows = [
            {"prompt": f"{path.stem} number {i}", "chosen": "yes, very good", "rejected": "no"}
            for i in range(num_rows)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        run_dir=str(directory / "run"),
        model=ModelConfig(
            source=str(tiny_model_dir), reference_store=str(directory / "reference"), attention="plain"
        ),
        lora=LoraConfig(rank=4),
        data=DataConfig(train=str(train_file), eval=str(eval_file), max_length=128),
        objective={"name": "dpo", "beta": 0.5},
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.2, schedule="constant"),
        training=TrainingConfig(batch_size=4, steps=6, save_every=3),
    )


@pytest.fixture(scope="module")
def finished(config):
    """The configuration of a run that is finished."""
    assert train(config).status == "finished"
    return config


def replace(config, **sections):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in sections.items()
        },
    )


def lines(config):
    """Metric lines without what the clock decides."""
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s")} for row in rows]


def adapters(config):
    return load_file(f"{config.run_dir}/adapter/adapter_model.safetensors")


def check_run(config):
    """It starts at ln 2 and learns, and `dpo evaluate --run` finds what the run itself measured."""
    losses = [row["loss"] for row in lines(config) if "loss" in row]
    assert_allclose(losses[0], np.log(2), rtol=1e-6)
    assert losses[-1] < losses[2] < losses[0]
    kept = load_heldout(config.run_dir, config).rows
    scored = score_heldout(heldout_settings(EvaluateConfig(run=config.run_dir), config), log=print).rows
    assert (kept.policy[:, 0] - kept.reference[:, 0] > kept.policy[:, 1] - kept.reference[:, 1]).all()
    assert_allclose(scored.policy, kept.policy, rtol=1e-4)
    assert_allclose(scored.reference, kept.reference, rtol=1e-6)


def check_export(config, output):
    """The last checkpoint on weights read from their files is what the run merged on its devices."""
    path, _ = export_checkpoint(ExportConfig(run=config.run_dir, output=str(output)), config)
    own = Path(config.run_dir) / "export"
    assert (path / "model.safetensors").read_bytes() == (own / "model.safetensors").read_bytes()


def test_a_run_learns_and_its_merged_export_is_the_policy(finished):
    check_run(finished)


@pytest.mark.parametrize(
    "lora", [pytest.param(*KINDS[0].values, id="dora, int8", marks=pytest.mark.ci), KINDS[1]]
)
def test_other_kinds_and_smaller_bases_do_too(config, lora, tmp_path):
    config = replace(config, run_dir=str(tmp_path), lora=lora)
    train(config)
    check_run(config)
    check_export(config, tmp_path / "again")


def test_only_adapters_are_trained_and_saved(finished):
    policy = open_policy(finished, mesh())
    optimizer = make_optimizer(finished.optimizer, lambda step: 0.1)
    start = jax.jit(lambda params: init_state(params, optimizer))(policy.params)
    with Checkpoints(Path(finished.run_dir) / "checkpoints", keep=1, read_only=True) as checkpoints:
        state = checkpoints.restore(6, start)  # which refuses other trees
    arrays = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    names = {jax.tree_util.keystr(path).rpartition("['")[2] for path, leaf in arrays if leaf.ndim}
    assert names == {"lora_a']", "lora_b']"}


def test_the_reference_is_the_frozen_model_on_the_same_arrays(config):
    policy, whole = open_policy(config, mesh()), load_policy(config.model, mesh())
    assert policy.base is not None
    assert policy.base.fingerprint == whole.fingerprint != policy.fingerprint
    frozen = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(policy.frozen)}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(policy.base.params)} <= frozen


@pytest.mark.ci
def test_an_interrupted_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    config = replace(finished, run_dir=str(tmp_path))
    stop_after(2, monkeypatch)
    assert train(config).status == "interrupted"
    assert train(config).status == "finished"
    assert lines(config) == lines(finished)
    for name, array in adapters(finished).items():
        assert_array_equal(adapters(config)[name], array, err_msg=name)


@pytest.mark.ci
def test_micro_batches_train_alike_and_adapters_alone_are_the_policy(finished, tmp_path):
    """Four prompts a step against two parts of two, of a run that leaves no merged model."""
    alone = {"rank": 4, "merged": False}
    other = replace(finished, run_dir=str(tmp_path), training={"micro_batches": 2}, lora=alone)
    summary = train(other).summary
    assert not (tmp_path / "export").exists()
    assert summary["export"] == model_of(str(tmp_path)) == str(tmp_path / "adapter")
    check_run(other)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert read_front_matter(tmp_path / "adapter" / "README.md")["library_name"] == "peft"
    for part in (
        "LoRA adapters of rank 4 (3,712 parameters",
        "PeftModel.from_pretrained",
        "| reference | the base model |",
    ):
        assert part in card, part
    assert "(`rewards/accuracies`)" in card
    for ours, theirs in zip(lines(finished), lines(other), strict=True):
        for name in {"loss", "grad_norm", "logps/chosen"} & ours.keys():
            assert_allclose(theirs[name], ours[name], rtol=1e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("lora", KINDS)
def test_meshes_train_alike(config, lora, tmp_path, monkeypatch):
    """data, fsdp and tensor of two each against one device."""
    config = replace(config, run_dir=str(tmp_path / "one"), lora=lora, model={"attention": "auto"})
    train(config)
    monkeypatch.setattr(preparation, "make_mesh", make_mesh)
    other = replace(config, run_dir=str(tmp_path / "eight"), mesh={"data": 2, "fsdp": 2, "tensor": 2})
    train(other)
    for ours, theirs in zip(lines(config), lines(other), strict=True):
        for name in ours.keys() - {"fill", "rewards/accuracies"}:  # the first δ are 0 up to rounding
            assert_allclose(theirs[name], ours[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.ci
def test_a_run_may_start_from_an_adapter_and_be_measured_against_it(finished, tmp_path):
    start = f"{finished.run_dir}/adapter"
    one_step = replace(finished, lora=LoraConfig(init=start), training={"steps": 1}, data={"eval": None})
    against_itself = replace(one_step, run_dir=str(tmp_path / "itself"))
    train(against_itself)
    assert_allclose(lines(against_itself)[0]["loss"], np.log(2), rtol=1e-5)
    base = {"reference": finished.model.source}
    against_base = replace(one_step, run_dir=str(tmp_path / "base"), model=base)
    train(against_base)
    assert lines(against_base)[0]["rewards/margins"] > 0.01  # without adapters it is another model


@pytest.mark.ci
def test_a_start_on_a_small_base_is_evaluated_as_it_was_held(finished, tmp_path):
    """Merged into its base and rounded with it, the adapter would be another reference."""
    start = LoraConfig(init=f"{finished.run_dir}/adapter", base_dtype="int8")
    config = replace(finished, run_dir=str(tmp_path / "run"), lora=start, training={"steps": 1})
    train(config)
    kept = load_heldout(config.run_dir, config).rows
    scored = score_heldout(heldout_settings(EvaluateConfig(run=config.run_dir), config), log=print).rows
    assert_allclose(scored.policy, kept.policy, rtol=1e-5)
    assert_allclose(scored.reference, kept.reference, rtol=1e-5)


def test_adapters_of_a_run_are_opened_on_its_own_model_whatever_base_they_name(finished, tmp_path):
    """Those that it starts with, and those that it leaves alone: their base may be another, or not here."""
    moved = tmp_path / "moved"
    shutil.copytree(f"{finished.run_dir}/adapter", moved)
    (moved / "SHA256SUMS").unlink()
    said = json.loads((moved / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = str(write_tiny_model(tmp_path, seed=1))
    (moved / "adapter_config.json").write_text(json.dumps(said))
    source = finished.model.source
    starts = replace(finished, lora=LoraConfig(init=str(moved)))
    alone = replace(finished, run_dir=str(tmp_path), lora=LoraConfig(rank=2, merged=False))
    (tmp_path / "adapter").symlink_to(moved)
    for name in (
        heldout_settings(EvaluateConfig(run=finished.run_dir), starts).model.reference,
        heldout_settings(EvaluateConfig(run=str(tmp_path)), alone).model.source,
    ):
        assert name is not None
        found, expected, other = (
            load_policy(finished.model, mesh(), source=one).fingerprint
            for one in (name, f"{finished.run_dir}/adapter", str(moved))
        )
        assert found == expected != other
        assert model_identity(name) != model_identity(str(moved))
        assert load_tokenizer(name).get_vocab() == load_tokenizer(source).get_vocab()


def test_a_start_from_an_adapter_talks_as_that_was_trained(finished, tmp_path):
    """With the template beside it: in training, in what is written, and in its reference."""
    start = tmp_path / "start"
    shutil.copytree(f"{finished.run_dir}/adapter", start)
    (start / "SHA256SUMS").unlink()
    tokenizer = load_tokenizer(finished.model.source)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(start)
    config = replace(finished, lora=LoraConfig(init=str(start)))
    policies = open_policy(config, mesh()), policy_to_write(config)
    reference = heldout_settings(EvaluateConfig(run=finished.run_dir), config).model.reference
    assert reference is not None
    assert reference == starting_source(config)
    for found in (*(one.pretrained.tokenizer for one in policies), load_tokenizer(reference)):
        assert found.chat_template == tokenizer.chat_template


def test_the_adapters_of_any_checkpoint_are_exported(finished, tmp_path):
    given = ExportConfig(run=finished.run_dir, output=str(tmp_path / "out"), format="adapter", step=3)
    path, step = export_checkpoint(given, finished)
    early, late = load_file(path / "adapter_model.safetensors"), adapters(finished)
    assert step == 3
    assert early.keys() == late.keys()
    assert any((early[name] != late[name]).any() for name in late)
    path, _ = export_checkpoint(dataclasses.replace(given, step=6), finished)
    for name, array in load_file(path / "adapter_model.safetensors").items():
        assert_array_equal(array, late[name])


def test_adapters_name_a_base_that_peft_opens_where_one_is_given(finished, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(export, "say", said.append)
    for name, base in ((None, str(Path(finished.model.source).resolve())), ("owner/name", "owner/name")):
        given = ExportConfig(run=finished.run_dir, output=str(tmp_path / str(name)), format="adapter")
        directory, _ = export_checkpoint(replace(given, base_name=name), finished)
        written = json.loads((directory / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == base
        shown = name or "THE BASE MODEL"
        assert f'from_pretrained("{shown}")' in (directory / "README.md").read_text()
    assert said == []
    embedded = replace(finished, lora=replace(finished.lora, base_name="embedded:some-model"))
    export_checkpoint(replace(given, base_name=None, output=str(tmp_path / "embedded")), embedded)
    assert "their base is embedded:some-model, which peft does not open; lora.base_name" in said[0]
    assert "base_model:" not in (tmp_path / "embedded" / "README.md").read_text(), (
        "the hub knows no such name"
    )


def test_an_export_of_the_last_checkpoint_is_the_runs_own(finished, tmp_path):
    check_export(finished, tmp_path / "again")


def test_a_gguf_file_is_the_merged_policy(finished, tmp_path, monkeypatch):
    """With a tokenizer that merges, and no token more: a file takes no other."""
    tokenizer = byte_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    rare = next(token for token, number in spec["model"]["vocab"].items() if number == len(tokenizer) - 1)
    spec["model"]["vocab"]["th"] = spec["model"]["vocab"].pop(rare)
    spec["model"]["merges"] = [["t", "h"]]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>")
    monkeypatch.setattr(export, "as_trained", lambda pretrained, _: pretrained._replace(tokenizer=merging))
    given = ExportConfig(run=finished.run_dir, output=str(tmp_path / "x.gguf"), format="gguf")
    path, _ = export_checkpoint(given, finished)
    models = [load_decoder(open_checkpoint(source)) for source in (path, Path(finished.run_dir) / "export")]
    file, directory = (nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in models)
    for (place, ours), (_, expected) in zip(file, directory, strict=True):
        assert_array_equal(ours[...], expected[...], err_msg=str(place))

    monkeypatch.setattr(export, "policy_to_write", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(export, "open_checkpoint", lambda _: SimpleNamespace(config={"model_type": "mpt"}))
    with pytest.raises(ValueError, match="model_type mpt is not written as a GGUF file"):
        export_checkpoint(given, finished)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(config, tmp_path, monkeypatch, kind):
    """What stands where it is to be written would be deleted; it is looked at before weights are read."""
    monkeypatch.setattr(export, "policy_to_write", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(export, "Checkpoints", Mock(side_effect=InterruptedError("weights are next")))
    run, mine, made = tmp_path / "run", tmp_path / "mine", tmp_path / "made"
    config = replace(config, run_dir=str(run), lora=LoraConfig(rank=2))
    for directory in (run / "checkpoints", mine, made):
        directory.mkdir(parents=True)

    def ask(output: Path) -> None:
        export_checkpoint(ExportConfig(run=str(run), output=str(output), format=kind), config)

    (made / "adapter_config.json").touch()
    write_checksums(made)
    for allowed in (tmp_path / "new", mine, made):
        with pytest.raises(InterruptedError):
            ask(allowed)
    for place, name in ((mine, "config.json"), (made, "notes.txt")):
        (place / name).touch()
        with pytest.raises(ValueError, match=r"holds what no export wrote .* and would be deleted"):
            ask(place)
    (run / {"merged": "export", "adapter": "adapter"}[kind]).mkdir()
    (run / {"merged": "export", "adapter": "adapter"}[kind] / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds what no export wrote"):
        export_checkpoint(ExportConfig(run=str(run), format=kind), config)
    with pytest.raises(ValueError, match="which is a file"):
        ask(mine / "config.json")
    with pytest.raises(ValueError, match=r"which is model\.source of the run"):
        ask(Path(config.model.source))
    assert (mine / "config.json").exists()
    assert (made / "notes.txt").exists()


def test_a_run_without_adapters_has_none_to_export(config):
    with pytest.raises(ValueError, match=r"has none: its config has no lora\.rank"):
        export_checkpoint(
            ExportConfig(run=config.run_dir, format="adapter"), replace(config, lora=LoraConfig())
        )


def test_what_does_not_fit_adapters_is_refused_before_weights_are_read(config, monkeypatch):
    def unread(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("dpo.training.adapted.load_policy", unread)
    with pytest.raises(ValueError, match="'query' is no linear of this model"):
        open_policy(replace(config, lora={"target_modules": ["query"]}), mesh())
    with pytest.raises(ValueError, match=r"reference_alpha is 0\.6 and lora is on; allowed is 1"):
        open_policy(replace(config, training={"reference_every": 2}), mesh())
    with pytest.raises(ValueError, match="is no adapter"):
        open_policy(replace(config, lora=LoraConfig(init=config.model.source)), mesh())


@pytest.mark.ci
def test_samples_of_adapters_are_measured_against_the_model_under_them(finished, tmp_path):
    training = {"steps": 2, "eval_every": 1, "eval_samples": 3, "eval_max_new_tokens": 4}
    config = replace(finished, run_dir=str(tmp_path), training=training, optimizer={"warmup_fraction": 0.5})
    train(config)
    first, last = [row["eval/samples/kl"] for row in lines(config) if "eval/samples/kl" in row]
    assert abs(first) < 1e-4  # a warm-up's first update does nothing
    assert abs(last) > 1e-3


@pytest.mark.ci
def test_a_reference_may_move_to_the_adapters(config, tmp_path):
    """TR-DPO with α = 1 and period 1: the policy is its own reference whenever a step begins."""
    training = {"reference_every": 1, "reference_alpha": 1.0, "steps": 3}
    config = replace(config, run_dir=str(tmp_path), training=training, data={"eval": None})
    train(config)
    losses = [row["loss"] for row in lines(config) if "loss" in row]
    assert_allclose(losses, np.log(2), rtol=1e-4)


def test_the_seed_draws_the_adapters(config):
    first, again, other = (
        nnx.to_flat_state(nnx.State(open_policy(replace(config, training={"seed": seed}), mesh()).params))
        for seed in (0, 0, 1)
    )
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert_array_equal(a, b)
    assert any((np.asarray(a) != np.asarray(b)).any() for (_, a), (_, b) in zip(first, other, strict=True))


def test_an_adapters_identity_is_also_that_of_the_model_under_it(finished, tiny_model_dir, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    adapter = shutil.copytree(f"{finished.run_dir}/adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "SHA256SUMS").unlink()
    before = model_identity(str(adapter))
    assert model_identity(str(adapter)) == before
    (base / "generation_config.json").write_text("{}")
    assert model_identity(str(adapter)) != before
